"""The explorer without a browser: every state can exist; pictures, controls and dict agree; the monitor's lines."""

import ast
import re
import threading
import time
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

matplotlib.use("Agg")

from glmhelpers.cost_model.block_memory import block_cost
from glmhelpers.cost_model.gpus import CATALOGUE, find_gpu
from glmhelpers.cost_model.sizes import LORA_TARGETS
from glmhelpers.cost_model.step_memory import OUTSIDE, TERMS
from glmhelpers.devicemap import check_device_map, plan_device_map
from glmhelpers.plots import device_map as plots_map
from glmhelpers.plots import memory_bars
from glmhelpers.plots import style as plots
from glmhelpers.plots.memory_bars import FEW_PARTS
from glmhelpers.utils.units import GIB
from glmhelpers.widgets.explorer import Explorer
from glmhelpers.widgets.explorer_state import Explored, equal_cuts
from glmhelpers.widgets.explorer_svg import plan_svg
from glmhelpers.widgets.explorer_words import Measured, compact_map
from glmhelpers.widgets.monitor import Monitor, Reading, read_devices

SVG = "{http://www.w3.org/2000/svg}"
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
    st.tuples(st.just("in_flight"), st.sampled_from([0, 1, 2, 4])),
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
    before = explorer.drawing.value
    explorer.cuts[0].value = 20
    assert explorer.state.cuts == (20,)
    assert explorer.drawing.value != before
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
        assert f"This is the best plan for {objective}" in explorer.message.value
        assert (explorer.best_button.icon, explorer.best_button.button_style) == ("check", "success")
    explorer.use_button.click()
    assert explorer.chosen == plan.device_map
    explorer.set(batch_size=128, seq_length=2048)
    assert "does NOT fit: GPU 0 T4 lacks " in explorer.message.value
    before = explorer.state
    explorer.best_button.click()
    assert "short by" in explorer.message.value
    assert explorer.state == before
    assert explorer.best_button.icon == ""


def test_static_forms_for_places_without_widgets():
    explorer = Explorer(PUBLISHED)
    bundle = explorer._repr_mimebundle_()
    picture = ElementTree.fromstring(bundle["image/svg+xml"])
    assert "GPU 0 (T4): blocks 0-13" in picture.findtext(f"{SVG}title")
    assert "background:white" in picture.get("style")
    assert "This plan fits." in [text.text for text in picture.iter(f"{SVG}text")]
    assert "GPU 0 (T4): blocks 0-13" in bundle["text/plain"]
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.box.model_id
    assert explorer.picture().data == bundle["image/svg+xml"]
    assert "white;" not in explorer.drawing.value, "a white box in a dark page"


def test_compact_map_names_every_run():
    text = compact_map(plan_device_map(PUBLISHED, ["T4", "T4"], 4, 1024, "memory").device_map)
    assert '"transformer.layers.0" to ".14": 0' in text
    assert '"transformer.layers.15" to ".27": 1' in text
    ast.literal_eval(re.sub(r' to "[.\d]+"', "", text))


def numbers(root, label, where):
    """Of all parts with this label: the number before GiB, block or s in what they say to the pointer."""
    said = [title.text for title in root.iter(f"{SVG}title") if title.text.startswith(label)]
    return [float(re.search(where, text)[1]) for text in said]


@pytest.mark.parametrize("gpus", [["T4", "P100"], ["H100"] * 4, ["T4"]])
def test_the_picture_is_well_formed_and_adds_up(gpus):
    plan = plan_device_map(PUBLISHED, gpus, 8, 1024)
    root = ElementTree.fromstring(plan_svg(plan, words=["<words>"]))
    sizes = [size for group in FEW_PARTS for size in numbers(root, f"{group.label}:", r"([\d.]+) GiB")]
    assert sum(sizes) == pytest.approx(sum(plan.total_bytes) / GIB, abs=0.02)
    texts = [text.text for text in root.iter(f"{SVG}text") if text.get("class") == "total"]
    pairs = zip(plan.total_bytes, plan.usable_bytes, strict=True)
    assert texts == [f"{total / GIB:.2f} of {usable / GIB:.2f} GiB" for total, usable in pairs]
    homes = numbers(root, "transformer.layers.", r"GPU (\d)")
    assert homes == [gpu for gpu, blocks in enumerate(plan.blocks) for _ in blocks]
    busy = numbers(root, "forward:", r"([\d.]+) s") + numbers(root, "backward:", r"([\d.]+) s")
    assert sum(busy) == pytest.approx(sum(task.end - task.start for task in plan.schedule), abs=0.05)
    assert root.findtext(f"{SVG}title").startswith("<words> batch 8 x 1024")


def outlines(drawing):
    root = ElementTree.fromstring(drawing)
    return [each for each in root.iter() if each.get("class") == "best"], drawing.count('fill="white" stroke="black"')


def test_the_best_plan_is_an_outline_and_a_sentence():
    explorer = Explorer(PUBLISHED)
    best = plan_device_map(PUBLISHED, ["T4", "T4"], 4, 1024)
    found, _ = outlines(explorer.drawing.value)
    assert len(found) == 4, "the cut, two bars and the end of the step"
    widths = [float(each.get("width")) for each in found if each.tag == f"{SVG}rect"]
    limit = 600 - 64 - 118
    assert widths == pytest.approx([total / (14.75 * GIB) * limit for total in best.total_bytes], abs=0.1)
    more = (max(best.total_bytes) - max(explorer.plan.total_bytes)) / GIB
    less = explorer.plan.seconds - best.seconds
    assert f"holds {more:.2f} GiB more, its step takes {less:.2f} s shorter" in explorer.message.value
    explorer.best_button.click()
    assert outlines(explorer.drawing.value)[0] == []
    explorer.objective.value = "memory"
    explorer.set(cuts=(3,))
    assert "Best plan for memory (15 | 13 blocks" in explorer.message.value


def test_what_was_measured_is_a_diamond_at_its_own_plan_only():
    plan = plan_device_map(PUBLISHED, ["T4", "T4"], 4, 1024, "memory", label_share=0.5)
    explorer = Explorer(PUBLISHED, measured=Measured(plan, [7 * GIB, 8 * GIB], 3.5, "a machine"))
    assert outlines(explorer.drawing.value)[1] == 0
    explorer.measured_button.click()
    assert explorer.plan.peak_bytes == plan.peak_bytes
    assert explorer.device_map == plan.device_map
    assert outlines(explorer.drawing.value)[1] == 4, "two bars, the step, the legend"
    peaks = " and ".join(f"{size / GIB:.2f}" for size in plan.peak_bytes)
    words = (
        f"a machine: peak 7.00 and 8.00 GiB, predicted {peaks} GiB; a step took 3.50 s, predicted {plan.seconds:.2f} s"
    )
    assert words in explorer.message.value
    explorer.cuts[0].value = 5
    assert outlines(explorer.drawing.value)[1] == 0
    assert Explorer(PUBLISHED).measured_button.layout.display == "none"


def test_a_plan_becomes_a_state_and_the_same_plan_again():
    for gpus, objective in ((["T4"] * 3, "speed"), (["H100"], "memory"), ([find_gpu("12GiB")] * 2, "speed")):
        plan = plan_device_map(PUBLISHED, gpus, 12, 512, objective, lora_rank=16, label_share=0.3)
        again = Explored.of(plan).plan
        assert (again.device_map, again.peak_bytes, again.seconds) == (plan.device_map, plan.peak_bytes, plan.seconds)
    with pytest.raises(ValueError, match="T4, P100: make one for equal GPUs"):
        Explored.of(plan_device_map(PUBLISHED, ["T4", "P100"], 4, 512))


def test_a_card_of_this_machine_can_be_explored():
    card = replace(find_gpu("T4"), memory=14 * GIB)
    explorer = Explorer(PUBLISHED, gpu=card)
    assert explorer.plan.usable_bytes == [14 * GIB] * 2
    assert "T4 of this machine" in explorer.controls["gpu"]._options_labels
    plan = plan_device_map(PUBLISHED, [card, card], 4, 1024)
    other = Explorer(PUBLISHED, measured=Measured(plan, plan.peak_bytes))
    other.measured_button.click()
    assert other.controls["gpu"].value == card


def test_one_change_is_drawn_once_and_the_late_best_plan_once_more(monkeypatch):
    explorer, drawn = Explorer(PUBLISHED), []
    explorer.drawing.observe(lambda change: drawn.append(change["new"]), "value")
    for move in range(15, 20):
        explorer.cuts[0].value = move
    assert len(drawn) == 5
    ready, planned = threading.Event(), Explored.best

    def late(state, objective):
        assert ready.wait(60)
        return planned(state, objective)

    monkeypatch.setattr(Explored, "best", late)
    explorer.controls["batch_size"].value = 6
    explorer.cuts[0].value = 12
    explorer.controls["micro_batches"].value = 3
    assert len(drawn) == 8, "pictures wait for no planner"
    assert "Best plan" not in explorer.message.value
    ready.set()
    explorer.set(batch_size=6)  # the same from code, which waits
    assert "Best plan for speed" in explorer.message.value
    explorer._planner.shutdown()
    assert len(drawn) == 9


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


def test_the_best_plan_with_few_micro_batches_in_flight_can_be_shown_and_changed():
    explorer = Explorer(PUBLISHED, "T4", 2, batch_size=24, seq_length=1024)
    explorer.best()
    assert explorer.controls["in_flight"].value == explorer.plan.setting.in_flight == 2
    assert "This is the best plan for speed." in explorer.message.value
    held = explorer.plan.peak_bytes
    explorer.controls["in_flight"].value = 0
    assert explorer.plan.setting.in_flight is None
    assert all(more > less for more, less in zip(explorer.plan.peak_bytes, held, strict=True))
    assert "2 in flight" in explorer.message.value
