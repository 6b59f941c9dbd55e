"""Pictures of notebook 01: where the gigabytes are, what lies in which file, the prefix mask, the two positions.

Each function draws into its own figure and returns the axes. Parts of the model keep one colour and hatch throughout:

    embedding sky //    blocks blue and (every second) light blue    norm green    head orange ..
"""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from glmhelpers.plots.style import COLORS
from glmhelpers.utils.units import file_size
from glmhelpers.weights.layout import part_bytes, part_of, published_shards, stored_bytes, tensor_shapes

EMBEDDING_LOOK = {"facecolor": COLORS["sky"], "hatch": "//", "edgecolor": "white"}
HEAD_LOOK = {"facecolor": COLORS["orange"], "hatch": "..", "edgecolor": "white"}
BLOCK_LOOKS = (
    {"facecolor": COLORS["blue"], "edgecolor": "white"},
    {"facecolor": "#66AAD7", "edgecolor": "white"},
)
NORM_LOOK = {"facecolor": COLORS["green"], "edgecolor": "white"}


def _look(part: str) -> dict[str, Any]:
    if part == "transformer.word_embeddings":
        return EMBEDDING_LOOK
    if part == "lm_head":
        return HEAD_LOOK
    if part == "transformer.final_layernorm":
        return NORM_LOOK
    return BLOCK_LOOKS[int(part.rpartition(".")[2]) % 2]


def draw_parts(config: Any) -> np.ndarray:
    """Two pictures: the whole model part by part, and one block tensor by tensor; float16, in bytes.

    Args:
        config: a ChatGLMConfig.
    """
    _, axes = plt.subplots(2, 1, figsize=(7.5, 4.1))
    sizes, start = part_bytes(config), 0
    for part, size in sizes.items():
        axes[0].barh(0, size, left=start, height=0.6, linewidth=0.6, **_look(part))
        start += size
    total, head = sum(sizes.values()), sizes["lm_head"]
    _name_spans(axes[0], [("embedding", head), (f"{config.num_layers} blocks", total - 2 * head), ("head", head)])
    axes[0].set_title(
        f"stored: {file_size(total)}; loaded, with the head tied to the embedding: {file_size(total - head)}"
    )
    block = {
        name.split(".")[-2]: 2 * math.prod(shape)
        for name, shape in tensor_shapes(config).items()
        if name.startswith("transformer.layers.0.") and len(shape) == 2
    }
    start = 0
    for place, size in enumerate(block.values()):
        axes[1].barh(0, size, left=start, height=0.6, linewidth=0.6, **BLOCK_LOOKS[place % 2])
        start += size
    short = {
        "query_key_value": "attention:\nquery, key, value",
        "dense": "attention:\ndense",
        "dense_h_to_4h": "MLP: h to 4h\n(wider)",
        "dense_4h_to_h": "MLP: 4h to h\n(back again)",
    }
    _name_spans(axes[1], [(short.get(name, name), size) for name, size in block.items()])
    rest = sizes["transformer.layers.0"] - sum(block.values())
    axes[1].set_title(
        f"one block: {file_size(sizes['transformer.layers.0'])} in four matrices (biases and norms: {file_size(rest)})"
    )
    for axis in axes:
        axis.set_yticks([])
        axis.set_xticks([])
        axis.set_ylim(-0.8, 0.35)
        axis.grid(False)
        for spine in axis.spines.values():
            spine.set_visible(False)
    return axes


def _name_spans(axes: Axes, spans: list[tuple[str, int]]) -> None:
    start = 0
    for name, size in spans:
        axes.annotate(f"{name}\n{file_size(size)}", (start + size / 2, -0.36), ha="center", va="top", fontsize=9)
        start += size


def draw_shards(config: Any) -> Axes:
    """One bar for each published file, from the first tensor to the last; blocks are cut where a file is full.

    Args:
        config: a ChatGLMConfig.
    """
    shards = published_shards(config)
    _, axes = plt.subplots(figsize=(7.5, 0.36 * len(shards) + 1.1))
    for row, shapes in enumerate(shards):
        start = 0
        parts: dict[str, int] = {}
        for name, shape in shapes.items():
            parts[part_of(name)] = parts.get(part_of(name), 0) + stored_bytes(name, shape)
        for part, size in parts.items():
            axes.barh(row, size / 1e9, left=start / 1e9, height=0.7, linewidth=0.6, **_look(part))
            if ".layers." in part and size > 0.05 * sum(parts.values()):
                number = int(part.rpartition(".")[2])
                middle, color = (start + size / 2) / 1e9, "black" if number % 2 else "white"
                axes.annotate(str(number), (middle, row), ha="center", va="center", color=color, fontsize=8)
            start += size
        axes.annotate(f" {start / 1e9:.2f}", (start / 1e9, row), va="center", fontsize=9)
    axes.set_yticks(range(len(shards)), [f"file {row + 1}" for row in range(len(shards))])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("GB (10⁹ bytes); numbers in the bars: block")
    looks: dict[str, dict[str, Any]] = {"embedding": EMBEDDING_LOOK, "blocks": BLOCK_LOOKS[0], "head": HEAD_LOOK}
    handles = [Patch(label=name, **look) for name, look in looks.items()]
    axes.legend(handles=handles, loc="lower right", ncols=3, bbox_to_anchor=(1, 1))
    return axes


def draw_mask(visible: np.ndarray, context: int, labels: Sequence[str]) -> Axes:
    """The prefix mask: which token (column) each token (row) sees.

    Args:
        visible: bool [L, L], True = sees.
        context: number of tokens before `<sop>`.
        labels: one short text for each token; keep to glyphs that every font has.
    """
    length = len(labels)
    _, axes = plt.subplots(figsize=(0.28 * length + 2.6, 0.28 * length + 1.2))
    for row in range(length):
        for column in range(length):
            if visible[row, column]:
                prompt = column < context
                look: dict[str, Any] = {
                    "facecolor": COLORS["sky" if prompt else "orange"],
                    "hatch": "" if prompt else "//",
                }
                axes.add_patch(Rectangle((column, row), 1, 1, edgecolor="white", **look))
    axes.axhline(context, color=COLORS["black"], linewidth=1)
    axes.axvline(context, color=COLORS["black"], linewidth=1)
    axes.set(xlim=(0, length), ylim=(length, 0), aspect="equal", xlabel="token that is seen", ylabel="token that looks")
    places = np.arange(length) + 0.5
    axes.set_xticks(places, labels, rotation=90)
    axes.set_yticks(places, labels)
    axes.grid(False)
    handles = [
        Patch(label="prompt, seen by everybody", facecolor=COLORS["sky"]),
        Patch(label="answer, seen from itself on", facecolor=COLORS["orange"], hatch="//", edgecolor="white"),
    ]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1))
    return axes


def draw_positions(position_ids: np.ndarray, context: int, labels: Sequence[str]) -> Axes:
    """The two position rows as two stairs, each value written at its token.

    Args:
        position_ids: int [2, L].
        context: number of tokens before `<sop>`.
        labels: one short text for each token.
    """
    length = len(labels)
    _, axes = plt.subplots(figsize=(0.42 * length + 2.6, 2.6))
    looks = ((COLORS["blue"], "o", "where in the prompt"), (COLORS["vermillion"], "s", "where in the answer"))
    for row, (color, marker, name) in enumerate(looks):
        values, others = position_ids[row], position_ids[1 - row]
        axes.plot(range(length), values, color=color, marker=marker, markersize=4, label=f"row {row}: {name}")
        for place, value in enumerate(values):
            # The numbers stand outside: after the stairs have crossed, those of row 1 are the upper ones.
            offset = (0, 6) if (value, -row) > (others[place], row - 1) else (0, -13)
            look: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "color": color, "fontsize": 8}
            axes.annotate(str(value), (place, value), offset, **look)
    axes.axvline(context - 0.5, color=COLORS["black"], linewidth=1)
    axes.set_xticks(range(length), labels, rotation=90)
    top = int(position_ids.max())
    axes.set(ylabel="position", ylim=(-0.25 * top - 1, 1.25 * top + 1))
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1))
    return axes
