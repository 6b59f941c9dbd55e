"""Pictures of device maps: the blocks in a row, the schedule, memory against the cut, predicted and measured.

    draw_map        |#embed#|#0#|#1#|#2#|/3/|/4/|/5/|/head/|     one box for each part, coloured by GPU
    draw_schedule   GPU 0 |F|F|  |B|B|                           one row for each GPU, time to the right
                    GPU 1   |F|F|B|B|

    draw_scaling    how much of many GPUs each way uses          on paper: dp, pp, FSDP, tensor parallel

What each GPU holds is drawn by `memory_figure`. All functions draw into given axes, or make a figure, and return the
axes.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from glmhelpers.cost_model.step_time import Task, busy_share
from glmhelpers.devicemap.scaling import WAYS, Scaled
from glmhelpers.plots.style import COLORS, CYCLE, describe, fill
from glmhelpers.utils.units import GIB

GPU_COLORS = ("blue", "orange", "green", "purple", "sky", "vermillion", "yellow", "grey")
GPU_HATCHES = ("", "//", "..", "\\\\", "xx", "--", "++", "oo")
"""Colour and hatch of GPU 0, 1, ... where GPUs are told apart."""


def device_name(device: int | str) -> str:
    """ "GPU 0" or "CPU"."""
    return f"GPU {device}" if isinstance(device, int) else str(device).upper()


def draw_map(device_map: Mapping[str, int | str], axes: Axes | None = None) -> Axes:
    """The model as a row of boxes, embedding to head, coloured and hatched by GPU."""
    layers = sum(name.startswith("transformer.layers.") for name in device_map)
    boxes = [("embed", device_map["transformer.word_embeddings"])]
    boxes += [(str(layer), device_map[f"transformer.layers.{layer}"]) for layer in range(layers)]
    boxes += [("norm", device_map["transformer.final_layernorm"]), ("head", device_map["lm_head"])]
    axes = axes or plt.subplots(figsize=(7.5, 1.1))[1]
    place = 0.0
    for label, device in boxes:
        width = 1.0 if label.isdigit() else 2.2
        axes.add_patch(Rectangle((place, 0), width - 0.08, 1, **_gpu_look(device)))
        axes.text(place + width / 2 - 0.04, -0.18, label, ha="center", va="top", fontsize=9)
        place += width
    devices = sorted({device for _, device in boxes}, key=str)
    axes.legend(
        handles=[Patch(label=device_name(device), **_gpu_look(device)) for device in devices],
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=len(devices),
        borderaxespad=0.2,
    )
    axes.set(xlim=(0, place), ylim=(-0.5, 1))
    axes.axis("off")
    runs = [(home, [name for name, _ in run]) for home, run in groupby(boxes, key=itemgetter(1))]
    held = "; ".join(
        f"{device_name(home)}: {names[0]}" + (f" to {names[-1]}" if len(names) > 1 else "") for home, names in runs
    )
    describe(axes, f"The parts of the model as a row of boxes, coloured by device. {held}.")
    return axes


def _gpu_look(device: int | str) -> dict[str, Any]:
    place = device % 8 if isinstance(device, int) else 7
    return {**fill(GPU_COLORS[place], GPU_HATCHES[place]), "linewidth": 0}


def draw_schedule(tasks: Sequence[Task], axes: Axes | None = None, until: float | None = None, title: str = "") -> Axes:
    """Who works when: one row for each GPU, one bar for each micro-batch, forward light and backward hatched.

    Args:
        tasks: from step_time.schedule.
        axes: where to draw.
        until: right end of the axis in seconds, to compare two schedules.
        title: what it is, before the numbers.
    """
    count = 1 + max(task.gpu for task in tasks)
    axes = axes or plt.subplots(figsize=(7.5, 1.2 + 0.5 * count))[1]
    for task in tasks:
        forward = task.kind == "forward"
        look = fill("sky") if forward else fill("orange", "//")
        axes.barh(task.gpu, task.end - task.start, left=task.start, height=0.8, **look)
    end = max(task.end for task in tasks)
    axes.set_yticks(range(count), [device_name(index) for index in range(count)])
    numbers = f"{end:.1f} s, GPUs busy {busy_share(tasks):.0%} of the time"
    axes.set(xlim=(0, until or end), xlabel="seconds")
    axes.set_title(f"{title}: {numbers}" if title else numbers, pad=24)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(
        handles=[Patch(label="forward", **fill("sky")), Patch(label="backward", **fill("orange", "//"))],
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=2,
        borderaxespad=0.2,
    )
    parts = 1 + max(task.micro_batch for task in tasks)
    describe(axes, f"Who works when; GPUs: {count}, micro-batches: {parts}. {axes.get_title('left')}.")
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
        axes.axhline(limit / GIB, color=COLORS["black"], linewidth=2)
        note = f"limit {limit / GIB:.2f}"
        axes.annotate(note, (cuts[0], limit / GIB), (0, 3), textcoords="offset points", va="bottom")
        axes.set_ylim(top=max(axes.get_ylim()[1], 1.08 * limit / GIB))
    axes.set(xlabel="blocks on GPU 0", ylabel="peak (GiB)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    ends = "; ".join(
        f"{cut} blocks: {' and '.join(f'{size / GIB:.2f}' for size in row)} GiB"
        for cut, row in zip((cuts[0], cuts[best], cuts[-1]), (peaks[0], peaks[best], peaks[-1]), strict=True)
    )
    describe(axes, f"Peak of each GPU against the number of blocks on GPU 0; best at {cuts[best]}. {ends}.")
    return axes


def draw_timeline(timeline: Sequence[tuple[str, int]], axes: Axes | None = None) -> Axes:
    """What one block holds, step by step, while it is run again and differentiated (BlockCost.timeline)."""
    axes = axes or plt.subplots(figsize=(7.5, 2.8))[1]
    sizes = [size / 2**20 for _, size in timeline]
    back = next(place for place, (name, _) in enumerate(timeline) if name.endswith("back"))
    for place, size in enumerate(sizes):
        axes.bar(place, size, **(fill("sky") if place < back else fill("orange", "//")))
    axes.set_xticks(range(len(sizes)), [name for name, _ in timeline], rotation=30, ha="right")
    axes.set(ylabel="MiB", title="one block: run again (plain), then undone (hatched)")
    steps = ", ".join(f"{name} {size:,.0f}" for (name, _), size in zip(timeline, sizes, strict=True))
    describe(axes, f"MiB that one block holds, step by step, while it is run again and then undone: {steps}.")
    return axes


def draw_compared(
    names: Sequence[str], predicted: Sequence[int], measured: Sequence[int], axes: Axes | None = None
) -> Axes:
    """Predicted and measured peaks side by side, with the difference in percent."""
    axes = axes or plt.subplots(figsize=(7.5, 1.2 + 0.4 * len(names)))[1]
    rows = range(len(names))
    kinds = (("predicted", predicted, -0.2, fill("sky")), ("measured", measured, 0.2, fill("blue", "//")))
    for label, sizes, shift, look in kinds:
        axes.barh([row + shift for row in rows], [size / GIB for size in sizes], 0.38, label=label, **look)
    for row, (guess, truth) in enumerate(zip(predicted, measured, strict=True)):
        axes.text(max(guess, truth) / GIB, row, f" {guess / truth - 1:+.2%}", va="center")
    axes.set_yticks(rows, names)
    axes.invert_yaxis()
    axes.set(xlabel="GiB", xlim=(0, 1.12 * max([*predicted, *measured]) / GIB))
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
    pairs = "; ".join(
        f"{name} {guess / GIB:.2f} and {truth / GIB:.2f} ({guess / truth - 1:+.2%})"
        for name, guess, truth in zip(names, predicted, measured, strict=True)
    )
    describe(axes, f"Predicted and measured peaks in GiB: {pairs}.")
    return axes


def draw_scaling(points: Sequence[Scaled]) -> Axes:
    """How much of many GPUs is used: speed of each way, in percent of as many times one GPU, against their number.

    Hollow points do not fit into a GPU's memory; a line that ends early says what makes more GPUs impossible.

    Args:
        points: from `devicemap.scaling.scale_out`.
    """
    _, axes = plt.subplots(figsize=(7, 4))
    counts, said = sorted({point.gpus for point in points}), []
    one = next(point.tokens_per_s / point.gpus for point in points if not point.why)
    for number, (way, name) in enumerate(WAYS.items()):
        line = [point for point in points if point.way == way and not point.why]
        if not line:
            continue
        shares = [100 * point.tokens_per_s / point.gpus / one for point in line]
        color, marker = COLORS[CYCLE[number]], "osD^v"[number]
        axes.plot([point.gpus for point in line], shares, "-" + marker, color=color, label=name, markersize=6)
        for point, share in zip(line, shares, strict=True):
            if not point.fits:
                axes.plot(point.gpus, share, marker, color=color, markerfacecolor="white", markersize=6)
        said.append(f"{name} {shares[-1]:.0f} % on {line[-1].gpus} GPUs")
        stopped = next((point.why for point in points if point.way == way and point.gpus > line[-1].gpus), "")
        if stopped:
            below = -15 if shares[-1] > 20 else 16
            place: dict[str, Any] = {"xytext": (0, below), "textcoords": "offset points", "ha": "center", "fontsize": 9}
            axes.annotate(f"then {stopped}", (line[-1].gpus, shares[-1]), **place)
            said[-1] += f", then {stopped}"
    axes.set(xscale="log", xlabel="GPUs", ylabel="speed, % of N times one GPU", ylim=(0, 112))
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.legend(loc="lower left")
    describe(axes, f"Share of the GPUs that is used, against their number, up to {counts[-1]}: {'; '.join(said)}.")
    return axes
