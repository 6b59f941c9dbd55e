"""Which part of the model lives on which device: from a device map to one Stage a device.

{"transformer.word_embeddings": 1, "transformer.layers.0": 0, ... "lm_head": 1}

    GPU 0   blocks 0..14                       Stage(15 blocks, first)
    GPU 1   blocks 15..27, norm, head          Stage(13 blocks, head, the embedding shares its tensor)
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from glmhelpers.cost_model.sizes import Shape


@dataclass(frozen=True)
class Stage:
    """What lives on one GPU.

    Attributes:
        blocks: for each of its blocks, in order: is it checkpointed?
        first: is the first of its blocks block 0 of the model, whose input needs no gradient?
        embedding: does it hold an embedding of its own?
        head: does it hold the final norm and the head?
        shared: is the embedding it looks up in the head's own tensor?
    """

    blocks: tuple[bool, ...] = ()
    embedding: bool = False
    head: bool = False
    shared: bool = False
    first: bool = False

    @classmethod
    def of(cls, count: int, kept: int = 0, **flags: bool) -> "Stage":
        """A stage of `count` blocks of which the last `kept` are not checkpointed."""
        return cls((True,) * (count - kept) + (False,) * kept, **flags)


def device_label(device: Any) -> int | str:
    """0, 1, ... for a GPU (0, "0", "cuda:0", torch.device), or "cpu".

    Raises:
        ValueError: anything else.
    """
    if isinstance(device, int) and not isinstance(device, bool):
        return device
    text = str(device)
    if text == "cpu":
        return text
    number = text.removeprefix("cuda:") if text != "cuda" else "0"
    if number.isdigit():
        return int(number)
    raise ValueError(f"{device!r} is no device; use the index of a GPU (0, 1, ...) or 'cpu'")


def is_checkpointed(shape: Shape, checkpointed: str | int | Iterable[int]) -> list[bool]:
    """For each block of the model: is it checkpointed?

    Args:
        shape: sizes of the model.
        checkpointed: "all"; "none"; a number n for blocks 0 to n - 1; or the indices of the blocks.

    Raises:
        ValueError: a block that the model does not have.
    """
    if isinstance(checkpointed, str):
        if checkpointed not in ("all", "none"):
            raise ValueError(f"checkpointed={checkpointed!r}; use 'all', 'none', a number, or a list of blocks")
        return [checkpointed == "all"] * shape.layers
    chosen = range(checkpointed) if isinstance(checkpointed, int) else list(checkpointed)
    wrong = [block for block in chosen if not 0 <= block < shape.layers]
    if wrong:
        raise ValueError(f"cannot checkpoint block {wrong[0]}: the model has blocks 0 to {shape.layers - 1}")
    return [block in chosen for block in range(shape.layers)]


def find_stages(
    shape: Shape, device_map: Mapping[str, Any], checkpointed: str | int | Iterable[int] = "all", tied: bool = True
) -> dict[int | str, Stage]:
    """What a device map puts on each device, device label -> Stage, GPUs in order of their index.

    Args:
        shape: sizes of the model.
        device_map: module name -> device, with a name for each block, the embedding, the final norm and the head.
        checkpointed: see is_checkpointed.
        tied: embedding and head are one tensor where they are on the same device.
    """
    places = {name: device_label(device) for name, device in device_map.items()}
    marks = is_checkpointed(shape, checkpointed)
    embedding, head = places["transformer.word_embeddings"], places["lm_head"]
    blocks: dict[int | str, list[bool]] = {}
    for layer in range(shape.layers):
        blocks.setdefault(places[f"transformer.layers.{layer}"], []).append(marks[layer])
    used = {*blocks, head} | ({embedding} if embedding != "cpu" else set())
    return {
        device: Stage(
            tuple(blocks.get(device, ())),
            embedding=embedding == device,
            head=head == device,
            shared=tied and embedding == head == device,
            first=places["transformer.layers.0"] == device,
        )
        for device in sorted(used, key=lambda label: (isinstance(label, str), label))
    }
