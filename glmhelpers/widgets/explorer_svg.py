"""The explorer's picture as SVG text: made in a millisecond, sharp at any size, needing nothing but a browser.

           cut 14
    |embed|0|1|  ...  |13|14|  ...  |27|head|           the blocks, coloured by GPU; a dot: not checkpointed
                         /\\                             the cut of the best plan
    GPU 0  |#####weights####|=|/|.|   |  6.54 of 14.75  what each holds, its limit, the best plan's outline,
    GPU 1  |####weights####|==|/|.|   |  6.77 of 14.75  a diamond where the peak was measured
    GPU 0   ffffffff    bbbbbbbbbb                      who works when

Letters and lines take the colour of the page's text, so that the picture needs no ground of its own. Parts say their
name and size when the pointer rests on them.
"""

from collections.abc import Sequence
from html import escape
from itertools import groupby
from textwrap import wrap

from glmhelpers.cost_model.step_time import busy_share
from glmhelpers.devicemap.plan import Plan
from glmhelpers.plots.device_map import GPU_COLORS
from glmhelpers.plots.memory_bars import FEW_PARTS, Bar, memory_bars
from glmhelpers.plots.style import COLORS, ink
from glmhelpers.utils.units import GIB
from glmhelpers.widgets.explorer_words import Measured, is_same

WIDTH, LEFT, RIGHT = 600, 64, 118
"""Units of the picture, and of the room for names and for totals."""

BOXES, ENDS, BAR, TASK = 20, 48, 22, 14
"""Height of a block, width of embedding and head, heights of a row of memory and of time."""

FAR = 3
"""A limit that is more than this times what is held is an arrow at the right end."""

LETTER = 6.3
"""Width of a letter, on average: there is no browser here to ask."""

_HATCH = (
    '<pattern id="glm-hatch-{0}" width="6" height="6" patternUnits="userSpaceOnUse"><rect width="6" height="6" '
    'fill="{1}"/><path d="M-1,1 l2,-2 M0,6 L6,0 M5,7 l2,-2" stroke="{2}" stroke-width="0.9"/></pattern>'
)
_THIN = 'fill="none" stroke="currentColor" stroke-width="1.1" stroke-dasharray="4 2"'
_DIAMOND = '<path d="M{0:.1f},{1:.1f} l5,5 l-5,5 l-5,-5 z" fill="white" stroke="black" stroke-width="1.4"/>'
_OVER = "#D93025"
"""A red that can be read on white and on black."""


def plan_svg(
    plan: Plan,
    best: Plan | None = None,
    measured: Measured | None = None,
    words: Sequence[str] = (),
    page: bool = False,
) -> str:
    """Blocks, memory and time of a plan, one below the other.

    Args:
        plan: what to draw.
        best: a plan for the same GPUs, drawn as an outline where it is another one.
        measured: what was measured of this very plan.
        words: sentences about it: with the plan's own, they are what screen readers say.
        page: black on white with the words below, for where nothing else stands around the picture.
    """
    best = None if is_same(plan, best) else best
    bars = memory_bars(
        plan.with_outside,
        [f"GPU {index}" for index in range(len(plan.gpus))],
        plan.usable_bytes,
        FEW_PARTS,
        best.total_bytes if best else None,
        measured.peak_bytes if measured else None,
    )
    end = _end(bars)
    body, top = _row(plan, best), 54.0
    body += "".join(_bar(bar, number, top, end) for number, bar in enumerate(bars))
    dots = len(plan.checkpointed_layers) < plan.shape.layers
    legend, top = _legend(bars, dots, top + BAR * len(bars) + 6)
    seconds, height = _time(plan, best, measured, top + 6)
    for line in [line for each in words for line in wrap(each, 95)] if page else []:
        height += 16
        body += _text(0, height - 2, line)
    hatches = "".join(_HATCH.format(color, COLORS[color], ink(color)) for color in ("vermillion", "orange"))
    ground = "background:white;color:black;" if page else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height + 4:.0f}" role="img" '
        f'fill="currentColor" font-family="sans-serif" font-size="12" '
        f'style="{ground}display:block;width:100%;max-width:800px">'
        f"<title>{escape(' '.join([*words, str(plan)]))}</title><defs>{hatches}</defs>{body}{legend}{seconds}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'


def _rect(x: float, y: float, width: float, height: float, look: str, title: str = "") -> str:
    tip = f"<title>{escape(title)}</title>" if title else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" {look}>{tip}</rect>'


def _fill(color: str, hatch: str = "") -> str:
    return f'fill="url(#glm-hatch-{color})"' if hatch else f'fill="{COLORS[color]}"'


def _cuts(plan: Plan) -> list[int]:
    """Numbers of the blocks before which the next GPU begins; where a GPU has none, only one is kept of equal ones."""
    ends = [sum(len(blocks) for blocks in plan.blocks[: number + 1]) for number in range(len(plan.blocks) - 1)]
    return sorted(set(ends))


def _row(plan: Plan, best: Plan | None) -> str:
    """The model from embedding to head, cut by cut."""
    layers, top = plan.shape.layers, 20
    unit = (WIDTH - 2 * ENDS) / layers
    places, body = list(plan.device_map.items()), ""
    checkpointed = set(plan.checkpointed_layers)
    gaps = {0, layers, *_cuts(plan)}
    for layer, (name, home) in enumerate(places[1 : layers + 1]):
        x = ENDS + layer * unit
        how = "checkpointed" if layer in checkpointed else "not checkpointed"
        gap = [2.0 if edge in gaps else 0.5 for edge in (layer, layer + 1)]
        body += _rect(x + gap[0], top, unit - sum(gap), BOXES, _gpu(home), f"{name}: {_device(home)}, {how}")
        if layer not in checkpointed:
            body += f'<circle cx="{x + unit / 2:.1f}" cy="{top + 4}" r="1.8" fill="{_letters(home)}"/>'
    start = 0
    for home, run in groupby(home for _, home in places[1 : layers + 1]):
        count = len(list(run))
        words = f"{_device(home)}: {count} blocks"
        said = words if len(words) * LETTER < count * unit else str(count)
        more = f'fill="{_letters(home)}" font-weight="bold"'
        body += _text(ENDS + (start + count / 2) * unit, top + 15, said, "middle", more)
        start += count
    ends = (("embed", 0.0, places[0][1]), ("head", WIDTH - ENDS + 2.0, places[-1][1]))
    for name, x, home in ends:
        body += _rect(x, top, ENDS - 2, BOXES, _gpu(home), f"{name}: {_device(home)}")
        body += _text(x + ENDS / 2 - 1, top + 15, name, "middle", f'fill="{_letters(home)}"')
    for number, cut in enumerate(_cuts(plan)):
        x = ENDS + cut * unit
        body += f'<path class="cut" d="M{x:.1f},{top - 5} v{BOXES + 10}" stroke="currentColor" stroke-width="2.4"/>'
        body += _text(x, top - 8, str(cut) if number else f"cut {cut}", "middle")
    for cut in _cuts(best) if best else []:
        x = ENDS + cut * unit
        body += f'<path class="best" d="M{x:.1f},{top + BOXES + 2} l5,8 h-10 z" {_THIN}/>'
    return body


def _device(home: int | str) -> str:
    return f"GPU {home}" if isinstance(home, int) else str(home).upper()


def _color(home: int | str) -> str:
    return GPU_COLORS[home] if isinstance(home, int) else "grey"


def _gpu(home: int | str) -> str:
    return _fill(_color(home))


def _letters(home: int | str) -> str:
    return ink(_color(home))


def _end(bars: Sequence[Bar]) -> int:
    """Bytes at the right end: the limits, unless most of the room would be empty then."""
    held = max(max(bar.total, bar.best or 0, bar.measured or 0) for bar in bars)
    return min(max(bar.longest for bar in bars), FAR * held)


def _bar(bar: Bar, number: int, above: float, end: int) -> str:
    """One GPU's memory."""
    scale = (WIDTH - LEFT - RIGHT) / end
    top, high = above + number * BAR + 4, BAR - 8
    body = _rect(0, top + 1, 12, 12, _gpu(number)) + _text(17, top + 12, bar.name)
    if bar.best is not None:
        body += _rect(LEFT, top - 3, bar.best * scale, high + 6, f'class="best" {_THIN}', "what the best plan holds")
    for part in bar.parts:
        if part.size:
            sizes = ", ".join(f"{name} {size / GIB:.3f}" for name, size in part.terms)
            tip = f"{part.group.label}: {part.size / GIB:.3f} GiB ({sizes})"
            look = _fill(part.group.color, part.group.hatch)
            body += _rect(LEFT + part.start * scale, top, part.size * scale, high, look, tip)
    limit = bar.limit or 0
    edge = LEFT + min(limit, end) * scale
    line = f"M{edge:.1f},{top - 3} v{high + 6}" if limit <= end else f"M{edge - 14:.1f},{top + 7} h14 m-5,-4 l5,4 l-5,4"
    body += f'<path d="{line}" fill="none" stroke="currentColor" stroke-width="{2.4 if limit <= end else 1.4}"/>'
    if bar.measured is not None:
        body += _DIAMOND.format(LEFT + bar.measured * scale, top + high / 2 - 5)
    more = f'fill="{_OVER}" font-weight="bold"' if bar.total > limit else ""
    words = f"{bar.total / GIB:.2f} of {limit / GIB:.2f} GiB"
    return body + _text(WIDTH, top + 12, words, "end", f'class="total" {more}')


def _legend(bars: Sequence[Bar], dots: bool, top: float) -> tuple[str, float]:
    """What stands for what, in as many lines as it takes; and where they end."""
    keys = [
        (_rect(0, 0, 12, 11, _fill(part.group.color, part.group.hatch)), part.group.label) for part in bars[0].parts
    ]
    keys.append(('<path d="M6,-1 v13" stroke="currentColor" stroke-width="2.4"/>', "limit"))
    if dots:
        keys.append(('<circle cx="6" cy="6" r="2.5"/>', "block not checkpointed"))
    if bars[0].best is not None:
        keys.append((_rect(0, 0, 12, 11, _THIN), "best plan"))
    if bars[0].measured is not None:
        keys.append((_DIAMOND.format(6, 0), "measured: due where grey begins"))
    body, x = "", float(LEFT)
    for mark, label in keys:
        width = 18 + len(label) * LETTER + 10
        if x + width > WIDTH:
            x, top = float(LEFT), top + 17
        body += f'<g transform="translate({x:.1f},{top:.1f})">{mark}{_text(17, 10, label)}</g>'
        x += width
    return body, top + 17


def _time(plan: Plan, best: Plan | None, measured: Measured | None, top: float) -> tuple[str, float]:
    """Who works when in one step, and how tall the whole picture is."""
    tasks, seconds = plan.schedule, measured.seconds if measured else None
    scale = (WIDTH - LEFT - 8) / max(plan.seconds, best.seconds if best else 0, seconds or 0)
    used = [number for number, blocks in enumerate(plan.breakdown) if any(blocks.values())]
    body = ""
    for row, number in enumerate(used):
        y = top + row * TASK
        body += _rect(0, y, 12, 12, _gpu(number)) + _text(17, y + 10, f"GPU {number}")
        for kind, look in _KINDS.items():
            pieces = [(task.start, task.end) for task in tasks if task.gpu == row and task.kind == kind]
            busy = sum(end - start for start, end in pieces)
            # One path for all: a step may have a thousand pieces.
            path = "".join(_piece(LEFT + start * scale, LEFT + end * scale) for start, end in pieces)
            body += (
                f'<path transform="translate(0,{y:.1f})" d="{path}" {look}><title>{kind}: {busy:.2f} s</title></path>'
            )
    height = TASK * len(used)
    if best:
        body += f'<path class="best" d="M{LEFT + best.seconds * scale:.1f},{top - 3:.1f} v{height + 4}" {_THIN}/>'
    if seconds:
        body += _DIAMOND.format(LEFT + seconds * scale, top + height / 2 - 6)
    y = top + height + 4
    for x, (kind, look) in zip((LEFT, LEFT + 80), _KINDS.items(), strict=True):
        body += _rect(x, y, 12, 11, look) + _text(x + 17, y + 10, kind)
    words = f"{plan.seconds:.2f} s a step (predicted), GPUs busy {busy_share(tasks):.0%} of the time"
    return body + _text(WIDTH, y + 10, words, "end"), y + 18


_KINDS = {"forward": _fill("sky"), "backward": _fill("orange", "//")}


def _piece(start: float, end: float) -> str:
    return f"M{start:.1f},0v11h{max(end - start - 0.5, 0.3):.1f}v-11z"
