"""Pictures of the real data set, from figures that were counted beforehand (`data/corpus_figures.json`).

    draw_corpus(figures, lengths)    how long its rows are, beside rows of your own; what each limit would lose of them
    draw_pieces(row)                 one row as pieces and ids, in SVG: browsers have fonts for Chinese, Python may not

The data set and its tokenizer belong to others, so the project keeps counts. `scripts/corpus_figures.py` makes them.
"""

from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import SVG
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from glmhelpers.plots.data import KINDS
from glmhelpers.plots.style import COLORS, describe
from thuglm.constants import IGNORE_INDEX

LINES = {"yours": ("orange", "-"), "chinese": ("blue", "-"), "all": ("black", "--")}
"""Whose rows -> colour and line."""

WIDTH, UNIT, MARGIN = 700, 7.2, 3.5
"""Pixels of a picture of pieces; of a letter, half of a Chinese character, at 13 px; around the text of a cell."""

MEANINGS = {"prompt": "prompt", "mark": "marks: here begins the answer", "answer": "answer: learnt"}
"""Kind of token -> what the legend below the pieces says."""


def draw_corpus(figures: Mapping[str, Any], lengths: Mapping[int, int], name: str = "alpaca_tiny.json") -> Figure:
    """Top, how long rows are: yours beside the real data set; bottom, what each limit would lose of the real one.

    Args:
        figures: what `data/corpus_figures.json` holds.
        lengths: tokens of an example of yours -> number of examples, as in `TokenReport.lengths`.
        name: of your rows.
    """
    corpora = {corpus: steps["as found"] for corpus, steps in figures["corpora"].items()}
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7.5, 6.4), height_ratios=[1, 1.15])
    _draw_shares(top, name, {int(length): count for length, count in lengths.items()}, corpora)
    _draw_lost(bottom, corpora["all"])
    real, lost = corpora["all"], []
    for cost in real["limits"]:
        lost.append(f"{cost['limit']}: {cost['dropped']:,} rows, {100 * cost['tokens_if_dropped']:.2g} % of the tokens")
    describe(
        top,
        f"Top, what share of the rows has which length: {name} has {sum(lengths.values()):,} rows, the longest of "
        f"{max(map(int, lengths)):,} tokens; the real data set {real['valid']:,}, the longest of "
        f"{max(map(int, real['lengths'])):,}. Bottom, what a limit loses of the real one: {'; '.join(lost)}.",
    )
    return figure


def _draw_shares(axes: Axes, name: str, lengths: Mapping[int, int], corpora: Mapping[str, Any]) -> None:
    rows: dict[str, tuple[str, Mapping[int, int]]] = {"yours": (name, lengths)}
    for corpus, label in (("chinese", "real, its Chinese files"), ("all", "real, all files")):
        rows[corpus] = (label, {int(length): count for length, count in corpora[corpus]["lengths"].items()})
    longest = max(max(counted) for _, counted in rows.values())
    # Twelve columns for each doubling would show the noise, two hide the shape.
    edges = np.unique(np.round(2 ** np.arange(2, np.log2(longest) + 0.26, 0.25)))
    for line, (who, (label, counted)) in enumerate(rows.items()):
        total, color = sum(counted.values()), COLORS[LINES[who][0]]
        shares = 100 * np.histogram(list(counted), edges - 0.5, weights=list(counted.values()))[0] / total
        axes.stairs(shares, edges, color=color, linestyle=LINES[who][1], linewidth=1.8)
        note = f"{label}: {total:,} rows, longest {max(counted):,}"
        axes.text(0.99, 0.96 - 0.12 * line, note, transform=axes.transAxes, ha="right", va="top", color=_ink(color))
        axes.plot([max(counted)], [0], "v", color=color, clip_on=False, markersize=7)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens of a row (each step to the right: twice as many)", ylabel="share of the rows (%)")
    ticks = 2 ** np.arange(2, int(np.log2(longest)) + 1)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlim=(4, 1.1 * longest), ylim=(0, None), title="How long are the rows? (a triangle marks the longest)")


def _draw_lost(axes: Axes, corpus: Mapping[str, Any]) -> None:
    costs = corpus["limits"]
    for place, cost in enumerate(costs):
        rows, tokens = 100 * cost["dropped"] / corpus["valid"], 100 * cost["tokens_if_dropped"]
        for part, (lost, color, hatch, note) in enumerate(
            (
                (rows, "vermillion", "//", f"{cost['dropped']:,} row{'s' * (cost['dropped'] != 1)} ({_percent(rows)})"),
                (tokens, "sky", "", f"{_percent(tokens)} of the tokens"),
            )
        ):
            at = place + 0.2 * (2 * part - 1)
            axes.barh(at, lost, height=0.38, color=COLORS[color], hatch=hatch, edgecolor="black", linewidth=0.5)
            axes.annotate(note, (lost, at), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(costs)), [str(cost["limit"]) for cost in costs])
    most = 100 * max(cost["tokens_if_dropped"] for cost in costs)
    axes.set(xlim=(0, 1.3 * max(most, 1)), ylim=(len(costs) - 0.4, -0.6), ylabel="limit (tokens)", xlabel="lost (%)")
    axes.set_title("What does a limit lose, if longer rows are dropped? (real, all files)")
    axes.grid(axis="y", visible=False)


def draw_pieces(row: Mapping[str, Any]) -> SVG:
    """A row as the tokenizer cuts it: each piece, and its id below; colours and kinds as in all pictures of tokens.

    Args:
        row: `pieces`, `input_ids` and `labels` of one length, as `data/corpus_figures.json` has one.
    """
    cells: list[str] = []
    x, y = 0.0, 0
    for piece, token, label in zip(row["pieces"], row["input_ids"], row["labels"], strict=True):
        kind = "mark" if piece in ("[gMASK]", "<sop>") else "prompt" if label == IGNORE_INDEX else "answer"
        width = UNIT * max(_units(piece), 0.85 * len(str(token))) + 2 * MARGIN
        # The answer begins a line: it is what the model writes.
        begins = kind == "answer" and cells and "answer" not in cells[-1]
        if x + width > WIDTH or begins:
            x, y = 0.0, y + 56
        cells.append(_piece_cell(piece, token, kind, x, y, width))
        x += width
    for place, (kind, meaning) in enumerate(MEANINGS.items()):
        cells.append(_box(kind, 200 * place, y + 60, 14, 14))
        cells.append(f'<text x="{200 * place + 20}" y="{y + 72}" font-size="12" text-anchor="start">{meaning}</text>')
    alt = escape(" | ".join(row["pieces"]))
    return SVG(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 80}" width="{WIDTH}" role="img" '
        f'font-family="sans-serif" text-anchor="middle"><title>{alt}</title>'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(cells)}</svg>'
    )


def _piece_cell(piece: str, token: int, kind: str, x: float, y: float, width: float) -> str:
    middle = x + width / 2
    return (
        f'<g data-kind="{kind}">{_box(kind, x + 1, y + 1, width - 2, 28)}'
        f'<text x="{middle:.1f}" y="{y + 20}" font-size="13">{escape(piece)}</text>'
        f'<text x="{middle:.1f}" y="{y + 44}" font-size="11" fill="#444444">{token}</text></g>'
    )


def _box(kind: str, x: float, y: float, width: float, height: float) -> str:
    fill = f'fill="{COLORS[KINDS[kind][0]]}" stroke="{COLORS["grey"]}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" {fill}/>'


def _units(text: str) -> int:
    """Width in letters: a Chinese character takes two."""
    return sum(1 + (letter > "\u2e7f") for letter in text)


def _percent(value: float) -> str:
    return f"{value:.1f} %" if value >= 0.95 or not value else f"{value:.2g} %"


def _ink(color: str) -> str:
    """Orange is too pale for letters."""
    return "#8A5F00" if color == COLORS["orange"] else color
