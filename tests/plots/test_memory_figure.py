"""Bars of memory: every byte is drawn once, totals mean the same everywhere, names stand apart."""

import itertools

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from glmhelpers.cost_model import CATALOGUE, predict
from glmhelpers.cost_model.step_memory import OUTSIDE, TERMS, slack_bytes
from glmhelpers.devicemap.plan import plan_device_map
from glmhelpers.plots import memory_figure
from glmhelpers.plots.memory_bars import EACH_TERM, FEW_PARTS, memory_bars
from glmhelpers.plots.style import use_style
from glmhelpers.utils.units import GIB, MIB
from thuglm import ChatGLMConfig

CONFIG = ChatGLMConfig()
PLANS = {
    "memory": lambda: plan_device_map(CONFIG, ["T4", "T4"], 4, 1024, objective="memory"),
    "speed": lambda: plan_device_map(CONFIG, ["T4", "T4"], 4, 1024),
    "three": lambda: plan_device_map(CONFIG, ["T4", "T4", "T4"], 67, 1024),
    "large cards": lambda: plan_device_map(CONFIG, ["H100", "H100"], 4, 1024, objective="memory"),
    "unlike": lambda: plan_device_map(CONFIG, ["T4", "P100", "T4", "H100"], 60, 1024),
}


@pytest.fixture(autouse=True)
def style():
    use_style()
    yield
    plt.close("all")


def lengths(axes) -> list[float]:
    """The length of each bar, all parts together."""
    rows = range(len(axes.get_yticks()))
    return [sum(part.get_width() for part in axes.patches if round(part.get_y() + 0.3) == row) for row in rows]


def said(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("name", PLANS)
def test_every_byte_of_a_plan_is_drawn_once(name):
    plan = PLANS[name]()
    whole, rest = memory_figure.draw_plan(plan).figure.axes
    assert lengths(whole) == pytest.approx([total / GIB for total in plan.total_bytes])
    added = [sum(terms.values()) - terms["weights"] - terms["embedding"] for terms in plan.breakdown]
    assert lengths(rest) == pytest.approx([size / MIB for size in added])
    totals = [label.get_text().split("\n")[1] for label in whole.get_yticklabels()]
    assert totals == [f"{total / GIB:.2f} GiB" for total in plan.total_bytes]
    assert [label.get_text().split("\n")[1] for label in rest.get_yticklabels()] == [
        f"{size / MIB:,.0f} MiB" for size in added
    ]


@pytest.mark.parametrize("name", PLANS)
def test_every_part_has_its_name_and_names_stand_apart(name):
    figure = memory_figure.draw_plan(PLANS[name]()).figure
    figure.canvas.draw()
    for axes in figure.axes:
        words = " ".join([*said(axes), axes.get_xlabel()]).replace("\n", " ").replace("\xa0", " ")
        assert all(part.get_gid() in words for part in axes.patches)
        boxes = [text.get_window_extent() for text in axes.texts]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        assert all(axes.bbox.x0 - 1 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert figure.get_tightbbox().width <= memory_figure.WIDTH + 0.02


@pytest.mark.parametrize("name", PLANS)
def test_no_more_than_two_thirds_of_the_axis_are_empty(name):
    for axes in memory_figure.draw_plan(PLANS[name]()).figure.axes:
        assert max(lengths(axes)) > axes.get_xlim()[1] / 3


def test_the_limit_is_a_line_with_its_name():
    axes = memory_figure.draw_memory([{"weights": 9 * GIB}, {"weights": 3 * GIB}], limits=[8 * GIB, 10 * GIB])
    lines = [line.get_xdata()[0] for line in axes.lines if line.get_gid() == "limit"]
    assert lines == [8, 10]
    assert {"limit\n8.00\n1.00 over", "limit\n10.00", "7.00 free"} <= set(said(axes))


def test_a_limit_far_away_is_named_at_the_edge():
    axes = memory_figure.draw_memory([{"weights": 2 * GIB}], limits=[80 * GIB])
    assert axes.get_xlim()[1] < 4
    assert {"limit\n80.00 →", "78.00 free"} <= set(said(axes))
    assert not [line for line in axes.lines if line.get_gid() == "limit"]


def test_what_was_measured_and_the_best_plan_are_drawn():
    bars = memory_bars([{"weights": 4 * GIB}], ["GPU 0"], None, FEW_PARTS, best=[3 * GIB], measured=[5 * GIB])
    axes = memory_figure.draw_bars(bars)
    assert [line.get_xdata().tolist() for line in axes.lines if line.get_gid() == "measured"] == [[5]]
    assert [(patch.get_width(), patch.get_fill()) for patch in axes.patches if patch.get_gid() == "best"] == [
        (3, False)
    ]


def test_a_prediction_has_the_same_parts_outside_as_its_total():
    places = dict.fromkeys(PLANS["memory"]().device_map, 0)
    prediction = predict(CONFIG, places, 4, 1024, gpus=["T4"])
    (parts,) = prediction.with_outside
    outside = slack_bytes(prediction.breakdown[0]) + CATALOGUE["T4"].context
    assert sum(parts.values()) == prediction.total_bytes[0] == prediction.peak_bytes[0] + outside


def test_groups_hold_every_term_once():
    for groups in (EACH_TERM, FEW_PARTS):
        assert sorted(term for group in groups for term in group.terms) == sorted({**TERMS, **OUTSIDE})


def test_what_has_no_place_is_named():
    with pytest.raises(ValueError, match="'ghost' of GPU 0 is in no group"):
        memory_bars([{"ghost": 1}], ["GPU 0"])
    with pytest.raises(ValueError, match="limits has 2 values for 1 bars"):
        memory_bars([{"weights": 1}], ["GPU 0"], [1, 2])


words = st.lists(st.tuples(st.floats(0, 100), st.floats(0.5, 20)), min_size=1, max_size=6)


@given(words)
def test_words_are_spread(pairs):
    centers, widths = sorted(center for center, _ in pairs), [width for _, width in pairs]
    assume(sum(widths) + len(widths) <= 100)
    starts = memory_figure.spread(centers, widths, 1, 100)
    assert starts[0] >= -1e-9
    assert starts[-1] + widths[-1] <= 100 + 1e-9
    for place, (one, other) in enumerate(itertools.pairwise(starts)):
        assert one + widths[place] + 1 <= other + 1e-9


@given(words)
def test_words_with_room_stand_over_their_parts(pairs):
    centers, widths = sorted(center for center, _ in pairs), [width for _, width in pairs]
    wanted = [center - width / 2 for center, width in zip(centers, widths, strict=True)]
    assume(wanted[0] >= 0 and wanted[-1] + widths[-1] <= 100)
    assume(all(one + widths[at] + 1 <= two for at, (one, two) in enumerate(itertools.pairwise(wanted))))
    assert memory_figure.spread(centers, widths, 1, 100) == pytest.approx(wanted)
