"""Is a device map one that works? Every fault with its own message.

transformer.word_embeddings     anywhere, also "cpu"
transformer.layers.0 ... 27     in order: GPU 0's blocks, then GPU 1's, ...
transformer.final_layernorm     after the last block
lm_head                         with the final norm; the embedding on the same GPU shares its tensor
"""

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from glmhelpers.cost_model.gpus import find_gpus
from glmhelpers.cost_model.sizes import Shape
from glmhelpers.cost_model.stages import device_label


class DeviceMapError(ValueError):
    """A device map that would not work; `.problems` has one sentence for each fault."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("device map: " + "; ".join(problems))


def part_names(layers: int) -> list[str]:
    """Names of the parts that a device map places, in the order of the forward pass."""
    blocks = [f"transformer.layers.{layer}" for layer in range(layers)]
    return ["transformer.word_embeddings", *blocks, "transformer.final_layernorm", "lm_head"]


def check_device_map(config: Any, device_map: Mapping[str, Any], gpus: Any = None) -> dict[int | str, list[int]]:
    """Refuse a device map that would not work.

    A name may stand for all that is below it ("transformer.layers", or "" for the whole model); the longest name wins.

    Args:
        config: ChatGLMConfig, or a dict with its keys.
        device_map: module name -> GPU index, "cuda:0", or "cpu".
        gpus: the GPUs there are, as for plan_device_map; None: any index is accepted.

    Returns:
        Device -> its blocks, in order.

    Raises:
        DeviceMapError: with every fault found.
    """
    shape = Shape.of(config)
    count = None if gpus is None else len(find_gpus(gpus))
    names = part_names(shape.layers)
    problems, places = [], {}
    for key, value in device_map.items():
        if problem := _unknown_name(key, names, shape.layers):
            problems.append(problem)
            continue
        try:
            label = device_label(value)
        except ValueError as error:
            problems.append(f"{key}: {error}")
            continue
        if isinstance(label, int) and (label < 0 or (count is not None and label >= count)):
            known = "GPU 0 is the first" if count is None else f"there are {count}, counted from 0"
            problems.append(f"{key} is sent to GPU {label}, which does not exist ({known})")
            continue
        for name in names:
            if _covers(key, name) and len(key) >= len(places.get(name, ("", None))[0]):
                places[name] = (key, label)
    if not problems:
        problems = _missing(names, places, shape.layers)
    if not problems:
        problems = _order(names, {name: label for name, (_, label) in places.items()})
    if problems:
        raise DeviceMapError(problems)
    blocks: dict[int | str, list[int]] = {}
    for layer in range(shape.layers):
        blocks.setdefault(places[f"transformer.layers.{layer}"][1], []).append(layer)
    return blocks


def _covers(key: str, name: str) -> bool:
    return key in ("", name) or name.startswith(key + ".")


def _unknown_name(key: str, names: list[str], layers: int) -> str | None:
    if any(_covers(key, name) for name in names):
        return None
    if any(key.startswith(name + ".") for name in names):
        return f"{key} is inside one part; a block must be whole on one GPU, so name the block"
    if match := re.fullmatch(r"transformer\.layers\.(\d+)", key):
        return f"{key} is unknown: this model has blocks 0 to {layers - 1}, not block {match[1]}"
    return f"{key!r} is unknown; the parts are {names[0]}, {names[1]} ..., {names[-2]} and {names[-1]}"


def _missing(names: list[str], places: Mapping, layers: int) -> list[str]:
    absent = [name for name in names if name not in places]
    problems = [f"{name} is on no GPU: add it" for name in absent if ".layers." not in name]
    blocks = [int(name.rsplit(".", 1)[1]) for name in absent if ".layers." in name]
    if blocks:
        gap = any(block < layers - 1 and block + 1 not in blocks for block in blocks)
        where = "a gap between the GPUs" if gap else "the end is missing"
        problems.append(f"block{'s' * (len(blocks) > 1)} {_ranges(blocks)} on no GPU ({where}): add them")
    return problems


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _order(names: list[str], places: Mapping[str, int | str]) -> list[str]:
    problems = []
    chain = names[1:-1]
    on_cpu = [name for name in (*chain, "lm_head") if places[name] == "cpu"]
    if on_cpu and len(on_cpu) < len(chain) + 1:
        return [f"{on_cpu[0]} is on the CPU while others are on GPUs: only the embedding can stay on the CPU"]
    if on_cpu:
        return []
    for before, after in pairwise(chain):
        if places[after] < places[before]:
            problems.append(
                f"{after} on GPU {places[after]} comes after {before} on GPU {places[before]}: out of order, "
                "the GPUs must take the blocks in ascending order"
            )
    norm, head = places["transformer.final_layernorm"], places["lm_head"]
    if head != norm:
        problems.append(
            f"lm_head is on GPU {head}, the final norm on GPU {norm}: put both on the GPU that ends the model"
        )
    embedding = places[names[0]]
    first = places["transformer.layers.0"]
    if embedding not in ("cpu", first, head):
        problems.append(
            f"transformer.word_embeddings is on GPU {embedding}, neither with the first block (GPU {first}), nor with "
            f"lm_head that it is tied to (GPU {head}), nor on the CPU"
        )
    return problems
