"""Pictures of what each GPU holds: five parts against the limit, and what training adds, enlarged.

                 saved for backward 0.47  at work 0.17              small parts are named above their bar,
                              \\      |                             in the first bar that has them
    GPU 0    |####weights####|==|/|.|        8.21 free     | limit
    6.54 GiB |#####5.63######|==|/|.|                      | 14.75

A total has one meaning: all that the card needs, with the allocator's slack and the CUDA context, as it is compared
with the limit. The enlarged picture has what training adds to the frozen weights, term by term.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from glmhelpers.plots.device_map import device_name
from glmhelpers.plots.memory_bars import EACH_TERM, FEW_PARTS, Bar, Part, memory_bars
from glmhelpers.plots.style import COLORS, describe, fill, ink
from glmhelpers.utils.units import GIB, MIB

WIDTH, ROW, SMALL = 7.5, 0.84, 9
"""Inches of a figure and of a row in it; points of the letters at the parts."""

HEIGHT, ABOVE = 0.47, 0.47
"""Height of a bar and of a name's middle above its bar's middle, in rows."""

SEEN = 0.005
"""Share of the axis from which on a part can be seen: 3 pixels of 600."""

FAR = 2.5
"""A limit that is more than this times what is held lies outside the picture, or most of the axis would be empty."""

REST = "Enlarged: what training adds to the frozen weights"


def draw_memory(
    breakdown: Sequence[Mapping[str, int]],
    names: Sequence[str] | None = None,
    limits: Sequence[int] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """One horizontal bar of five parts for each GPU, with its limit as a line.

    Args:
        breakdown: for each GPU, bytes by term, slack and context included: `with_outside` of a plan or a prediction.
        names: a label for each bar; "GPU 0", "GPU 1", ... by default.
        limits: usable bytes of each GPU.
        axes: where to draw.
    """
    names = names or [device_name(index) for index in range(len(breakdown))]
    return draw_bars(memory_bars(breakdown, names, limits, FEW_PARTS), axes)


def draw_plan(plan: Any, axes: Axes | None = None) -> Axes:
    """What a plan holds on each GPU, and below it, enlarged, what training adds; only the former if `axes` is given."""
    if axes is not None:
        return draw_memory(plan.with_outside, _names(plan), plan.usable_bytes, axes)
    _, (whole, rest) = plt.subplots(2, 1, figsize=(WIDTH, 2 * _height(len(plan.gpus))))
    parts = memory_bars(plan.with_outside, _names(plan), plan.usable_bytes, FEW_PARTS)
    whole.set_title("All that each GPU needs, and its limit")
    rest.set_title(REST)
    _draw_parts(whole, parts, GIB)
    _draw_parts(rest, _rest_bars(plan), MIB)
    _write_words(whole, parts, GIB)
    _write_words(rest, _rest_bars(plan), MIB)
    return whole


def draw_rest(plan: Any, axes: Axes | None = None) -> Axes:
    """What a training step adds to the frozen weights, in MiB: all terms but weights, embedding, slack and context."""
    bars = _rest_bars(plan)
    axes = axes or plt.subplots(figsize=(WIDTH, _height(len(bars))))[1]
    axes.set_title(REST)
    return draw_bars(bars, axes, MIB)


def _rest_bars(plan: Any) -> list[Bar]:
    rest = [
        {term: size for term, size in sizes.items() if term not in ("weights", "embedding")} for sizes in plan.breakdown
    ]
    return memory_bars(rest, _names(plan), groups=EACH_TERM)


def draw_bars(bars: Sequence[Bar], axes: Axes | None = None, unit: int = GIB) -> Axes:
    """Draw bars with matplotlib: parts, limits as lines, best plans as outlines, what was measured as diamonds.

    Args:
        bars: from `memory_bars`.
        axes: where to draw.
        unit: bytes in a unit of the axis, GIB or MIB.

    Returns:
        the axes.
    """
    axes = axes or plt.subplots(figsize=(WIDTH, _height(len(bars))))[1]
    _draw_parts(axes, bars, unit)
    _write_words(axes, bars, unit)
    return axes


def _draw_parts(axes: Axes, bars: Sequence[Bar], unit: int) -> None:
    for row, bar in enumerate(bars):
        for part in bar.parts:
            if part.size:
                look = fill(part.group.color, part.group.hatch)
                axes.barh(row, part.size / unit, HEIGHT, left=part.start / unit, gid=part.group.label, **look)
        if bar.best is not None:
            axes.barh(row, bar.best / unit, 1.3 * HEIGHT, fill=False, edgecolor="black", linestyle="--", gid="best")
        if bar.measured is not None:
            axes.plot(bar.measured / unit, row, "D", markerfacecolor="white", markeredgecolor="black", gid="measured")
    axes.set_yticks(range(len(bars)), [f"{bar.name}\n{_number(bar.total, unit)} {_UNITS[unit]}" for bar in bars])
    axes.set(xlim=(0, _end(bars) / unit), xlabel=_UNITS[unit])
    axes.set_ylim(len(bars) - 1 + 0.6 * HEIGHT, -ABOVE - 0.2)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def _write_words(axes: Axes, bars: Sequence[Bar], unit: int) -> None:
    """All that needs to know how wide the axes are: call it when all axes of the figure have their parts and ticks."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    for row, bar in enumerate(bars):
        _draw_limit(axes, row, bar, unit)
    _name_parts(axes, bars, unit)
    describe(axes, _in_words(axes.get_title("left"), bars, unit))


_UNITS = {GIB: "GiB", MIB: "MiB"}


def _number(size: float, unit: int) -> str:
    return f"{size / unit:.2f}" if unit == GIB else f"{size / unit:,.0f}"


def _names(plan: Any) -> list[str]:
    return [f"GPU {index} ({gpu.name})" for index, gpu in enumerate(plan.gpus)]


def _height(rows: int) -> float:
    return 0.85 + ROW * rows


def _end(bars: Sequence[Bar]) -> float:
    """Bytes at the right end of the axis: behind the limits and their words, but not where most would be empty."""
    longest, held = max(bar.longest for bar in bars), max(bar.total for bar in bars)
    if all(bar.limit is None for bar in bars):
        return 1.02 * longest
    return 1.12 * longest if longest < FAR * held or not held else 0.6 * FAR * held


def _draw_limit(axes: Axes, row: int, bar: Bar, unit: int) -> None:
    if bar.limit is None:
        return
    limit, end, over = bar.limit / unit, axes.get_xlim()[1], bar.total > bar.limit
    note = f"limit\n{_number(bar.limit, unit)}"
    place: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": SMALL}
    if limit > end:
        axes.annotate(f"{note} \N{RIGHTWARDS ARROW}", (end, row), (0, 0), ha="right", **place)
    else:
        axes.plot([limit] * 2, [row - 0.7 * HEIGHT, row + 0.7 * HEIGHT], color="black", linewidth=2.5, gid="limit")
        if over:
            note += f"\n{_number(bar.total - bar.limit, unit)} over"
            place["color"] = "#B00000"
        axes.annotate(note, (max(bar.total / unit, limit), row), (5, 0), **place)
    if not over:
        room = (bar.total / unit, min(limit, 0.9 * end))
        _write_if_it_fits(axes, f"{_number(bar.limit - bar.total, unit)} free", room, row, color="#555555")


def _name_parts(axes: Axes, bars: Sequence[Bar], unit: int) -> None:
    """Each part is named inside a bar that has room, or above the first bar that has it, or below as too small."""
    named: set[str] = set()
    for row, bar in enumerate(bars):
        for part in bar.parts:
            look = {"color": ink(part.group.color)}
            if part.group.hatch:
                look["backgroundcolor"] = COLORS[part.group.color]
            room = (part.start / unit, (part.start + part.size) / unit)
            for text in (f"{part.group.label}\n{_number(part.size, unit)}", _number(part.size, unit)):
                if part.size and _write_if_it_fits(axes, text, room, row, **look):
                    named |= {part.group.label} if "\n" in text else set()
                    break
    tiny: dict[str, int] = {}
    for row, bar in enumerate(bars):
        rest = [part for part in bar.parts if part.size and part.group.label not in named]
        seen = [part for part in rest if part.size / unit > SEEN * axes.get_xlim()[1]]
        above = _name_above(axes, seen, row, unit)
        named |= {part.group.label for part in above}
        for part in rest:
            if part not in above:
                tiny[part.group.label] = max(part.size, tiny.get(part.group.label, 0))
    if tiny := {label: size for label, size in tiny.items() if label not in named}:
        listed = (f"{label} {_number(size, unit)}".replace(" ", "\N{NO-BREAK SPACE}") for label, size in tiny.items())
        note = textwrap.fill(f"too small to be named: {', '.join(listed)}", 95)
        axes.set_xlabel(f"{_UNITS[unit]}\n{note}", fontsize=SMALL)


def _write_if_it_fits(axes: Axes, text: str, room: tuple[float, float], row: int, **look: Any) -> bool:
    words = axes.text(sum(room) / 2, row, text, ha="center", va="center", fontsize=SMALL, linespacing=1.1, **look)
    words.set_in_layout(False)
    if box := words.get_bbox_patch():
        box.set_boxstyle("square", pad=0.1)
    # A number alone in its part needs a little air.
    fits = _width(axes, words) < (0.95 if "\n" in text else 0.8) * (room[1] - room[0])
    if not fits:
        words.remove()
    return fits


def _name_above(axes: Axes, parts: Sequence[Part], row: int, unit: int) -> list[Part]:
    """Name as many of `parts` above the bar of `row` as there is room for, the largest first; returns them."""
    end = axes.get_xlim()[1]
    words = {
        part: axes.text(0, row - ABOVE, f"{part.group.label} {_number(part.size, unit)}", va="center", fontsize=SMALL)
        for part in parts
    }
    widths = {part: _width(axes, each) for part, each in words.items()}
    gap = 0.015 * end
    while words and sum(widths[part] + gap for part in words) > end:
        words.pop(min(words, key=lambda part: part.size)).remove()
    centers = [(part.start + part.size / 2) / unit for part in words]
    starts = spread(centers, [widths[part] for part in words], gap, end)
    for (part, each), start, center in zip(words.items(), starts, centers, strict=True):
        each.set(x=start, in_layout=False)
        foot = min(max(center, start + 0.15 * widths[part]), start + 0.85 * widths[part])
        line = [row - ABOVE + 0.12, row - HEIGHT / 2 + 0.04]
        axes.plot([foot, center], line, color="black", linewidth=0.8, gid="leader")
    return list(words)


def spread(centers: Sequence[float], widths: Sequence[float], gap: float, end: float) -> list[float]:
    """Where words begin that should stand over `centers`: moved together where they would touch, each group centred.

    Args:
        centers: in ascending order.
        widths: of the words.
        gap: between two words.
        end: of the room, which begins at 0. Words that are too many for it begin left of 0.
    """
    groups: list[tuple[float, list[int]]] = []
    for word in range(len(centers)):
        members = [word]
        while True:
            offsets = [sum(widths[other] + gap for other in members if other < each) for each in members]
            wanted = [centers[each] - widths[each] / 2 - offset for each, offset in zip(members, offsets, strict=True)]
            width = offsets[-1] + widths[members[-1]]
            start = min(max(sum(wanted) / len(wanted), 0.0), end - width)
            if not groups or groups[-1][0] + sum(widths[each] + gap for each in groups[-1][1]) <= start:
                break
            members = groups.pop()[1] + members
        groups.append((start, members))
    return [
        start + sum(widths[other] + gap for other in members if other < each)
        for start, members in groups
        for each in members
    ]


def _width(axes: Axes, words: Any) -> float:
    """Of a text, in units of the x axis."""
    left, right = axes.get_xlim()
    return words.get_window_extent().width / axes.bbox.width * (right - left)


def _in_words(title: str, bars: Sequence[Bar], unit: int) -> str:
    said = []
    for bar in bars:
        parts = ", ".join(f"{part.group.label} {_number(part.size, unit)}" for part in bar.parts if part.size)
        limit = "" if bar.limit is None else f" of {_number(bar.limit, unit)}"
        said.append(f"{bar.name}: {_number(bar.total, unit)}{limit} {_UNITS[unit]}{': ' * bool(parts)}{parts}.")
    return f"{title or 'Memory of each GPU'}, as bars. {' '.join(said)}"
