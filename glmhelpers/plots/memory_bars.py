"""Bars of GPU memory: one description, two small renderers.

    bytes by term  ->  memory_bars()  ->  [Bar, Bar, ...]  ->  memory_figure.draw_bars        matplotlib
                                                           ->  widgets.explorer_svg.bars_svg  SVG

    |#####weights####|=embed=|//saved//|x|..|          |    the bar, and the limit
    [ - - - - - - - - - - - - - - - - ]                     thin outline: what the best plan holds
                                      <>                    diamond: the peak that was measured

A renderer decides where things stand. What is drawn, in which order, colour and hatch, is decided here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from glmhelpers.cost_model.step_memory import OUTSIDE, TERMS

TERM_LOOK = {
    "weights": ("blue", ""),
    "embedding": ("sky", ""),
    "lora": ("green", ""),
    "adam": ("green", "xx"),
    "gradients": ("green", ".."),
    "masks": ("dark", ""),
    "inputs": ("orange", ""),
    "activations": ("orange", "//"),
    "block": ("vermillion", "//"),
    "loss": ("purple", ""),
    "transfer": ("yellow", ""),
    "cache": ("yellow", ".."),
    "workspace": ("dark", "//"),
    "slack": ("light", ""),
    "context": ("light", "//"),
}
"""Colour name and hatch of every term, in the order in which terms are drawn."""

_LABELS = {**TERMS, **OUTSIDE}


@dataclass(frozen=True)
class Group:
    """Terms that are drawn as one part: its name for readers, colour name, hatch, and the terms."""

    label: str
    color: str
    hatch: str
    terms: tuple[str, ...]


EACH_TERM = tuple(Group(label, *TERM_LOOK[term], (term,)) for term, label in _LABELS.items())
"""Every term a part of its own."""

FEW_PARTS = (
    Group("weights", "blue", "", ("weights",)),
    Group("embedding and head", "sky", "", ("embedding",)),
    Group("saved for backward", "orange", "", ("inputs", "activations")),
    Group(
        "at work",
        "vermillion",
        "//",
        ("lora", "adam", "gradients", "masks", "block", "loss", "transfer", "cache", "workspace"),
    ),
    Group("slack and context", "light", "", ("slack", "context")),
)
"""The parts that a reader can tell apart at a glance. What LoRA adds is too small for a part of its own."""


@dataclass(frozen=True)
class Part:
    """One coloured piece of a bar.

    Attributes:
        group: what it is and how it looks.
        start, size: bytes.
        terms: name for readers and bytes of each term in it that is not 0.
    """

    group: Group
    start: int
    size: int
    terms: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Bar:
    """What one GPU holds.

    Attributes:
        name: its label.
        parts: from left to right; all bars of a picture have the same ones, and some may be empty.
        limit: bytes that may be used, or None.
        best: bytes that the best plan holds here, or None.
        measured: peak in bytes that was measured here, or None.
    """

    name: str
    parts: tuple[Part, ...]
    limit: int | None = None
    best: int | None = None
    measured: int | None = None

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)

    @property
    def longest(self) -> int:
        """Bytes that the axis must hold."""
        return max(self.total, self.limit or 0, self.best or 0, self.measured or 0)


def memory_bars(
    breakdown: Sequence[Mapping[str, int]],
    names: Sequence[str],
    limits: Sequence[int] | None = None,
    groups: Sequence[Group] = EACH_TERM,
    best: Sequence[int] | None = None,
    measured: Sequence[int] | None = None,
) -> list[Bar]:
    """Describe one bar for each GPU.

    Args:
        breakdown: for each GPU, bytes by term; keys of step_memory.TERMS and step_memory.OUTSIDE.
        names: a label for each bar.
        limits: usable bytes of each GPU.
        groups: which terms make up a part. Every term must be in one of them.
        best: bytes that the best plan holds on each GPU, drawn as an outline.
        measured: peak in bytes that was measured on each GPU.

    Raises:
        ValueError: a term that no group has, or a list with another number of GPUs than `breakdown`.
    """
    lists = {"names": names, "limits": limits, "best": best, "measured": measured}
    for name, values in lists.items():
        if values is not None and len(values) != len(breakdown):
            raise ValueError(f"{name} has {len(values)} values for {len(breakdown)} bars; give one for each")
    known = {term for group in groups for term in group.terms}
    for name, terms in zip(names, breakdown, strict=True):
        if lost := [term for term, size in terms.items() if size and term not in known]:
            raise ValueError(f"the term {lost[0]!r} of {name} is in no group, so it would not be drawn")
    shown = [group for group in groups if any(terms.get(term) for terms in breakdown for term in group.terms)]

    def parts(terms: Mapping[str, int]) -> Iterator[Part]:
        start = 0
        for group in shown:
            held = tuple((_LABELS[term], terms[term]) for term in group.terms if terms.get(term))
            size = sum(size for _, size in held)
            yield Part(group, start, size, held)
            start += size

    def at(values: Sequence[int] | None, row: int) -> int | None:
        return None if values is None else values[row]

    return [
        Bar(name, tuple(parts(terms)), at(limits, row), at(best, row), at(measured, row))
        for row, (name, terms) in enumerate(zip(names, breakdown, strict=True))
    ]
