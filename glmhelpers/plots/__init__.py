"""Figures of the course, all in one style: readable at 700 px, in print and for colour-blind readers."""

from glmhelpers.plots.corpus import draw_corpus, draw_pieces
from glmhelpers.plots.data import draw_batch, draw_example, draw_lengths, draw_report
from glmhelpers.plots.device_map import (
    device_name,
    draw_compared,
    draw_cut_curve,
    draw_map,
    draw_scaling,
    draw_schedule,
    draw_timeline,
)
from glmhelpers.plots.inference import (
    draw_bounds,
    draw_decoding,
    plot_cache,
    plot_sampling,
    plot_speeds,
    plot_top_p,
    token_labels,
)
from glmhelpers.plots.memory_figure import draw_memory, draw_plan, draw_rest
from glmhelpers.plots.model import draw_mask, draw_model, draw_positions
from glmhelpers.plots.style import COLORS, cjk_font, describe, label_bars, use_style
from glmhelpers.plots.training import draw_interference, draw_lora, plot_b_norms, plot_loss, plot_progress
from glmhelpers.plots.weights import draw_loading, draw_parts, draw_shards

__all__ = [
    "COLORS",
    "cjk_font",
    "describe",
    "device_name",
    "draw_batch",
    "draw_bounds",
    "draw_compared",
    "draw_corpus",
    "draw_cut_curve",
    "draw_decoding",
    "draw_example",
    "draw_interference",
    "draw_lengths",
    "draw_loading",
    "draw_lora",
    "draw_map",
    "draw_mask",
    "draw_memory",
    "draw_model",
    "draw_parts",
    "draw_pieces",
    "draw_plan",
    "draw_positions",
    "draw_report",
    "draw_rest",
    "draw_scaling",
    "draw_schedule",
    "draw_shards",
    "draw_timeline",
    "label_bars",
    "plot_b_norms",
    "plot_cache",
    "plot_loss",
    "plot_progress",
    "plot_sampling",
    "plot_speeds",
    "plot_top_p",
    "token_labels",
    "use_style",
]
