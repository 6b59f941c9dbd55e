"""Colours that stand side by side can be told apart, by the colour-blind too; hatches stand out from their ground.

Distances are CIE76: Euclid's distance in CIELAB, where about 2 can just be seen and the white of a page is 100 from
black. Colour blindness is simulated as by Machado, Oliveira and Fernandes (2009, severity 1): a matrix for linear RGB.
"""

from itertools import combinations, pairwise

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from glmhelpers.plots import data, device_map, inference, memory_bars, weights
from glmhelpers.plots.style import COLORS, fill, ink

APART = 15
"""Least distance of neighbours; the same colour twice needs two hatches."""

EYES = {
    "usual": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def linear(color: str) -> np.ndarray:
    rgb = np.array(to_rgb(color))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(color: str, eyes: str = "usual") -> np.ndarray:
    seen = np.clip(np.array(EYES[eyes]) @ linear(color), 0, 1)
    x, y, z = np.cbrt(np.maximum(TO_XYZ @ seen / (0.95047, 1.0, 1.08883), 216 / 24389))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def distance(one: str, other: str) -> float:
    """The least that any of the eyes sees."""
    return min(float(np.linalg.norm(lab(one, eyes) - lab(other, eyes))) for eyes in EYES)


def contrast(one: str, other: str) -> float:
    """As WCAG 2.1 counts it, 1 to 21."""
    dark, light = sorted(float(TO_XYZ[1] @ linear(color)) for color in (one, other))
    return (light + 0.05) / (dark + 0.05)


def test_distances_and_contrasts_are_those_of_the_literature():
    # Lab of sRGB's red, green and blue under D65, and the contrast of black on white.
    for color, known in (("#FF0000", (53.2, 80.1, 67.2)), ("#00FF00", (87.7, -86.2, 83.2)), ("white", (100, 0, 0))):
        assert lab(color) == pytest.approx(known, abs=0.1)
    assert contrast("black", "white") == pytest.approx(21)
    # What no deuteranope can tell apart: a red and a green of one lightness.
    assert np.linalg.norm(lab("#9C6B00", "deuteranopia") - lab("#7A7A00", "deuteranopia")) < 8
    # The pairs that were too close: the loss and the masks, LoRA and the masks, embedding and light block.
    assert max(distance("#CC79A7", "#999999"), distance("#009E73", "#999999"), distance("#56B4E9", "#66AAD7")) < 12


Look = tuple[str, str]


def both(looks: dict[str, Look] | list[Look]) -> list[tuple[Look, Look]]:
    """Every pair: any may be neighbours, because what is 0 is not drawn."""
    return list(combinations(looks.values() if isinstance(looks, dict) else looks, 2))


def shades(looks: tuple[dict[str, str], ...]) -> list[tuple[Look, Look]]:
    return list(pairwise((look["facecolor"], look.get("hatch", "")) for look in looks))


PAIRS: dict[str, list[tuple[Look, Look]]] = {
    "terms of memory": both(memory_bars.TERM_LOOK),
    "parts of memory": both([(group.color, group.hatch) for group in memory_bars.FEW_PARTS]),
    "kinds of tokens": both(data.KINDS),
    "reasons": both([("blue", ""), *data.REASON_LOOKS]),
    "GPUs side by side": list(pairwise(zip(device_map.GPU_COLORS, device_map.GPU_HATCHES, strict=True))),
    "forward and backward": [(("sky", ""), ("orange", "//"))],
    "embedding and CPU": [((device_map.GPU_COLORS[7], device_map.GPU_HATCHES[7]), ("blue", ""))],
    "parts of the model": shades((weights.EMBEDDING_LOOK, *weights.BLOCK_LOOKS, weights.NORM_LOOK, weights.HEAD_LOOK)),
    "inside a block": shades((*weights.ATTENTION_LOOKS, *weights.MLP_LOOKS)),
    "loading": both([("grey", ""), ("blue", ""), ("orange", ""), ("sky", "")]),
    "computed and cached": shades((inference._COMPUTED, inference._CACHED)),
}


def named(color: str) -> str:
    return COLORS.get(color, color)


@pytest.mark.parametrize("picture", PAIRS)
def test_neighbours_can_be_told_apart(picture):
    for (one, hatch), (other, other_hatch) in PAIRS[picture]:
        if one == other:
            assert hatch != other_hatch, (one, hatch)
            continue
        assert distance(named(one), named(other)) >= APART, (one, other)


@pytest.mark.parametrize("color", COLORS)
def test_hatches_edges_and_letters_stand_out(color):
    look = fill(color, "//")
    assert look["facecolor"] == COLORS[color]
    assert contrast(look["edgecolor"], COLORS[color]) >= 4
    assert contrast(ink(color), COLORS[color]) == max(contrast(each, COLORS[color]) for each in ("black", "white"))


@pytest.mark.parametrize(
    "look",
    [weights.EMBEDDING_LOOK, weights.HEAD_LOOK, inference._CACHED, inference._HOST_BAR],
)
def test_hatches_that_are_set_by_hand_stand_out(look):
    assert contrast(look["edgecolor"], look["facecolor"]) >= 3


@pytest.mark.parametrize("kind", data.KINDS)
def test_hatches_of_tokens_stand_out(kind):
    color, hatch = data.KINDS[kind]
    assert not hatch or contrast(data._edge(hatch), COLORS[color]) >= 3
    assert contrast("black", COLORS[color]) >= 4.5
