"""The stages of the pipeline: what each device of a placement holds.

{"transformer.word_embeddings": 1, "transformer.layers.0": 0, ... "lm_head": 1}

    GPU 0   blocks 0..14                       Stage(15 blocks, first)
    GPU 1   blocks 15..27, norm, head          Stage(13 blocks, head, the embedding shares its tensor)
"""

from collections.abc import Iterable
from dataclasses import dataclass

from glmhelpers.cost_model.placement import Label, Placement


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
    def of(cls, count: int, kept: int = 0, *flags: bool, **named: bool) -> "Stage":
        """A stage of `count` blocks of which the last `kept` are not checkpointed; the other fields as they are."""
        return cls((True,) * (count - kept) + (False,) * kept, *flags, **named)


def is_checkpointed(layers: int, checkpointed: str | int | Iterable[int]) -> list[bool]:
    """For each block of the model: is it checkpointed?

    Args:
        layers: number of blocks.
        checkpointed: "all"; "none"; a number n for blocks 0 to n - 1; or the indices of the blocks.

    Raises:
        ValueError: a block that the model does not have.
    """
    if isinstance(checkpointed, str):
        if checkpointed not in ("all", "none"):
            raise ValueError(f"checkpointed={checkpointed!r}; use 'all', 'none', a number, or a list of blocks")
        return [checkpointed == "all"] * layers
    chosen = range(checkpointed) if isinstance(checkpointed, int) else list(checkpointed)
    wrong = [block for block in chosen if not 0 <= block < layers]
    if wrong:
        raise ValueError(f"cannot checkpoint block {wrong[0]}: the model has blocks 0 to {layers - 1}")
    return [block in chosen for block in range(layers)]


def find_stages(
    placement: Placement, checkpointed: str | int | Iterable[int] = "all", tied: bool = True
) -> dict[Label, Stage]:
    """What each device holds, device label -> Stage, in the order of `placement.devices`.

    Args:
        placement: where the parts are.
        checkpointed: see is_checkpointed.
        tied: embedding and head are one tensor where they are on the same device.
    """
    embedding, head, blocks = placement.embedding, placement.head, placement.blocks
    marks = is_checkpointed(len(placement.map) - 3, checkpointed)
    return {
        device: Stage(
            tuple(marks[layer] for layer in blocks.get(device, ())),
            embedding=embedding == device,
            head=head == device,
            shared=tied and embedding == head == device,
            first=0 in blocks.get(device, ()),
        )
        for device in placement.devices
    }
