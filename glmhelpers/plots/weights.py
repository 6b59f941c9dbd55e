"""Pictures of the weights: where the gigabytes are, what lies in which file, what a loader holds in RAM.

Each function draws into its own figure and returns the axes. Parts of the model keep one colour and hatch throughout,
here and in `model.py`. Embedding and head are one matrix once they are loaded, so they share a colour:

    embedding orange //   head orange ..   blocks blue and (every second) light blue   norm green
    inside a block: attention purple, MLP yellow
"""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from glmhelpers.plots.style import COLORS, describe
from glmhelpers.utils.units import GIB, file_size
from glmhelpers.weights.layout import part_bytes, part_of, published_shards, stored_bytes, tensor_shapes

EMBEDDING_LOOK = {"facecolor": COLORS["orange"], "hatch": "//", "edgecolor": "black"}
HEAD_LOOK = {"facecolor": COLORS["orange"], "hatch": "..", "edgecolor": "black"}
BLOCK_LOOKS = (
    {"facecolor": COLORS["blue"], "edgecolor": "white"},
    {"facecolor": "#66AAD7", "edgecolor": "white"},
)
NORM_LOOK = {"facecolor": COLORS["green"], "edgecolor": "white"}
ATTENTION_LOOKS = (
    {"facecolor": COLORS["purple"], "edgecolor": COLORS["grey"]},
    {"facecolor": "#E3B5CF", "edgecolor": COLORS["grey"]},
)
MLP_LOOKS = (
    {"facecolor": COLORS["yellow"], "edgecolor": COLORS["grey"]},
    {"facecolor": "#F8F2A8", "edgecolor": COLORS["grey"]},
)


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
    whole = [("embedding", head), (f"{config.num_layers} blocks", total - 2 * head), ("head", head)]
    _name_spans(axes[0], whole)
    axes[0].set_title(
        f"stored: {file_size(total)}; loaded, with the head tied to the embedding: {file_size(total - head)}"
    )
    block = {
        name.split(".")[-2]: 2 * math.prod(shape)
        for name, shape in tensor_shapes(config).items()
        if name.startswith("transformer.layers.0.") and len(shape) == 2
    }
    start = 0
    for look, size in zip((*ATTENTION_LOOKS, *MLP_LOOKS), block.values(), strict=True):
        axes[1].barh(0, size, left=start, height=0.6, linewidth=0.6, **look)
        start += size
    short = {
        "query_key_value": "attention:\nquery, key, value",
        "dense": "attention:\ndense",
        "dense_h_to_4h": "MLP: h to 4h\n(wider)",
        "dense_4h_to_h": "MLP: 4h to h\n(back again)",
    }
    inside = [(short.get(name, name), size) for name, size in block.items()]
    _name_spans(axes[1], inside)
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
    rows = [", ".join(f"{name} {file_size(size)}" for name, size in part) for part in (whole, inside)]
    describe(axes[0], f"Two bars. The whole model: {rows[0]}. One block: {rows[1]}.".replace("\n", " "))
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
    shards, ends = published_shards(config), []
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
                axes.annotate(str(number), (middle, row), ha="center", va="center", color=color, fontsize=9)
            start += size
        ends.append(start)
        axes.annotate(f" {start / 1e9:.2f}", (start / 1e9, row), va="center", fontsize=9)
    axes.set_yticks(range(len(shards)), [f"file {row + 1}" for row in range(len(shards))])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("GB (10⁹ bytes); numbers in the bars: block")
    looks: dict[str, dict[str, Any]] = {"embedding": EMBEDDING_LOOK, "blocks": BLOCK_LOOKS[0], "head": HEAD_LOOK}
    handles = [Patch(label=name, **look) for name, look in looks.items()]
    axes.legend(handles=handles, loc="lower right", ncols=3, bbox_to_anchor=(1, 1))
    files = ", ".join(f"file {row + 1} {file_size(end)}" for row, end in enumerate(ends))
    describe(
        axes, f"One bar for each file, cut into embedding, blocks and head: {files}. Most cuts go through a block."
    )
    return axes


def draw_loading(sizes: Sequence[int], limit: int, streamed: int, taken: int = 0) -> Axes:
    """Memory of the host at its highest while each file is read: whole files, or a stream of small pieces.

    Who reads whole files holds the model as far as it is filled, the file, and what is copied from it into the model.

    Args:
        sizes: bytes of the files, in order.
        limit: bytes of memory that are there.
        streamed: bytes that a streaming loader holds, always.
        taken: bytes that the system and Python hold before anything is loaded.
    """
    _, axes = plt.subplots(figsize=(7.5, 3.6))
    terms = {
        "system and Python": "grey",
        "model, filled so far": "blue",
        "one whole file": "orange",
        "its copy in the model": "sky",
    }
    peaks = [taken + sum(sizes[:place]) + 2 * size for place, size in enumerate(sizes)]
    killed = next((place for place, peak in enumerate(peaks) if peak > limit), len(sizes))
    for place, size in enumerate(sizes):
        bottom = 0.0
        for (label, color), part in zip(terms.items(), (taken, sum(sizes[:place]), size, size), strict=True):
            look: dict[str, Any] = {"color": COLORS[color], "edgecolor": "white", "alpha": 0.3 if place > killed else 1}
            axes.bar(place, part / GIB, bottom=bottom, width=0.75, label=None if place else label, **look)
            bottom += part / GIB
        axes.annotate(f"{bottom:.1f}", (place, bottom), (0, 2), textcoords="offset points", ha="center", fontsize=9)
    axes.axhline(limit / GIB, color=COLORS["black"])
    axes.annotate(f"memory of the machine: {limit / GIB:.1f}", (-0.5, limit / GIB), (0, 3), textcoords="offset points")
    axes.axhline((taken + streamed) / GIB, color=COLORS["vermillion"], linewidth=2.5, linestyle="--")
    note = f"streamed, in pieces of 16 MiB: {(taken + streamed) / GIB:.2f}"
    box = {"facecolor": "white", "edgecolor": COLORS["vermillion"], "pad": 2}
    spot = (len(sizes) - 0.55, (taken + streamed) / GIB)
    axes.annotate(note, spot, (0, 5), textcoords="offset points", ha="right", bbox=box, fontsize=9)
    share = f"{killed} of {len(sizes)} files done, {100 * killed // len(sizes)} %"
    if killed < len(sizes):
        axes.set_title(f"killed in file {killed + 1}: {share}", loc="left")
    axes.set_xticks(range(len(sizes)), [f"file {place + 1}" for place in range(len(sizes))])
    axes.set(ylabel="GiB of host memory", xlim=(-0.6, len(sizes) - 0.4), ylim=(0, 1.2 * max(max(peaks), limit) / GIB))
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper left", ncols=2)
    each = ", ".join(f"{peak / GIB:.1f}" for peak in peaks)
    describe(
        axes,
        f"Bars: GiB of host memory while each file is read whole: {each}. A line at {limit / GIB:.1f}, what the machine"
        f" has; {share} when a bar passes it. A dashed line at {(taken + streamed) / GIB:.2f}: what streaming needs.",
    )
    return axes
