"""Curves of a training: the loss, and what each GPU holds while it runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from glmhelpers.utils.units import GIB


def plot_loss(log: Sequence[Mapping[str, float]]) -> Axes:
    """Training loss (and evaluation loss, if any) against the step."""
    _, axes = plt.subplots(figsize=(6, 3))
    return _draw_losses(axes, log)


def _draw_losses(axes: Axes, log: Sequence[Mapping[str, Any]]) -> Axes:
    for key, label, style in (("loss", "training", "o-"), ("eval_loss", "evaluation", "s--")):
        points = [(entry["step"], entry[key]) for entry in log if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
    seen = [entry[key] for entry in log for key in ("loss", "eval_loss") if key in entry]
    if seen and 0 < 10 * min(seen) < max(seen):
        # The end of a curve that fell far would lie on the axis.
        axes.set(yscale="log", ylim=(0.7 * min(seen), 1.4 * max(seen)))
        axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
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
    figure.suptitle(title, fontsize=9)
    return figure
