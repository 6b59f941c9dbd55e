"""Figures of a training: LoRA drawn, the loss curve, what each GPU holds while it runs, the size of what was learnt.

And what it costs: `draw_interference`, from trainings that were counted beforehand (`data/interference_ablation.json`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from glmhelpers.plots.style import COLORS, HATCHES, describe
from glmhelpers.utils.units import GIB


def plot_loss(log: Sequence[Mapping[str, float]]) -> Axes:
    """Training loss (and evaluation loss, if any) against the step."""
    _, axes = plt.subplots(figsize=(6, 3))
    return _draw_losses(axes, log)


def _draw_losses(axes: Axes, log: Sequence[Mapping[str, Any]]) -> Axes:
    said = []
    for key, label, style in (("loss", "training", "o-"), ("eval_loss", "evaluation", "s--")):
        points = [(entry["step"], entry[key]) for entry in log if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
            (first, start), (last, end) = points[0], points[-1]
            said.append(f"{label} {start:.3g} at step {first}, {end:.3g} at step {last}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
    seen = [entry[key] for entry in log for key in ("loss", "eval_loss") if key in entry]
    if seen and 0 < 10 * min(seen) < max(seen):
        # The end of a curve that fell far would lie on the axis.
        axes.set(yscale="log", ylim=(0.7 * min(seen), 1.4 * max(seen)))
        axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    describe(axes, f"Loss in nats per token against the step: {'; '.join(said)}.")
    return axes


def plot_progress(points: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Losses so far and, where there are GPUs, the peak of each card's memory beside them.

    Args:
        points: as in `watch.Watch.points`.
        title: one line above.
    """
    devices = sorted({name for point in points for name in point.get("memory", {})})
    figure, row = plt.subplots(1, 1 + bool(devices), figsize=(7.5 if devices else 5, 2.8), squeeze=False)
    _draw_losses(row[0, 0], points)
    for number, name in enumerate(devices):
        known = [(point["step"], point["memory"][name] / GIB) for point in points if name in point.get("memory", {})]
        row[0, 1].plot(*zip(*known, strict=True), "os^vD"[number % 5] + "-", label=name, markersize=4)
    if devices:
        row[0, 1].set(xlabel="step", ylabel="peak (GiB)", ylim=(0, None))
        row[0, 1].xaxis.set_major_locator(MaxNLocator(integer=True))
        row[0, 1].legend()
        most = {name: max(point["memory"].get(name, 0) for point in points if "memory" in point) for name in devices}
        peaks = ", ".join(f"{name} {peak / GIB:.2f} GiB" for name, peak in most.items())
        describe(row[0, 1], f"Peak memory against the step: {peaks} at most.")
    figure.suptitle(title, fontsize=9)
    return figure


def draw_lora(hidden: int, out: int, r: int) -> Axes:
    """W beside B and A as rectangles: what is frozen, what is learnt, and how many numbers each holds."""
    _, axes = plt.subplots(figsize=(7, 2.8))
    boxes = (
        (0.0, 0.0, 2.0, 3.0, f"W  frozen\n{out} x {hidden}\n{out * hidden:,}", "light", ""),
        (3.2, 0.0, 0.35, 3.0, "", "orange", HATCHES[1]),
        (4.2, 2.65, 2.0, 0.35, "", "blue", HATCHES[2]),
    )
    for x, y, width, height, text, color, hatch in boxes:
        axes.add_patch(Rectangle((x, y), width, height, facecolor=COLORS[color], hatch=hatch, edgecolor="black"))
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center")
    axes.text(2.6, 1.5, r"$+\;\frac{\alpha}{r}\;\cdot$", fontsize=18, ha="center", va="center")
    axes.text(3.87, 2.82, r"$\cdot$", fontsize=18, ha="center", va="center")
    axes.text(3.37, -0.45, f"B  {out} x {r}\nstarts at 0", ha="center", va="center")
    axes.text(5.2, 2.2, f"A  {r} x {hidden}\nstarts random", ha="center", va="center")
    axes.text(
        5.2,
        1.1,
        f"learnt: {r * (hidden + out):,} numbers\n= {r * (hidden + out) / (hidden * out):.2%} of W",
        ha="center",
    )
    axes.set(xlim=(-0.2, 7), ylim=(-0.9, 3.2))
    axes.axis("off")
    describe(
        axes,
        f"A frozen matrix W of {out} x {hidden} numbers, plus alpha / r times B, {out} x {r}, which starts at 0, times "
        f"A, {r} x {hidden}, which starts random. B and A, {r * (hidden + out):,} numbers, are learnt.",
    )
    return axes


def plot_b_norms(norms: Mapping[str, float]) -> Axes:
    """Norm of lora_B per block: where the adapter changes the model."""
    _, axes = plt.subplots(figsize=(6, 2.6))
    axes.bar(np.arange(len(norms)), list(norms.values()), color=COLORS["orange"], hatch=HATCHES[1], edgecolor="black")
    axes.set(xlabel="block", ylabel="norm of lora_B", xticks=np.arange(len(norms)))
    describe(
        axes,
        f"Norm of lora_B in each of {len(norms)} blocks: from {min(norms.values()):.2f} to {max(norms.values()):.2f}; "
        "it was 0 before training.",
    )
    return axes


ANSWERS: dict[str, tuple[str, str, str]] = {
    "name": ("black", "D", "the new name"),
    "right": ("orange", "o", "the right words"),
    "whole": ("blue", "s", "a whole answer"),
}
"""What an answer has -> colour, marker, words of the legend."""


def draw_interference(found: Mapping[str, Any], may_lose: float = 0.05) -> Figure:
    """What a new name costs, and what helps: left the name, right the general questions, a row for each training.

    Args:
        found: what `data/interference_ablation.json` holds.
        may_lose: share of the general questions that may be lost, drawn as a line.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in found["runs"]:
        groups.setdefault((run["factor"], _changed(run, found["runs"][0])), []).append(run)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 1.5 + 0.3 * len(groups)), sharey=True, width_ratios=[1, 2])
    places: list[float] = []
    labels: list[str] = []
    said: list[str] = []
    latest = ""
    for (factor, setting), runs in groups.items():
        # A wider gap before each setting that is changed.
        places.append(places[-1] + (1.0 if factor == latest else 1.5) if places else 0.0)
        labels.append(setting)
        latest = factor
        means = {}
        for key, (color, marker, _) in ANSWERS.items():
            each = [100 * run[key] for run in runs]
            means[key] = sum(each) / len(each)
            axes, at = (left if key == "name" else right), places[-1] + {"right": -0.17, "whole": 0.17}.get(key, 0.0)
            axes.plot([min(each), max(each)], [at, at], color=COLORS[color], linewidth=1.5)
            axes.plot(means[key], at, marker, color=COLORS[color], markeredgecolor="black", markersize=6)
        shares = f"name {means['name']:.4g}, right {means['right']:.4g}, whole {means['whole']:.4g}"
        said.append(f"{' '.join(setting.split())}: {shares}")
    known = 100 * found["base"]["whole"]
    for share, style, text in ((known, "-", "base"), (known - 100 * may_lose, "--", "at least")):
        right.axvline(share, color=COLORS["dark"], linestyle=style, linewidth=1)
        right.annotate(f"{text} {share:.0f}", (share, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom")
    left.set(yticks=places, yticklabels=labels, xlim=(-4, 104), ylim=(places[-1] + 0.6, -0.6))
    left.set(xticks=(0, 50, 100), xlabel="the new name (%)")
    right.set(xlabel=f"{found['questions']} general questions (%)")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    keys = [
        Line2D([], [], color=COLORS[color], marker=marker, markeredgecolor="black", label=words)
        for color, marker, words in ANSWERS.values()
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=3)
    seeds = len({run["seed"] for run in found["runs"]})
    describe(
        left,
        f"What a new name costs the tiny model, means of {seeds} seeds in percent; the base has {known:.0f} whole "
        f"answers. {'; '.join(said)}.",
    )
    return figure


def _changed(run: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """The settings in which a run differs from the first one; if it is the first, or differs in more than two, all."""
    words = {
        "steps": f"{run['steps']} steps",
        "rate": f"rate {run['rate']:.4f}",
        "general_rows": f"{run['general_rows'] or 'no'} rows mixed in",
        "rank": f"rank {run['rank']}",
        "alpha": f"alpha {run['alpha']}",
    }
    changed = [text for key, text in words.items() if run[key] != before[key]]
    if 0 < len(changed) < 3:
        return ", ".join(changed)
    steps, rate, *rest = words.values()
    return f"{run['factor']}: {steps}, {rate},\n{', '.join(rest)}"
