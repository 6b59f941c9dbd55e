"""Figures of notebook 05: what bounds decoding, measured speeds, the next token's distribution, the cache."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from glmhelpers.cost_model.decoding_time import Speeds, timeline, token_time
from glmhelpers.cost_model.sizes import Setting, Shape
from glmhelpers.cost_model.step_memory import cache_bytes
from glmhelpers.plots.style import COLORS, HATCHES, describe, label_bars
from glmhelpers.utils.units import GIB


def draw_decoding(prompt: int = 6, new: int = 5) -> Figure:
    """Which places the model computes for each new token, without a key-value cache and with one.

    Args:
        prompt: tokens of the prompt.
        new: tokens of the answer.
    """
    figure, both = plt.subplots(1, 2, figsize=(7.5, 2.9), sharey=True)
    for axes, cached in zip(both, (False, True), strict=True):
        computed = 0
        for step in range(new):
            first = prompt + step - 1 if cached and step else 0  # places before it lie in the cache
            for place in range(prompt + step):
                style = _COMPUTED if place >= first else _CACHED
                axes.barh(step, 0.9, 0.8, left=place - 0.45, **style)
            computed += prompt + step - first
        axes.axvline(prompt - 0.5, color="black", linewidth=0.8)
        axes.set_title(f"{'with' if cached else 'without'} a cache: {computed} computed", loc="left")
        axes.set(xticks=range(prompt + new - 1), xlabel="place in the text; the answer begins at the line")
        how = (
            "each new token alone, the places before it come from the cache" if cached else "all places for each token"
        )
        describe(axes, f"{prompt} tokens of prompt, {new} new tokens, {axes.get_title('left')}: {how}.")
        axes.grid(visible=False)
    both[0].set(yticks=range(new), yticklabels=[f"{step + 1}" for step in range(new)], ylabel="new token")
    both[0].invert_yaxis()
    keys = [Patch(**_COMPUTED, label="computed"), Patch(**_CACHED, label="read from the cache")]
    figure.legend(handles=keys, loc="outside lower center", ncols=2)
    return figure


_COMPUTED: dict[str, Any] = {"facecolor": COLORS["blue"], "edgecolor": "black", "linewidth": 0.5}
_CACHED: dict[str, Any] = {"facecolor": COLORS["light"], "hatch": HATCHES[1], "edgecolor": "black", "linewidth": 0.5}


def draw_bounds(config: Any, speeds: Speeds, predicted: Sequence[str] = ("T4",), kernels: int = 12) -> Figure:
    """Who waits for whom: the first kernels of a token, started one by one and by a graph.

    All kernels are drawn equally long: the sum is what counts.

    Args:
        config: ChatGLMConfig.
        speeds: measured; its GPU is the first picture.
        predicted: GPUs of the catalogue, drawn below from the bandwidth of their memory and the measured host.
        kernels: how many to draw.
    """
    rows = [(speeds.device, speeds.kernel_seconds, speeds.host_seconds, speeds.graph_seconds, "measured")]
    for gpu in predicted:
        time = token_time(config, gpu, speeds.host_seconds)
        rows.append((gpu, time.memory, time.plain, time.memory, "predicted, at most"))
    figure, all_axes = plt.subplots(len(rows), 1, figsize=(7.5, 0.9 + 1.7 * len(rows)), sharex=True)
    for axes, (gpu, busy, plain, graph, how) in zip(np.atleast_1d(all_axes), rows, strict=True):
        work, launch = (seconds * 1e6 / speeds.launches for seconds in (busy, speeds.host_seconds))
        for label, start, height in (("graph: GPU", 0.0, 0), ("one by one: GPU", launch, 1)):
            _, begins = timeline(work, start, kernels)
            axes.barh([height] * kernels, work, 0.6, left=begins, **_GPU_BAR)
            axes.annotate(label, (0, height), (-6, 0), textcoords="offset points", ha="right", va="center")
        axes.barh([2] * kernels, launch, 0.6, left=launch * np.arange(kernels), **_HOST_BAR)
        axes.annotate("one by one: host", (0, 2), (-6, 0), textcoords="offset points", ha="right", va="center")
        axes.set_title(f"{gpu}, {how}: {1 / plain:.0f} tokens/s one by one, {1 / graph:.0f} by graph", loc="left")
        axes.set_yticks([])
        axes.tick_params(labelbottom=True)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("microseconds")
        describe(
            axes,
            f"{axes.get_title('left')}: Python needs {launch:.1f} microseconds to start a kernel, "
            f"the GPU {work:.1f} to run it.",
        )
    axes.set_xlim(left=0)
    figure.suptitle(f"The first {kernels} of {speeds.launches} kernels of a token", fontsize=11)
    keys = [Patch(**_HOST_BAR, label="Python starts a kernel"), Patch(**_GPU_BAR, label="the GPU runs a kernel")]
    figure.legend(handles=keys, loc="outside lower center", ncols=2)
    return figure


_GPU_BAR: dict[str, Any] = {"facecolor": COLORS["blue"], "edgecolor": "white", "linewidth": 0.8}
_HOST_BAR: dict[str, Any] = {"facecolor": COLORS["orange"], "hatch": HATCHES[1], "edgecolor": "black", "linewidth": 0.5}


def plot_speeds(cases: Mapping[str, tuple[float, float]], limit: float | None = None) -> Axes:
    """Tokens a second, one horizontal bar a case, with the memory's limit as a line.

    Args:
        cases: label -> lowest and highest tokens a second, drawn from top to bottom.
        limit: tokens a second if the weights were read at full speed, if known.
    """
    figure, axes = plt.subplots(figsize=(7, 1.3 + 0.42 * len(cases)))
    places = np.arange(len(cases))[::-1]
    lowest, highest = (np.array([pair[side] for pair in cases.values()]) for side in (0, 1))
    axes.barh(places, lowest, 0.6, color=COLORS["blue"], edgecolor="black", label="the slowest case")
    rest: dict[str, Any] = {"color": COLORS["sky"], "hatch": HATCHES[1], "edgecolor": "black"}
    axes.barh(places, highest - lowest, 0.6, left=lowest, label="up to the fastest", **rest)
    for place, low, high in zip(places, lowest, highest, strict=True):
        text = f"{low:.0f} to {high:.0f}" if high > low else f"{low:.0f}"
        axes.annotate(text, (high, place), (4, 0), textcoords="offset points", va="center")
    if limit is not None:
        axes.axvline(limit, color=COLORS["vermillion"], linestyle="--")
        axes.annotate(
            f"weights read once a token: {limit:.0f}",
            (limit, len(cases) - 0.45),
            (-4, 0),
            textcoords="offset points",
            color=COLORS["vermillion"],
            ha="right",
        )
    right = max([*highest, limit or 0]) * 1.08
    axes.set(yticks=places, yticklabels=list(cases), xlabel="tokens a second", xlim=(0, right))
    axes.set_ylim(-0.6, len(cases) - 0.1)
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=2)
    listed = "; ".join(f"{label} {low:.0f} to {high:.0f}" for label, (low, high) in cases.items())
    known = "" if limit is None else f" Weights read once a token: {limit:.0f}."
    describe(axes, f"Tokens a second, from the slowest case to the fastest: {listed}.{known}")
    return axes


def token_labels(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """For the axis of a figure: the piece of text above its id; the id alone if not every font can draw the piece."""
    pieces = [tokenizer.decode([number]) for number in ids]
    return [
        f"{piece}\n{number}" if piece.isascii() and piece.isprintable() and piece.strip() else str(number)
        for piece, number in zip(pieces, ids, strict=True)
    ]


def plot_top_p(probabilities: Mapping[str, Sequence[float]], top_p: float) -> Axes:
    """How many tokens top-p keeps: their probabilities added up, the likeliest first.

    Args:
        probabilities: label (such as "temperature 0.5") -> probabilities of all tokens, in any order.
        top_p: the share to reach.
    """
    _, axes = plt.subplots(figsize=(6.5, 3))
    keeps = []
    for (label, values), style in zip(probabilities.items(), ("-", "--", ":", "-."), strict=False):
        reached = np.cumsum(np.sort(np.asarray(values))[::-1])
        kept = int(np.searchsorted(reached, top_p)) + 1
        keeps.append(f"{label}: keeps {kept} of {len(reached)}")
        (line,) = axes.plot(np.arange(1, len(reached) + 1), reached, style, label=keeps[-1])
        axes.plot(kept, reached[min(kept, len(reached)) - 1], "o", color=line.get_color())
    axes.axhline(top_p, color=COLORS["grey"], linewidth=1)
    place: dict[str, Any] = {
        "xycoords": ("axes fraction", "data"),
        "textcoords": "offset points",
        "ha": "right",
        "va": "top",
    }
    axes.annotate(f"top-p {top_p:g}", (1, top_p), (-2, -3), **place)
    axes.set(xscale="log", xlabel="tokens, the likeliest first", ylabel="share reached", ylim=(0, 1.03))
    axes.legend(loc="lower right")
    describe(axes, f"Share of the probability against the number of tokens, top-p {top_p:g}. {'; '.join(keeps)}.")
    return axes


def plot_cache(config: Any, tokens: Sequence[int] = (256, 512, 1024, 2048), dtype: str = "float16") -> Axes:
    """Key-value cache of one conversation against its length, in MiB or GiB."""
    shape, setting = Shape.of(config), Setting(1, dtype=dtype, training=False)
    sizes = [cache_bytes(shape, setting, count, shape.layers) / GIB for count in tokens]
    _, axes = plt.subplots(figsize=(5.5, 2.6))
    places = np.arange(len(tokens))
    axes.bar(places, sizes, 0.6, color=COLORS["sky"], hatch=HATCHES[2], edgecolor="black")
    label_bars(axes, sizes)
    axes.set(xticks=places, xticklabels=tokens, xlabel="tokens in the cache", ylabel="GiB")
    axes.grid(axis="x", visible=False)
    listed = ", ".join(f"{size:.2f} GiB for {count} tokens" for count, size in zip(tokens, sizes, strict=True))
    describe(axes, f"Key-value cache of one conversation, bars by its length: {listed}.")
    return axes


def plot_sampling(probabilities: Mapping[str, Sequence[float]], tokens: Sequence[str]) -> Axes:
    """Bars of next-token probabilities under several settings.

    Args:
        probabilities: label (such as "temperature 0.5") -> probabilities of `tokens`, in their order.
        tokens: labels of the x axis.
    """
    _, axes = plt.subplots(figsize=(7, 3))
    width = 0.8 / len(probabilities)
    for number, (label, values) in enumerate(probabilities.items()):
        place = np.arange(len(tokens)) + (number - (len(probabilities) - 1) / 2) * width
        axes.bar(place, values, width, label=label, hatch=HATCHES[number % len(HATCHES)], edgecolor="black")
    axes.set(xticks=np.arange(len(tokens)), xticklabels=tokens, ylabel="probability", xlabel="next token (its id)")
    axes.legend()
    names = [token.replace("\n", " ") for token in tokens]
    listed = "; ".join(
        f"{label}: {', '.join(f'{name} {value:.2f}' for name, value in zip(names, values, strict=True))}"
        for label, values in probabilities.items()
    )
    describe(axes, f"Probability of the next token, by its text and id. {listed}.")
    return axes
