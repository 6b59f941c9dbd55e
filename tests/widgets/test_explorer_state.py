"""The explorer without a browser: every state can exist; pictures, controls and dict agree; the monitor's lines."""

import ast
import re
import time
from xml.etree import ElementTree

import matplotlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

matplotlib.use("Agg")

from glmhelpers.cost_model.block_memory import block_cost
from glmhelpers.cost_model.gpus import CATALOGUE
from glmhelpers.cost_model.sizes import LORA_TARGETS
from glmhelpers.cost_model.step_memory import OUTSIDE, TERMS
from glmhelpers.devicemap import check_device_map, plan_device_map
from glmhelpers.plots import device_map as plots_map
from glmhelpers.plots import memory_bars
from glmhelpers.plots import style as plots
from glmhelpers.utils.units import GIB
from glmhelpers.widgets.explorer import Explorer, compact_map
from glmhelpers.widgets.explorer_state import Explored, equal_cuts
from glmhelpers.widgets.explorer_svg import bars_svg, schedule_svg
from glmhelpers.widgets.monitor import Monitor, Reading, read_devices

PUBLISHED = {
    "num_layers": 28,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "inner_hidden_size": 16384,
    "vocab_size": 130528,
}

moves = st.one_of(
    st.tuples(st.just("gpu"), st.sampled_from(list(CATALOGUE))),
    st.tuples(st.just("count"), st.integers(1, 4)),
    st.tuples(st.just("cut"), st.tuples(st.integers(0, 2), st.integers(0, 28))),
    st.tuples(st.just("batch_size"), st.integers(1, 128)),
    st.tuples(st.just("seq_length"), st.integers(1, 32).map(lambda n: 64 * n)),
    st.tuples(st.just("micro_batches"), st.integers(1, 128)),
    st.tuples(st.just("checkpointed"), st.integers(0, 28)),
    st.tuples(st.just("lora_rank"), st.sampled_from([1, 8, 128])),
    st.tuples(st.just("lora_targets"), st.lists(st.sampled_from(LORA_TARGETS), unique=True).map(tuple)),
    st.tuples(st.just("embedding"), st.sampled_from(["first", "tied", "cpu"])),
    st.tuples(st.just("dtype"), st.sampled_from(["float16", "float32"])),
    st.tuples(st.just("base_bits"), st.sampled_from([16, 8, 4])),
)


@given(st.lists(moves, max_size=8))
@settings(max_examples=60, deadline=None)
def test_no_sequence_of_moves_makes_an_impossible_state(sequence):
    state = Explored.start(PUBLISHED, "T4", 2, 4, 1024)
    for name, value in sequence:
        if name == "cut":
            if value[0] < state.count - 1:
                state = state.with_cut(*value)
                assert state.cuts[value[0]] == value[1]
        else:
            state = state.changed(**{name: value})
        assert list(state.cuts) == sorted(state.cuts)
        assert state.batch_size % state.micro_batches == 0
        plan = state.plan
        check_device_map(PUBLISHED, plan.device_map, plan.gpus)
        assert len(plan.checkpointed_layers) == state.checkpointed
        again = dict(zip(plan.prediction.devices, plan.prediction.peak_bytes, strict=True))
        assert [again.get(index, 0) for index in range(state.count)] == plan.peak_bytes


@pytest.mark.parametrize(
    ("wish", "got"),
    [
        ({"cuts": (40,)}, {"cuts": (28,)}),
        ({"cuts": (9, -3, 5), "count": 3}, {"cuts": (0, 9)}),
        ({"count": 3, "cuts": (5,)}, {"cuts": (5, 28)}),
        ({"count": 9}, {"count": 4}),
        ({"batch_size": 0}, {"batch_size": 1}),
        ({"batch_size": 500}, {"batch_size": 128}),
        ({"seq_length": 5}, {"seq_length": 64}),
        ({"seq_length": 9999}, {"seq_length": 2048}),
        ({"checkpointed": -1}, {"checkpointed": 0}),
        ({"lora_rank": 11}, {"lora_rank": 8}),
        ({"lora_targets": ()}, {"lora_targets": ("query_key_value",)}),
    ],
)
def test_wishes_out_of_range_go_to_the_nearest(wish, got):
    explorer = Explorer(PUBLISHED)
    explorer.set(**wish)
    assert {name: getattr(explorer.state, name) for name in got} == got
    for name, control in explorer.controls.items():
        assert control.value == getattr(explorer.state, name)
    check_device_map(PUBLISHED, explorer.device_map, explorer.plan.gpus)


@pytest.mark.parametrize(
    ("wish", "word"),
    [
        ({"gpu": "T5"}, "'T4'"),
        ({"embedding": "attic"}, "'tied'"),
        ({"dtype": "int8"}, "'float16'"),
        ({"lora_targets": ("q_proj",)}, "'q_proj' is none"),
        ({"speed": 3}, "'speed' is no setting"),
    ],
)
def test_choices_that_there_are_not_are_refused_and_change_nothing(wish, word):
    explorer = Explorer(PUBLISHED)
    before = explorer.state
    with pytest.raises(ValueError, match=word):
        explorer.set(**wish)
    assert explorer.state == before


def test_explorer_of_a_short_model():
    explorer = Explorer({**PUBLISHED, "max_sequence_length": 48}, seq_length=1024)
    assert explorer.state.seq_length == explorer.controls["seq_length"].value == 48


def test_equal_cuts():
    assert equal_cuts(28, 1) == ()
    assert equal_cuts(28, 2) == (14,)
    assert equal_cuts(28, 3) == (10, 19)
    assert equal_cuts(7, 4) == (2, 4, 6)


def test_controls_and_state_follow_each_other():
    explorer = Explorer(PUBLISHED)
    bars = explorer.bars.value
    explorer.cuts[0].value = 20
    assert explorer.state.cuts == (20,)
    assert explorer.bars.value != bars
    assert [explorer.device_map[f"transformer.layers.{layer}"] for layer in (19, 20)] == [0, 1]
    explorer.controls["batch_size"].value = 6
    explorer.controls["micro_batches"].value = 6
    explorer.controls["batch_size"].value = 9
    assert explorer.state.micro_batches == explorer.controls["micro_batches"].value == 3
    explorer.controls["count"].value = 4
    assert [cut.layout.display for cut in explorer.cuts] == ["", "", ""]
    explorer.cuts[0].value = 27
    assert [cut.value for cut in explorer.cuts] == [27, 27, 27]
    explorer.controls["count"].value = 1
    assert set(explorer.device_map.values()) == {0}


def test_best_plan_button_gives_the_planners_plan():
    explorer = Explorer(PUBLISHED)
    assert explorer.chosen is None
    for objective in ("memory", "speed"):
        explorer.objective.value = objective
        explorer.best_button.click()
        plan = plan_device_map(PUBLISHED, ["T4", "T4"], 4, 1024, objective)
        assert explorer.device_map == plan.device_map
        assert explorer.plan.peak_bytes == plan.peak_bytes
        assert explorer.plan.seconds == pytest.approx(plan.seconds)
        assert f"Best plan for {objective}" in explorer.message.value
    explorer.use_button.click()
    assert explorer.chosen == plan.device_map
    explorer.set(batch_size=128, seq_length=2048)
    assert "does NOT fit: GPU 0 T4 lacks " in explorer.message.value
    before = explorer.state
    explorer.best_button.click()
    assert "short by" in explorer.message.value
    assert explorer.state == before


def test_static_forms_for_places_without_widgets():
    explorer = Explorer(PUBLISHED)
    bundle = explorer._repr_mimebundle_()
    assert "<svg" in bundle["text/html"]
    assert "GPU 0 (T4): blocks 0-13" in bundle["text/plain"]
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.box.model_id
    assert explorer.picture().get_xlabel() == "GiB"


def test_compact_map_names_every_run():
    text = compact_map(plan_device_map(PUBLISHED, ["T4", "T4"], 4, 1024, "memory").device_map)
    assert '"transformer.layers.0" to ".14": 0' in text
    assert '"transformer.layers.15" to ".27": 1' in text
    ast.literal_eval(re.sub(r' to "[.\d]+"', "", text))


def test_svg_is_well_formed_and_adds_up():
    plan = plan_device_map(PUBLISHED, ["T4", "P100"], 16, 1024)
    svg = bars_svg(plan.with_outside, ["GPU 0 <a>", "GPU 1"], plan.usable_bytes)
    root = ElementTree.fromstring(svg)
    sizes = [float(re.search(r"([\d.]+) GiB", title.text)[1]) for title in root.iter("title")]
    assert sum(sizes) == pytest.approx(sum(plan.total_bytes) / GIB, abs=0.02)
    texts = [text.text for text in root.iter("text") if text.get("class") == "total"]
    pairs = zip(plan.total_bytes, plan.usable_bytes, strict=True)
    assert texts == [f"{total / GIB:.2f} of {usable / GIB:.2f} GiB" for total, usable in pairs]
    ElementTree.fromstring(schedule_svg(plan.schedule, ["GPU 0", "GPU 1"]))


def test_every_term_has_a_look_of_its_own():
    looks = [memory_bars.TERM_LOOK[term] for term in (*TERMS, *OUTSIDE)]
    assert len(set(looks)) == len(looks)
    assert {color for color, _ in looks} <= set(plots.COLORS)


def test_pictures_show_the_numbers():
    plots.use_style()
    plan = plan_device_map(PUBLISHED, ["T4", "T4", "T4"], 16, 1024, "memory")
    row = plots_map.draw_map(plan.device_map)
    assert len(row.patches) == 31
    tasks = plan.schedule
    assert max(task.end for task in tasks) == pytest.approx(plan.seconds)
    assert len(plots_map.draw_schedule(tasks).patches) == len(tasks)
    timeline = block_cost(plan.shape, plan.setting).timeline
    assert max(bar.get_height() for bar in plots_map.draw_timeline(timeline).patches) * 2**20 == pytest.approx(
        block_cost(plan.shape, plan.setting).again
    )
    curve = plots_map.draw_cut_curve([1, 2, 3], [[1, 9], [5, 5], [9, 1]], limit=7)
    assert "cut 2" in [text.get_text() for text in curve.texts]
    compared = plots_map.draw_compared(["GPU 0"], [103], [100])
    assert compared.texts[0].get_text().strip() == "+3.00%"
    limits = plots_map.draw_limits([1, 2], {"a": [1, 0], "b": [3, 4]})
    assert [list(line.get_xdata()) for line in limits.lines] == [[1], [1, 2]]
    assert [label.get_text() for label in limits.get_yticklabels()] == ["1", "2"]
    matplotlib.pyplot.close("all")


def test_the_first_installed_chinese_font_is_taken(monkeypatch):
    font = type("Font", (), {})
    installed = [font(), font(), font()]
    for entry, name in zip(installed, ("DejaVu Sans", plots.CJK_FAMILIES[2], plots.CJK_FAMILIES[1]), strict=True):
        entry.name = name
    monkeypatch.setattr(matplotlib.font_manager.fontManager, "ttflist", installed)
    assert plots.cjk_font() == plots.CJK_FAMILIES[1]
    monkeypatch.setattr(matplotlib.font_manager.fontManager, "ttflist", installed[:1])
    assert plots.cjk_font() is None


def test_style_and_fonts():
    assert len(set(plots.HATCHES)) == len(plots.CYCLE) == 8
    axes = matplotlib.pyplot.subplots()[1]
    axes.bar([0, 1], [1, 2])
    plots.label_bars(axes, [1, 2], "{:.1f} s")
    assert [text.get_text() for text in axes.texts] == ["1.0 s", "2.0 s"]
    matplotlib.pyplot.close("all")


def test_monitor_shows_lines_while_something_runs():
    sizes, shown = iter([1, 3, 2] + [1] * 1000), []

    def read():
        used = next(sizes) * GIB
        return [Reading("GPU 0", used, 4 * GIB, 10 * GIB, 15 * GIB, 3 * GIB)]

    with Monitor(0.001, read, shown.append) as monitor:
        deadline = time.monotonic() + 20
        while len(shown) < 4 and time.monotonic() < deadline:
            time.sleep(0.001)
    assert monitor.highest == [3 * GIB]
    assert "allocated  1.00  reserved  4.00  free 10.00  of 15.00 GiB  highest  3.00" in shown[0]
    assert shown[1].count("#") == 4
    after = len(shown)
    time.sleep(0.01)
    assert len(shown) == after, "the thread goes on after the block"


def test_monitor_keeps_one_place_under_the_cell(monkeypatch):
    shown = []

    class Handle:
        def update(self, data, raw):
            shown.append(data["text/plain"])

    monkeypatch.setattr("IPython.display.display", lambda data, raw, display_id: Handle())
    with Monitor(60) as monitor:
        assert len(shown) == 1
    assert len(shown) == 2
    assert shown[-1].count("allocated") == len(read_devices())
    with monitor:
        pass
    assert len(shown) == 4, "it can be used again"


def test_devices_of_this_machine_can_be_read():
    for reading in read_devices():
        assert 0 <= reading.allocated <= reading.reserved <= reading.total
        assert re.search(r"free +\d+\.\d\d  of \d+\.\d\d GiB", str(reading))
