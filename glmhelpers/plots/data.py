"""Pictures of the data: the report, the lengths, one example as the model sees it, a padded batch.

    draw_report(report)            what became of the rows of each file
    draw_lengths(lengths, limit)   how long the examples are, where the cut is, what each limit costs
    draw_example(example, ...)     tokens, labels, both position rows, and the prefix mask
    draw_batch(batch, ...)         prompt, targets and padding of each row

Kinds of tokens have one colour and one sign in all pictures: prompt, mark ([gMASK] and <sop>), answer, padding.
"""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from glmhelpers.data.report import Report
from glmhelpers.plots.style import COLORS, cjk_font, describe, fill
from glmhelpers.tokens.lengths import limit_costs, quantile
from thuglm.constants import IGNORE_INDEX
from thuglm.prefix_mask import make_position_ids, make_visible

KINDS = {
    "prompt": ("sky", ""),
    "mark": ("yellow", "xx"),
    "answer": ("orange", "//"),
    "padding": ("light", ".."),
}
"""Kind of token -> colour, hatch. Black text can be read on all of them."""

WIDTH, LINE = 7.5, 0.28
"""Inches of a figure, and of a row of tokens in it."""

LETTERS, SMALL, EM = 9.5, 7.2, 0.74
"""Points of a token's text where its cell has room, and where it has little; width of a letter in its size."""

REASON_LOOKS = (("vermillion", "//"), ("orange", ".."), ("purple", "xx"), ("yellow", "\\\\"), ("dark", "--"))


def draw_report(report: Report, axes: Axes | None = None) -> Axes:
    """One bar for each file that lost a row or is no data, one for all others: which share of its rows is valid.

    Args:
        report: from `convert_alpaca`.
        axes: to draw into; a new figure if None.
    """
    named = [file for file in report.files if file.status != "ok" or file.rejected][:20]
    others = [file for file in report.files if file not in named]
    bars = [(_short(report.name_of(file)), file.status, file.rows, file.valid, file.rejected) for file in named]
    if others:
        rows, valid = sum(file.rows for file in others), sum(file.valid for file in others)
        gone = sum((file.rejected for file in others), type(report.rejected)())
        bars.append((f"{len(others)} other files", "ok" if rows == valid else "", rows, valid, gone))
    axes = axes or plt.subplots(figsize=(7.5, 1.2 + 0.32 * len(bars)))[1]
    reasons = [reason for reason, _ in report.rejected.most_common()]
    looks = {reason: REASON_LOOKS[place % len(REASON_LOOKS)] for place, reason in enumerate(reasons)}
    for place, (_, status, rows, valid, rejected) in enumerate(bars):
        parts = [(valid, "blue", "")] + [(rejected[reason], *looks[reason]) for reason in reasons]
        left = 0.0
        for count, color, hatch in parts:
            width = 100 * count / max(rows, 1)
            axes.barh(place, width, left=left, height=0.7, **fill(color, hatch))
            left += width
        note = f"{valid:,} of {rows:,}  {status}" if rows else status
        axes.text(101, place, note, va="center", fontsize=9)
    axes.set(xlim=(0, 100), xlabel="share of the file's rows (%)", ylim=(len(bars) - 0.4, -0.6))
    axes.set_yticks(range(len(bars)), [_plain(name) for name, *_ in bars])
    axes.grid(axis="y", visible=False)
    handles = [Patch(label="written", **fill("blue"))]
    handles += [Patch(label=reason, **fill(*look)) for reason, look in looks.items()]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)
    # The title stands above the lines of the legend.
    lines = -(-len(handles) // 3)
    title = f"{report.rows:,} rows found, {report.rows_valid:,} written"
    axes.set_title(title, pad=8 + 17 * lines)
    notes = "; ".join(f"{name} {valid} of {rows} {status}".rstrip() for name, status, rows, valid, _ in bars)
    describe(axes, f"Bars: what share of each file's rows is written, and why others are not. {title}. {notes}.")
    return axes


def draw_lengths(lengths: Mapping[int, int], limit: int, limits: tuple[int, ...] = ()) -> Figure:
    """Above, how many examples have which length, with the cut line; below, what each limit would lose.

    Args:
        lengths: tokens of an example -> number of examples.
        limit: the limit that was chosen, in tokens.
        limits: limits to label below; by default half of, twice, and the chosen one.
    """
    figure, (above, below) = plt.subplots(2, 1, figsize=(WIDTH, 5.6), sharex=True)
    # A few very long examples would squeeze all others to one side; their number is written beside the line.
    usual, longest = quantile(lengths, 0.995), max(lengths)
    top = int(max(longest + 1 if longest < 2 * usual else usual, 1.25 * limit))
    # One edge is the limit, so that no bar is half of each.
    step = max(1, round(limit / max(1, round(40 * limit / top))))
    edges = np.arange(limit % step - step, top + step, step)
    values, counts = list(lengths), list(lengths.values())
    for bar in above.hist(values, bins=edges + 0.5, weights=counts, color=COLORS["blue"])[2]:
        if bar.get_x() >= limit:
            bar.set(**fill("vermillion", "//"))
    above.axvline(limit + 0.5, color=COLORS["black"], linestyle="--")
    chosen = limit_costs(lengths, [limit])[0]
    above.set(xlabel="tokens of an example", ylabel="examples", title="Lengths and the cut line", xlim=(0, top))
    above.tick_params(labelbottom=True)
    # Where there is room: right of the line, or between it and most of the bars, or left of them.
    place, side = (0.97, "right") if limit < 0.6 * top else (0.03, "left")
    if side == "left" and max(lengths, key=lengths.__getitem__) < 0.5 * limit:
        place, side = limit / top - 0.01, "right"
    above.text(
        place,
        0.95,
        f"limit {limit}\n{chosen.kept:,} fit\n{chosen.dropped:,} are longer\nlongest {longest:,} (triangle)",
        transform=above.transAxes,
        ha=side,
        va="top",
    )
    # One long example is no bar that can be seen.
    above.plot([min(longest, top)], [0], "v" if longest <= top else ">", color=COLORS["black"], clip_on=False)
    _draw_costs(below, lengths, top, limits or (limit // 2, limit, 2 * limit))
    describe(
        above,
        f"Above, how many examples have which length: {chosen.kept:,} fit into the limit of {limit} tokens, "
        f"{chosen.dropped:,} are longer, the longest has {longest:,} (a triangle). Below, what a limit from 1 to {top} "
        f"loses; dropping at {limit} loses {chosen.tokens_if_dropped:.1%} of the tokens.",
    )
    return figure


def _draw_costs(axes: Axes, lengths: Mapping[int, int], top: int, limits: tuple[int, ...]) -> None:
    grid = np.unique(np.linspace(1, top, 80, dtype=int)).tolist()
    costs, examples = limit_costs(lengths, grid), sum(lengths.values())
    curves = {
        "examples dropped": ([100 * cost.dropped / examples for cost in costs], "vermillion", "-"),
        "tokens lost by dropping": ([100 * cost.tokens_if_dropped for cost in costs], "blue", "--"),
        "tokens lost by cutting": ([100 * cost.tokens_if_cut for cost in costs], "green", ":"),
    }
    for label, (lost, color, line) in curves.items():
        axes.plot(grid, lost, line, color=COLORS[color], label=label)
    lines = ["examples dropped at limit"]
    for cost in limit_costs(lengths, limits):
        share = 100 * cost.dropped / examples
        lines.append(f"{cost.limit}: {share:.1f} %")
        if cost.limit <= top:
            axes.plot(cost.limit, share, "o", color=COLORS["vermillion"])
    axes.text(0.98, 0.62, "\n".join(lines), transform=axes.transAxes, ha="right", va="top", fontsize=9)
    axes.set(xlabel="limit (tokens)", ylabel="lost (%)", title="What a limit costs", ylim=(-3, 103), xlim=(0, top))
    axes.legend(loc="upper right")


def draw_example(example: Mapping[str, list[int]], tokenizer: Any, config: Any) -> Figure:
    """One example as the model sees it: a column for each token, and the prefix mask below.

    Args:
        example: `input_ids` and `labels` of one length L (up to about 40 tokens stay readable).
        tokenizer: gives the pieces; ids are drawn where no font has their characters.
        config: a ChatGLMConfig with the tokenizer's ids.
    """
    ids, labels = example["input_ids"], example["labels"]
    length, batch = len(ids), torch.tensor([ids])
    positions = make_position_ids(batch, config)[0].tolist()
    visible = make_visible(batch, config)[0].reshape(length, length).numpy()
    kinds = _kinds(batch[0], torch.ones(length), torch.tensor(labels), config)
    pieces = [_piece(token, tokenizer) for token in ids]
    targets = ["" if label == IGNORE_INDEX else _piece(label, tokenizer) for label in labels]
    # Points from side to side of a cell: the axes take about 0.84 of the figure, and 72 points are an inch.
    room = 0.84 * 72 * WIDTH / length
    # Where words are too wide for their cells, they are turned, and their rows are as high as the longest.
    turned = room < max(_letters(_in_lines(piece)) for piece in pieces) * EM * SMALL
    tall = max(_letters(piece) for piece in pieces) * EM * LETTERS / 72 / LINE if turned else 1.0
    heights = [tall, 1.0, 1.0, tall]
    figure, (top, bottom) = plt.subplots(
        2,
        1,
        figsize=(WIDTH, 1.1 + LINE * sum(heights) + min(LINE * length, 7)),
        height_ratios=[LINE * sum(heights), min(LINE * length, 7)],
        sharex=True,
    )
    table = [("token", pieces), ("position row 0", positions[0]), ("position row 1", positions[1]), ("label", targets)]
    middles = [sum(heights[:line]) + heights[line] / 2 - 0.5 for line in range(len(table))]
    for line, (_, cells) in enumerate(table):
        for place, (cell, kind) in enumerate(zip(cells, kinds, strict=True)):
            filled = line == 0 or (line == 3 and cell)
            _cell(top, place, middles[line], kind if filled else None, height=heights[line], hatched=False)
            on_side = turned and line in (0, 3)
            text = str(cell) if on_side else _in_lines(str(cell))
            size = min(LETTERS, room if on_side else room / (EM * max(1, _letters(text))))
            look: dict[str, Any] = {"fontsize": size, "rotation": 90 * on_side, "fontfamily": _fonts()}
            if text:
                top.text(place, middles[line], text, ha="center", va="center", linespacing=0.9, **look)
    top.set(xlim=(-0.5, length - 0.5), ylim=(sum(heights) - 0.5, -0.5))
    top.set_title("Tokens, positions, labels", pad=24)
    top.set_yticks(middles, [name for name, _ in table], fontsize=LETTERS)
    top.legend(handles=_legend(set(kinds)), loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)
    for row in range(length):
        for column in range(length):
            _cell(bottom, column, row, kinds[column] if visible[row, column] else None)
    bottom.set(ylim=(length - 0.5, -0.5), title="Who sees whom: each row is a token that looks, filled = it sees")
    bottom.set_yticks(range(length), pieces, fontfamily=_fonts(), fontsize=min(LETTERS, room))
    bottom.set_xticks([])
    for axes in (top, bottom):
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    start = targets.index(next(filter(None, targets), targets[-1]))
    describe(
        top,
        f"Top, a table of {length} tokens, {' '.join(pieces)}, with position rows {positions[0]} and {positions[1]}; "
        f"the last {length - start} have a label, their own id. Bottom, the prefix mask: every token sees the whole "
        f"prompt; a token of the answer also sees itself and what is left of it in the answer.",
    )
    return figure


def draw_batch(batch: Mapping[str, torch.Tensor], config: Any, axes: Axes | None = None) -> Axes:
    """Each row of a batch as a strip: prompt, [gMASK] <sop>, targets, padding.

    Args:
        batch: from the collator, each tensor [B, L].
        config: a ChatGLMConfig with the tokenizer's ids.
        axes: to draw into; a new figure if None.
    """
    rows, width = batch["input_ids"].shape
    axes = axes or plt.subplots(figsize=(WIDTH, 1.3 + 0.3 * rows))[1]
    found: set[str] = set()
    for row in range(rows):
        kinds = _kinds(batch["input_ids"][row], batch["attention_mask"][row], batch["labels"][row], config)
        found |= set(kinds)
        start = 0
        for place in range(1, width + 1):
            if place == width or kinds[place] != kinds[start]:
                _cell(axes, start, row, kinds[start], width=place - start)
                start = place
    real, targets = int(batch["attention_mask"].sum()), int((batch["labels"] != IGNORE_INDEX).sum())
    axes.set(xlim=(-0.5, width - 0.5), ylim=(rows - 0.5, -0.5), xlabel="place in the row", ylabel="row of the batch")
    axes.set_yticks(range(rows))
    axes.grid(visible=False)
    share = 100 * (1 - real / (rows * width))
    title = f"{rows} x {width} tokens: {targets:,} targets, {share:.0f} % padding"
    axes.set_title(title, pad=24)
    describe(axes, f"{title}. Each row is a strip: prompt, [gMASK] and <sop>, answer, then padding up to the longest.")
    axes.legend(handles=_legend(found), loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2)
    return axes


def _kinds(ids: torch.Tensor, real: torch.Tensor, labels: torch.Tensor, config: Any) -> list[str]:
    marks = {config.bos_token_id, config.gmask_token_id, config.mask_token_id}
    kinds = []
    for token, is_real, label in zip(ids.tolist(), real.tolist(), labels.tolist(), strict=True):
        kind = "mark" if token in marks else "prompt" if label == IGNORE_INDEX else "answer"
        kinds.append(kind if is_real else "padding")
    return kinds


def _cell(
    axes: Axes,
    column: int,
    row: float,
    kind: str | None,
    width: int = 1,
    height: float = 1,
    hatched: bool = True,
) -> None:
    """`column` is the first of `width`, `row` the middle. A hatch behind text would make it hard to read."""
    color, hatch = (COLORS[KINDS[kind][0]], KINDS[kind][1] if hatched else "") if kind else ("white", "")
    look: dict[str, Any] = {"facecolor": color, "hatch": hatch, "edgecolor": _edge(hatch), "linewidth": 0.5}
    axes.add_patch(Rectangle((column - 0.5, row - height / 2), width, height, **look))


def _edge(hatch: str) -> str:
    """Hatches take the edge's colour: it must stand out where there is one, and not where there is none."""
    return "black" if hatch else COLORS["grey"]


def _letters(text: str) -> int:
    """Letters of the longest line; a Chinese one counts as two."""
    return max(sum(1 + (letter > "\u2e7f") for letter in line) for line in text.split("\n"))


def _in_lines(piece: str) -> str:
    return piece.replace("[gMASK]", "[g\nMASK]")


def _legend(kinds: set[str]) -> list[Patch]:
    names = {
        "prompt": "prompt: seen by all",
        "mark": "[gMASK] <sop>",
        "answer": "answer: learnt",
        "padding": "padding",
    }
    return [
        Patch(facecolor=COLORS[color], hatch=hatch, edgecolor=_edge(hatch), label=names[kind])
        for kind, (color, hatch) in KINDS.items()
        if kind in kinds
    ]


def _piece(token: int, tokenizer: Any) -> str:
    piece = tokenizer.convert_ids_to_tokens(token).replace("▁", "_")
    return piece if cjk_font() or piece.isascii() else str(token)


def _short(name: str, most: int = 40) -> str:
    """The end of a long path, which tells more than its beginning."""
    return name if len(name) <= most else f"...{name[3 - most :]}"


def _plain(name: str) -> str:
    return name if cjk_font() or name.isascii() else name.encode("ascii", "replace").decode()


def _fonts() -> list[str]:
    return [font for font in ("DejaVu Sans", cjk_font()) if font]
