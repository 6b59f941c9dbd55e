"""Pictures of device maps: what each GPU holds, the blocks in a row, the schedule, memory against the cut.

Every term has one colour and one hatch in all pictures, bottom to top in the order of `memory.TERMS`:

    weights  embedding  lora  adam  gradients  masks  inputs  activations  block  loss  transfer  cache  workspace

All functions draw into given axes, or make a figure, and return the axes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from glmhelpers.cost_model.step_memory import OUTSIDE, TERMS
from glmhelpers.cost_model.step_time import Task, busy_share
from glmhelpers.plots.style import COLORS
from glmhelpers.utils.units import GIB, MIB

TERM_LOOK = {
    "weights": ("blue", ""),
    "embedding": ("sky", ""),
    "lora": ("green", ""),
    "adam": ("green", "xx"),
    "gradients": ("green", ".."),
    "masks": ("grey", ""),
    "inputs": ("orange", ""),
    "activations": ("orange", "//"),
    "block": ("vermillion", ""),
    "loss": ("purple", ""),
    "transfer": ("yellow", ""),
    "cache": ("yellow", ".."),
    "workspace": ("grey", "//"),
    "slack": ("light", ""),
    "context": ("light", "//"),
}
"""Colour name and hatch of every term."""

GPU_COLORS = ("blue", "orange", "green", "purple", "sky", "vermillion", "yellow", "grey")
GPU_HATCHES = ("", "//", "..", "\\\\", "xx", "--", "++", "oo")
"""Colour and hatch of GPU 0, 1, ... where GPUs are told apart."""


def device_name(device: int | str) -> str:
    """ "GPU 0" or "CPU"."""
    return f"GPU {device}" if isinstance(device, int) else str(device).upper()


def draw_memory(
    breakdown: Sequence[Mapping[str, int]],
    names: Sequence[str] | None = None,
    limits: Sequence[int] | None = None,
    axes: Axes | None = None,
    unit: int = GIB,
) -> Axes:
    """One horizontal stacked bar for each GPU, with its limit as a line.

    Args:
        breakdown: for each GPU, bytes by term; keys of memory.TERMS and memory.OUTSIDE.
        names: a label for each bar; "GPU 0", "GPU 1", ... by default.
        limits: usable bytes of each GPU.
        axes: where to draw.
        unit: bytes in a unit of the axis: GIB, or MIB for the tiny model.
    """
    axes = axes or plt.subplots(figsize=(8, 1.3 + 0.6 * len(breakdown)))[1]
    names = names or [device_name(index) for index in range(len(breakdown))]
    labels = {**TERMS, **OUTSIDE}
    left = [0.0] * len(breakdown)
    for term, label in labels.items():
        sizes = [terms.get(term, 0) / unit for terms in breakdown]
        if not any(sizes):
            continue
        color, hatch = TERM_LOOK[term]
        axes.barh(
            names, sizes, left=left, color=COLORS[color], hatch=hatch, edgecolor="white", linewidth=0.5, label=label
        )
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for place, total in enumerate(left):
        inside = limits is not None and total * unit > 0.85 * limits[place]
        axes.annotate(f"{total:.2f}", (total, place), (-4 if inside else 4, 0), textcoords="offset points",
                      va="center", ha="right" if inside else "left", weight="bold")  # fmt: skip
    for place, limit in enumerate(limits or []):
        axes.plot([limit / unit] * 2, [place - 0.45, place + 0.45], color=COLORS["black"], linewidth=2)
    if limits is None:
        axes.set_xlim(0, 1.15 * max(left))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("GiB" if unit == GIB else "MiB")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.05), fontsize=8)
    return axes


def draw_plan(plan: Any, axes: Axes | None = None, unit: int = GIB) -> Axes:
    """`draw_memory` of a plan, with allocator slack, CUDA context and limits."""
    names = [f"GPU {index} ({gpu.name})" for index, gpu in enumerate(plan.gpus)]
    return draw_memory(plan.with_outside, names, plan.usable_bytes, axes, unit)


def draw_terms(plan: Any, terms: Sequence[str], axes: Axes | None = None) -> Axes:
    """`draw_plan` with only some terms: the picture as far as it has been explained."""
    some = [{term: sizes.get(term, 0) for term in terms} for sizes in plan.with_outside]
    names = [f"GPU {index} ({gpu.name})" for index, gpu in enumerate(plan.gpus)]
    return draw_memory(some, names, plan.usable_bytes, axes)


def draw_rest(plan: Any, axes: Axes | None = None) -> Axes:
    """What a training step adds to the frozen weights, in MiB: all terms but the weights and the embedding."""
    rest = [
        {term: size for term, size in sizes.items() if term not in ("weights", "embedding")} for sizes in plan.breakdown
    ]
    names = [f"GPU {index} ({gpu.name})" for index, gpu in enumerate(plan.gpus)]
    return draw_memory(rest, names, axes=axes, unit=MIB)


def draw_map(device_map: Mapping[str, int | str], axes: Axes | None = None) -> Axes:
    """The model as a row of boxes, embedding to head, coloured and hatched by GPU."""
    layers = sum(name.startswith("transformer.layers.") for name in device_map)
    boxes = [("embed", device_map["transformer.word_embeddings"])]
    boxes += [(str(layer), device_map[f"transformer.layers.{layer}"]) for layer in range(layers)]
    boxes += [("norm", device_map["transformer.final_layernorm"]), ("head", device_map["lm_head"])]
    axes = axes or plt.subplots(figsize=(8.5, 1.1))[1]
    place = 0.0
    for label, device in boxes:
        width = 1.0 if label.isdigit() else 2.2
        look = device if isinstance(device, int) else 7
        axes.add_patch(
            Rectangle((place, 0), width - 0.08, 1, facecolor=COLORS[GPU_COLORS[look % 8]], hatch=GPU_HATCHES[look % 8],
                      edgecolor="white", linewidth=0)
        )  # fmt: skip
        axes.text(place + width / 2 - 0.04, -0.18, label, ha="center", va="top", fontsize=7)
        place += width
    devices = sorted({device for _, device in boxes}, key=str)
    axes.legend(
        handles=[
            Patch(facecolor=COLORS[GPU_COLORS[(d if isinstance(d, int) else 7) % 8]],
                  hatch=GPU_HATCHES[(d if isinstance(d, int) else 7) % 8], edgecolor="white", label=device_name(d))
            for d in devices
        ],
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(devices), borderaxespad=0.2,
    )  # fmt: skip
    axes.set(xlim=(0, place), ylim=(-0.5, 1))
    axes.axis("off")
    return axes


def draw_schedule(tasks: Sequence[Task], axes: Axes | None = None, until: float | None = None, title: str = "") -> Axes:
    """Who works when: one row for each GPU, one bar for each micro-batch, forward light and backward hatched.

    Args:
        tasks: from step_time.schedule.
        axes: where to draw.
        until: right end of the axis in seconds, to compare two schedules.
        title: what it is, before the numbers.
    """
    count = 1 + max(task.gpu for task in tasks)
    axes = axes or plt.subplots(figsize=(8, 0.9 + 0.5 * count))[1]
    for task in tasks:
        forward = task.kind == "forward"
        axes.barh(task.gpu, task.end - task.start, left=task.start, height=0.8, edgecolor="white", linewidth=0.6,
                  color=COLORS["sky" if forward else "orange"], hatch="" if forward else "//")  # fmt: skip
    end = max(task.end for task in tasks)
    axes.set_yticks(range(count), [device_name(index) for index in range(count)])
    numbers = f"{end:.1f} s, GPUs busy {busy_share(tasks):.0%} of the time"
    axes.set(xlim=(0, until or end), xlabel="seconds", title=f"{title}: {numbers}" if title else numbers)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(
        handles=[Patch(facecolor=COLORS["sky"], label="forward"),
                 Patch(facecolor=COLORS["orange"], hatch="//", edgecolor="white", label="backward")],
        loc="upper left", bbox_to_anchor=(1.0, 1.05),
    )  # fmt: skip
    return axes


def draw_cut_curve(
    cuts: Sequence[int], peaks: Sequence[Sequence[int]], limit: int | None = None, axes: Axes | None = None
) -> Axes:
    """Peak of each GPU against the number of blocks on the first one.

    Args:
        cuts: blocks on GPU 0.
        peaks: for each cut, bytes on each GPU.
        limit: usable bytes of a GPU, drawn as a line.
        axes: where to draw.
    """
    axes = axes or plt.subplots()[1]
    for gpu, style in zip(range(len(peaks[0])), ("-o", "--s", ":^", "-.v"), strict=False):
        axes.plot(cuts, [row[gpu] / GIB for row in peaks], style, markersize=4, label=device_name(gpu),
                  color=COLORS[GPU_COLORS[gpu]])  # fmt: skip
    best = min(range(len(cuts)), key=lambda at: max(peaks[at]))
    axes.axvline(cuts[best], color=COLORS["grey"], linewidth=1)
    axes.annotate(f"cut {cuts[best]}", (cuts[best], axes.get_ylim()[0]), (4, 4), textcoords="offset points")
    if limit:
        axes.axhline(limit / GIB, color=COLORS["black"], linewidth=2, label="limit")
    axes.set(xlabel="blocks on GPU 0", ylabel="peak, GiB")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return axes


def draw_timeline(timeline: Sequence[tuple[str, int]], axes: Axes | None = None) -> Axes:
    """What one block holds, step by step, while it is run again and differentiated (BlockCost.timeline)."""
    axes = axes or plt.subplots(figsize=(7.5, 2.8))[1]
    sizes = [size / 2**20 for _, size in timeline]
    back = next(place for place, (name, _) in enumerate(timeline) if name.endswith("back"))
    colors = [COLORS["sky"] if place < back else COLORS["orange"] for place in range(len(sizes))]
    hatches = ["" if place < back else "//" for place in range(len(sizes))]
    axes.bar(range(len(sizes)), sizes, color=colors, hatch=hatches, edgecolor="white")
    axes.set_xticks(range(len(sizes)), [name for name, _ in timeline], rotation=30, ha="right")
    axes.set(ylabel="MiB", title="one block: run again, then undone")
    return axes


def draw_compared(
    names: Sequence[str], predicted: Sequence[int], measured: Sequence[int], axes: Axes | None = None
) -> Axes:
    """Predicted and measured peaks side by side, with the difference in percent."""
    axes = axes or plt.subplots(figsize=(8, 1 + 0.4 * len(names)))[1]
    rows = range(len(names))
    axes.barh(
        [row - 0.2 for row in rows], [size / GIB for size in predicted], 0.38, color=COLORS["sky"], label="predicted"
    )
    axes.barh([row + 0.2 for row in rows], [size / GIB for size in measured], 0.38, color=COLORS["blue"], hatch="//",
              edgecolor="white", label="measured")  # fmt: skip
    for row, (guess, truth) in enumerate(zip(predicted, measured, strict=True)):
        axes.text(max(guess, truth) / GIB, row, f" {guess / truth - 1:+.2%}", va="center")
    axes.set_yticks(rows, names)
    axes.invert_yaxis()
    axes.set(xlabel="GiB", xlim=(0, 1.12 * max([*predicted, *measured]) / GIB))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.05))
    return axes


def draw_limits(lengths: Sequence[int], batches: Mapping[str, Sequence[int]], axes: Axes | None = None) -> Axes:
    """Largest batch against length, one line for each set of GPUs."""
    axes = axes or plt.subplots()[1]
    for (name, rows), style in zip(batches.items(), ("-o", "--s", ":^", "-.v"), strict=False):
        # Where not a single row fits there is no point: a logarithm knows no 0.
        some = [(length, most) for length, most in zip(lengths, rows, strict=True) if most]
        axes.plot([length for length, _ in some], [most for _, most in some], style, markersize=4, label=name)
    axes.set(xlabel="tokens in a row", ylabel="most rows in a step", yscale="log", xscale="log")
    axes.set_xticks(list(lengths), [str(length) for length in lengths])
    ends = [most for rows in batches.values() for most in rows if most] or [1]
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if min(ends) <= tick <= max(ends)]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend()
    return axes
