"""Where is each part of the model? One record, made once from whatever says it, and read everywhere.

{"transformer": 0, "lm_head": 1}    names, or beginnings of names: the longest that fits wins
"cuda:0", 0, None                   one device for all (None: the CPU)          \\
a plan                              its map                                      }-->  Placement
a placed model                      as its parameters lie                       /

transformer.word_embeddings     anywhere, also "cpu"
transformer.layers.0 ... 27     in order: GPU 0's blocks, then GPU 1's, ...; what is on the CPU comes last
transformer.final_layernorm     after the last block
lm_head                         with the final norm; the embedding on the same device shares its tensor

A map that breaks one of these rules is refused with every fault in words, by whoever reads it; a placed model is a fact
and is taken as it is.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

Label = int | str
"""0, 1, ... for a GPU, or "cpu"."""


class DeviceMapError(ValueError):
    """A device map that would not work; `.problems` has one sentence for each fault."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("device map: " + "; ".join(problems))


def part_names(layers: int) -> list[str]:
    """Names of the parts that a device map places, in the order of the forward pass."""
    blocks = [f"transformer.layers.{layer}" for layer in range(layers)]
    return ["transformer.word_embeddings", *blocks, "transformer.final_layernorm", "lm_head"]


def device_label(device: Any) -> Label:
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
    if number.isdecimal():
        return int(number)
    raise ValueError(f"{device!r} is no device; use the index of a GPU (0, 1, ...) or 'cpu'")


@dataclass(frozen=True)
class Placement:
    """Part name -> device label, for every part of the model in the order of the forward pass."""

    map: dict[str, Label]

    @classmethod
    def of(cls, source: Any, layers: int | None = None, gpus: int | None = None) -> "Placement":
        """The placement that `source` says; see the module for the forms that there are.

        Args:
            source: a device map, one device, None, a plan, a placed model, or a Placement.
            layers: number of blocks; a model has its own.
            gpus: number of GPUs there are; None: any index is accepted.

        Raises:
            DeviceMapError: a map that would not work, with every fault found.
        """
        if isinstance(source, cls):
            source = source.map
        if hasattr(source, "named_parameters"):
            net = source.get_base_model() if hasattr(source, "get_base_model") else source
            names = part_names(len(net.transformer.layers))
            homes = [next(net.get_submodule(name).parameters()).device for name in names]
            return cls({n: h.index or 0 if h.type == "cuda" else h.type for n, h in zip(names, homes, strict=True)})
        source = getattr(source, "device_map", source)
        if isinstance(source, str) and source in ("auto", "balanced", "balanced_low_0", "sequential"):
            raise DeviceMapError([f"{source!r} is not planned here: pass a dict, such as run.device_map(config)"])
        if not isinstance(source, Mapping):
            source = {"": "cpu" if source is None else source}
        if layers is None:
            raise TypeError("a device map does not say how many blocks the model has: pass layers")
        places, problems = _read(source, part_names(layers), gpus)
        problems = problems or _missing(places, layers) or _order(places)
        if problems:
            raise DeviceMapError(problems)
        return cls(places)

    @property
    def embedding(self) -> Label:
        """Where the embedding is."""
        return self.map["transformer.word_embeddings"]

    @property
    def head(self) -> Label:
        """Where `lm_head` is."""
        return self.map["lm_head"]

    @cached_property
    def blocks(self) -> dict[Label, list[int]]:
        """Device -> its blocks, in the order in which a row of tokens passes them."""
        found: dict[Label, list[int]] = {}
        for layer, place in enumerate(list(self.map.values())[1:-2]):
            found.setdefault(place, []).append(layer)
        return found

    @property
    def devices(self) -> list[Label]:
        """Every device that works: GPUs in order of their index, then the CPU if blocks are there."""
        used = {*self.blocks, self.head, *[self.embedding] * (self.embedding != "cpu")}
        return sorted(used, key=lambda label: (isinstance(label, str), label))


def _covers(key: str, name: str) -> bool:
    return key in ("", name) or name.startswith(key + ".")


def _read(source: Mapping[str, Any], names: list[str], gpus: int | None) -> tuple[dict[str, Label], list[str]]:
    """The parts that have a device, in order, and what cannot be read."""
    problems, labels = [], {}
    for key, value in source.items():
        if problem := _unknown_name(key, names):
            problems.append(problem)
            continue
        try:
            label = labels[key] = device_label(value)
        except ValueError as error:
            problems.append(f"{key or 'the model'}: {error}")
            continue
        if isinstance(label, int) and (label < 0 or (gpus is not None and label >= gpus)):
            known = "GPU 0 is the first" if gpus is None else f"there are {gpus}, counted from 0"
            problems.append(f"{key or 'the model'} is sent to GPU {label}, which does not exist ({known})")
    fitting = {name: [key for key in labels if _covers(key, name)] for name in names}
    return {name: labels[max(keys, key=len)] for name, keys in fitting.items() if keys}, problems


def _unknown_name(key: Any, names: list[str]) -> str | None:
    if not isinstance(key, str):
        return f"{key!r} is no name of a part; the parts are {names[0]}, {names[1]} ..., {names[-2]} and {names[-1]}"
    if any(_covers(key, name) for name in names):
        return None
    if any(key.startswith(name + ".") for name in names):
        return f"{key} is inside one part; a block must be whole on one GPU, so name the block"
    if match := re.fullmatch(r"transformer\.layers\.(\d+)", key):
        return f"{key} is unknown: this model has blocks 0 to {len(names) - 4}, not block {match[1]}"
    return f"{key!r} is unknown; the parts are {names[0]}, {names[1]} ..., {names[-2]} and {names[-1]}"


def _missing(places: Mapping[str, Label], layers: int) -> list[str]:
    absent = [name for name in part_names(layers) if name not in places]
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


def _order(places: Mapping[str, Label]) -> list[str]:
    problems = []
    embedding, *chain, norm, head = places.values()
    names = list(places)[1:-1]
    for (name, before), (after, here) in pairwise(zip(names, [*chain, norm], strict=True)):
        if before == "cpu" != here:
            problems.append(
                f"{name} is on the CPU and {after} behind it on GPU {here}: only the embedding can stay on the CPU in "
                "front of a GPU"
            )
        elif isinstance(here, int) and isinstance(before, int) and here < before:
            problems.append(
                f"{after} on GPU {here} comes after {name} on GPU {before}: out of order, "
                "the GPUs must take the blocks in ascending order"
            )
    if head != norm:
        problems.append(
            f"lm_head is on {_said(head)}, the final norm on {_said(norm)}: put both on the one that ends the model"
        )
    if embedding not in ("cpu", chain[0], head):
        problems.append(
            f"transformer.word_embeddings is on {_said(embedding)}, neither with the first block ({_said(chain[0])}), "
            f"nor with lm_head that it is tied to ({_said(head)}), nor on the CPU"
        )
    return problems


def _said(label: Label) -> str:
    return "the CPU" if label == "cpu" else f"GPU {label}"
