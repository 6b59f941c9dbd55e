"""Pictures of the model: a token on its way through it, the prefix mask, the two position rows.

    draw_model(config, token, states, guesses)    embedding, blocks, norm, head; one block opened; the token's numbers
    draw_mask(visible, context, labels)           who sees whom
    draw_positions(position_ids, context, labels) where each token stands, twice

Parts have the colours of `weights.py`. What belongs to the prompt is dark (blue), the answer light (orange), so that a
print in grey keeps them apart. All are 7.5 inches wide or less, and no letter is smaller than 9 points: 11 pixels at a
width of 700.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Polygon, Rectangle

from glmhelpers.plots.style import COLORS, describe
from glmhelpers.plots.weights import (
    ATTENTION_LOOKS,
    BLOCK_LOOKS,
    EMBEDDING_LOOK,
    HEAD_LOOK,
    MLP_LOOKS,
    NORM_LOOK,
)

WIDTH, SMALL = 7.5, 9
"""Inches of a figure; points of the smallest letters."""

SHOWN = 32
"""Numbers of a vector that a strip shows."""


def draw_model(config: Any, token: str, states: Sequence[Any], guesses: Mapping[str, float], alpha: float) -> Axes:
    """The whole model from top to bottom with one token on its way, and beside it one block opened.

    Args:
        config: a ChatGLMConfig.
        token: the token that walks, such as "token '=' (id 9)".
        states: the token's vector at each station: after the embedding, after each block but the last, after the final
            norm; what `output_hidden_states=True` gives at its place, each [H].
        guesses: the most likely next tokens -> probability.
        alpha: the factor of the residual.
    """
    _, axes = plt.subplots(figsize=(WIDTH, 6.3))
    axes.set(xlim=(0, WIDTH), ylim=(6.3, 0))
    axes.axis("off")
    last = config.num_layers - 1
    vectors = [np.asarray(state, dtype=np.float64) for state in states]
    stations: list[tuple[float, str, dict[str, Any], np.ndarray | None]] = [
        (0.95, f"embedding\n{config.vocab_size:,} rows", EMBEDDING_LOOK, vectors[0]),
        (1.7, "block 0", BLOCK_LOOKS[0], vectors[1]),
        (2.35, "block 1", BLOCK_LOOKS[1], vectors[2]),
        (3.0, f"blocks 2 to {last - 1}", {"facecolor": "white", "edgecolor": COLORS["blue"]}, vectors[last]),
        (3.65, f"block {last}", BLOCK_LOOKS[last % 2], None),
        (4.3, "final norm", NORM_LOOK, vectors[-1]),
        (5.05, f"head\n{config.vocab_size:,} scores", HEAD_LOOK, None),
    ]
    axes.text(1.2, 0.3, token, ha="center", va="center", weight="bold", bbox={"facecolor": "white", "pad": 4})
    axes.text(
        3.2, 0.36, f"its vector\n({SHOWN} of {config.hidden_size} numbers)", ha="center", fontsize=SMALL, va="center"
    )
    before = 0.45
    for height, name, look, vector in stations:
        half = 0.27 if "\n" in name else 0.2
        _arrow(axes, (1.2, before), (1.2, height - half))
        _box(axes, 1.2, height, 2.1, 2 * half, name, look)
        before = height + half
        if vector is not None:
            _strip(axes, vector, 2.55, height, 1.3)
    _arrow(axes, (1.2, before), (1.2, 5.72))
    says = "   ".join(f"{piece} {share:.0%}" for piece, share in guesses.items())
    axes.text(0.15, 5.9, f"most likely next:  {says}", va="center", weight="bold")
    zoom = [(2.25, 2.15), (4.1, 0.15), (4.1, 5.55), (2.25, 2.55)]
    axes.add_patch(Polygon(zoom, facecolor="#EEEEEE", edgecolor="none", zorder=0))
    _opened_block(axes, config, alpha)
    spreads = ", ".join(f"{vector.std():.2f}" for _, _, _, vector in stations if vector is not None)
    describe(
        axes,
        f"Left, from top to bottom: {token}, embedding, blocks 0 to {last}, final norm, head; beside them the "
        f"token's vector as coloured strips, that spread by {spreads}; below the most likely next tokens: {says}."
        f" Right, one block: norm, attention, plus {alpha:.2f} times the normed vector; norm, MLP, and the same again.",
    )
    return axes


def _opened_block(axes: Axes, config: Any, alpha: float) -> None:
    middle, side = 5.45, 7.0
    axes.add_patch(Rectangle((4.1, 0.15), 3.3, 5.4, facecolor="white", edgecolor=COLORS["grey"], zorder=0.5))
    axes.text(4.2, 0.36, "in each block", va="center", weight="bold")
    parts = (
        (1.55, 2.05, "attention: reads the tokens\nthat the mask shows", ATTENTION_LOOKS[0]),
        (3.9, 4.4, f"MLP: {config.hidden_size:,} to {config.inner_hidden_size:,}\nand back, each alone", MLP_LOOKS[0]),
    )
    _arrow(axes, (middle, 0.5), (middle, 0.75))
    for top, center, name, look in parts:
        _box(axes, middle, top - 0.62, 2.1, 0.36, "norm", NORM_LOOK)
        _arrow(axes, (middle, top - 0.44), (middle, center - 0.27))
        _box(axes, middle, center, 2.3, 0.54, name, look)
        joint = center + 0.72
        _arrow(axes, (middle, center + 0.27), (middle, joint - 0.13))
        # The enlarged residual: the normed vector goes round the part.
        corners = [middle, side, side, middle + 0.13], [top - 0.28, top - 0.28, joint, joint]
        axes.plot(*corners, color=COLORS["vermillion"], linewidth=3)
        axes.text(side - 0.12, joint - 0.1, f"× {alpha:.2f}", color=COLORS["vermillion"], weight="bold", ha="right")
        axes.plot(middle, joint, marker="o", markersize=17, markerfacecolor="white", markeredgecolor="black")
        axes.text(middle, joint, "+", ha="center", va="center_baseline", weight="bold", fontsize=13)
        _arrow(axes, (middle, joint + 0.13), (middle, joint + 0.33))
    axes.text(
        7.3, 0.36, "thick: the enlarged residual", va="center", ha="right", color=COLORS["vermillion"], fontsize=SMALL
    )


def _box(axes: Axes, x: float, y: float, width: float, height: float, name: str, look: Mapping[str, Any]) -> None:
    axes.add_patch(Rectangle((x - width / 2, y - height / 2), width, height, linewidth=1, **look))
    dark = look["facecolor"] in (COLORS["blue"], COLORS["green"])
    # Letters on a hatch need a ground of their own.
    ground = {"facecolor": look["facecolor"], "edgecolor": "none", "pad": 1.5} if look.get("hatch") else None
    axes.text(x, y, name, ha="center", va="center", fontsize=SMALL, color="white" if dark else "black", bbox=ground)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "color": "black"})


def _strip(axes: Axes, vector: np.ndarray, left: float, y: float, width: float) -> None:
    shown = vector[:SHOWN]
    extent = (left, left + width, y + 0.02, y - 0.18)
    axes.imshow(
        shown[None],
        cmap="PuOr",
        vmin=-np.abs(shown).max(),
        vmax=np.abs(shown).max(),
        extent=extent,
        aspect="auto",
        zorder=2,
    )
    axes.add_patch(
        Rectangle((left, y - 0.18), width, 0.2, fill=False, edgecolor=COLORS["grey"], linewidth=0.8, zorder=3)
    )
    axes.text(left + width / 2, y + 0.13, f"spread {vector.std():.2f}", ha="center", va="center", fontsize=SMALL)


def draw_mask(visible: np.ndarray, context: int, labels: Sequence[str]) -> Axes:
    """The prefix mask: which token (column) each token (row) sees.

    Args:
        visible: bool [L, L], True = sees.
        context: number of tokens before `<sop>`.
        labels: one short text for each token; keep to glyphs that every font has.
    """
    length, cell = len(labels), 0.245
    _, axes = plt.subplots(figsize=(min(WIDTH, cell * length + 3.1), cell * length + 1.3))
    looks = ("white", COLORS["blue"], COLORS["orange"])
    for row in range(length):
        for column in range(length):
            kind = 0 if not visible[row, column] else 1 if column < context else 2
            look: dict[str, Any] = {"facecolor": looks[kind], "edgecolor": COLORS["light"] if kind == 0 else "white"}
            axes.add_patch(Rectangle((column, row), 1, 1, gid="seen" if kind else "unseen", **look))
    axes.axhline(context, color=COLORS["black"], linewidth=1.5)
    axes.axvline(context, color=COLORS["black"], linewidth=1.5)
    axes.set(xlim=(0, length), ylim=(length, 0), aspect="equal", ylabel="this token looks ...")
    axes.set_xlabel("... at this token")
    axes.xaxis.set_label_position("top")
    places = np.arange(length) + 0.5
    axes.set_xticks(places, labels, rotation=90)
    axes.set_yticks(places, labels)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    axes.grid(False)
    names = ("does not see it", "sees it: prompt", "sees it: answer")
    handles = [
        Patch(label=name, facecolor=look, edgecolor=COLORS["grey"]) for name, look in zip(names, looks, strict=True)
    ]
    axes.legend(handles=[*handles[1:], handles[0]], loc="upper left", bbox_to_anchor=(1.01, 1), handlelength=1.2)
    describe(
        axes,
        f"A grid of {length} tokens looking at {length} tokens. The first {context} columns, the prompt, are filled in "
        "all rows: everybody sees the whole prompt. In the columns of the answer each token sees itself and what is "
        "left of it in the answer. The rows of the prompt are white there: the prompt sees nothing of the answer.",
    )
    return axes


def draw_positions(position_ids: np.ndarray, context: int, labels: Sequence[str]) -> Axes:
    """The two position rows as two stairs, each value written at its token.

    Args:
        position_ids: int [2, L].
        context: number of tokens before `<sop>`.
        labels: one short text for each token.
    """
    length = len(labels)
    _, axes = plt.subplots(figsize=(WIDTH, 3.1))
    looks = ((COLORS["blue"], "o", "where in the prompt"), (COLORS["vermillion"], "s", "where in the answer"))
    for row, (color, marker, name) in enumerate(looks):
        values, others = position_ids[row], position_ids[1 - row]
        axes.plot(range(length), values, color=color, marker=marker, markersize=4, label=f"row {row}: {name}")
        for place, value in enumerate(values):
            # The numbers stand outside: after the stairs have crossed, those of row 1 are the upper ones.
            offset = (0, 6) if (value, -row) > (others[place], row - 1) else (0, -14)
            look: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "color": color, "fontsize": SMALL}
            axes.annotate(str(value), (place, value), offset, **look)
    axes.axvline(context - 0.5, color=COLORS["black"], linewidth=1)
    top = int(position_ids.max())
    for at, side, name in ((context - 0.6, "right", "prompt"), (context - 0.4, "left", "answer")):
        axes.text(at, 1.25 * top + 1, name, ha=side, va="top", weight="bold")
    axes.set_xticks(range(length), labels, rotation=90)
    axes.set_yticks(range(0, top + 1, max(1, top // 4)))
    axes.set(ylabel="position", ylim=(-0.3 * top - 1, 1.3 * top + 1), xlim=(-0.7, length - 0.3))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    rows = [", ".join(map(str, values)) for values in position_ids.tolist()]
    describe(
        axes,
        f"Two stairs over {length} tokens, the answer begins at token {context}. Row 0 rises in the prompt, then stays:"
        f" {rows[0]}. Row 1 is 0 in the prompt, then rises: {rows[1]}.",
    )
    return axes
