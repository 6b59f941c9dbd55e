"""Figures of notebooks 04 and 05: LoRA drawn, the loss curve, the size of what was learnt."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from glmhelpers.plots.style import COLORS, HATCHES


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
    return axes


def plot_b_norms(norms: Mapping[str, float]) -> Axes:
    """Norm of lora_B per block: where the adapter changes the model."""
    _, axes = plt.subplots(figsize=(6, 2.6))
    axes.bar(np.arange(len(norms)), list(norms.values()), color=COLORS["orange"], hatch=HATCHES[1], edgecolor="black")
    axes.set(xlabel="block", ylabel="norm of lora_B", xticks=np.arange(len(norms)))
    return axes
