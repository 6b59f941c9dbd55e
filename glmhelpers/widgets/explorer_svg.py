"""The explorer's pictures as SVG text: made in a millisecond, sharp at any size, needing nothing but a browser.

Same colours and hatches as `plots_map`; every area also says its name and size when the pointer rests on it.
"""

from collections.abc import Mapping, Sequence
from html import escape

from glmhelpers.cost_model.step_memory import OUTSIDE, TERMS
from glmhelpers.cost_model.step_time import Task
from glmhelpers.plots.memory_bars import TERM_LOOK
from glmhelpers.plots.style import COLORS
from glmhelpers.utils.units import GIB

WIDTH, ROW, LEFT = 760, 34, 96
_STROKES = {"//": "M0,6 L6,0", "xx": "M0,0 L6,6 M0,6 L6,0", "..": "M2,3 L4,3"}


def _patterns() -> str:
    """A pattern for each term that has a hatch; colours alone need none."""
    text = ""
    for term, (color, hatch) in TERM_LOOK.items():
        if hatch:
            text += (
                f'<pattern id="hatch-{term}" width="6" height="6" patternUnits="userSpaceOnUse">'
                f'<rect width="6" height="6" fill="{COLORS[color]}"/>'
                f'<path d="{_STROKES[hatch]}" stroke="white" stroke-width="1.5"/></pattern>'
            )
    return f"<defs>{text}</defs>"


def _fill(term: str) -> str:
    color, hatch = TERM_LOOK[term]
    return f"url(#hatch-{term})" if hatch else COLORS[color]


def _svg(body: str, height: float) -> str:
    style = "font-family:sans-serif;font-size:12px;background:white;width:100%;max-width:760px"
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" style="{style}">{body}</svg>'


def bars_svg(breakdown: Sequence[Mapping[str, int]], names: Sequence[str], limits: Sequence[int]) -> str:
    """Stacked bars in GiB with limit lines, and a legend of the terms that occur.

    Args:
        breakdown: for each GPU, bytes by term.
        names: a label for each bar.
        limits: usable bytes of each GPU.
    """
    totals = [sum(terms.values()) for terms in breakdown]
    scale = (WIDTH - LEFT - 140) / max([*totals, *limits, 1])
    body = _patterns()
    shown = []
    for row, (terms, name, total, limit) in enumerate(zip(breakdown, names, totals, limits, strict=True)):
        top, x = row * ROW + 4, float(LEFT)
        body += f'<text x="{LEFT - 6}" y="{top + 18}" text-anchor="end">{escape(name)}</text>'
        for term, label in {**TERMS, **OUTSIDE}.items():
            size = terms.get(term, 0)
            if size:
                if term not in shown:
                    shown.append(term)
                body += (
                    f'<rect x="{x:.1f}" y="{top}" width="{size * scale:.1f}" height="{ROW - 10}" fill="{_fill(term)}">'
                    f"<title>{label}: {size / GIB:.3f} GiB</title></rect>"
                )
                x += size * scale
        over = total > limit
        color, weight = ("#B00000", "bold") if over else ("black", "normal")
        edge = LEFT + limit * scale
        body += (
            f'<text class="total" x="{max(x, edge) + 6:.1f}" y="{top + 17}" fill="{color}" font-weight="{weight}">'
            f"{total / GIB:.2f} of {limit / GIB:.2f} GiB</text>"
        )
        body += f'<path d="M{edge:.1f},{top - 3} v{ROW - 4}" stroke="black" stroke-width="2.5"/>'
    height = len(breakdown) * ROW + 6
    return _svg(body + _legend(shown, height), height + 18 * (len(shown) // 4 + 1) + 4)


def _legend(terms: Sequence[str], top: float) -> str:
    body, labels = "", {**TERMS, **OUTSIDE, "limit": "what may be used"}
    for place, term in enumerate([*(term for term in (*TERMS, *OUTSIDE) if term in terms), "limit"]):
        x, y = LEFT + place % 4 * 165, top + place // 4 * 18
        if term == "limit":
            body += f'<path d="M{x + 7},{y - 1:.0f} v13" stroke="black" stroke-width="2.5"/>'
        else:
            body += f'<rect x="{x}" y="{y:.0f}" width="14" height="11" fill="{_fill(term)}"/>'
        body += f'<text x="{x + 19}" y="{y + 10:.0f}">{labels[term]}</text>'
    return body


def schedule_svg(tasks: Sequence[Task], names: Sequence[str]) -> str:
    """Who works when in one step; forward plain, backward hatched. `names`: one for each row of `tasks`."""
    end = max(task.end for task in tasks)
    scale = (WIDTH - LEFT - 10) / end
    body = _patterns()
    for row, name in enumerate(names):
        body += f'<text x="{LEFT - 6}" y="{row * 26 + 17}" text-anchor="end">{escape(name)}</text>'
    for task in tasks:
        fill = COLORS["sky"] if task.kind == "forward" else "url(#hatch-activations)"
        x, width = LEFT + task.start * scale, (task.end - task.start) * scale
        body += (
            f'<rect x="{x:.1f}" y="{task.gpu * 26 + 2}" width="{max(width - 0.6, 0.3):.1f}" height="22" fill="{fill}">'
            f"<title>{task.kind}, micro-batch {task.micro_batch}: {task.start:.2f} to {task.end:.2f} s</title></rect>"
        )
    busy = sum(task.end - task.start for task in tasks) / (end * len(names))
    height = len(names) * 26
    text = f"about {end:.2f} s a step, GPUs busy {busy:.0%} of the time (plain: forward, hatched: backward)"
    body += f'<text x="{LEFT}" y="{height + 16}">{text}</text>'
    return _svg(body, height + 22)
