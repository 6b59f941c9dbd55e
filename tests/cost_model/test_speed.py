"""The time of a token: bytes of the real model, kernels counted, the two lanes of the picture, and the figures."""

import itertools
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from glmhelpers.cost_model.decoding_time import GOALS, bytes_for_token, read_speeds, timeline, token_time
from glmhelpers.cost_model.sizes import Setting, Shape
from glmhelpers.cost_model.step_memory import cache_bytes
from glmhelpers.inference.decoder import Decoder
from glmhelpers.plots.inference import draw_bounds, draw_decoding, plot_cache, plot_speeds, plot_top_p, token_labels
from glmhelpers.runtime import find_project
from glmhelpers.utils.units import GIB
from tests.helpers.reference import model, tokenizer
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration

CONFIG = ChatGLMConfig()
MEASURED = read_speeds(find_project() / "benchmarks" / "results" / "decode_h100.jsonl")


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def test_bytes_are_those_of_the_real_model():
    with torch.device("meta"):
        net = ChatGLMForConditionalGeneration(CONFIG)
    net.tie_weights()
    assert bytes_for_token(CONFIG) == 2 * sum(p.numel() for p in net.parameters())
    per_token = 28 * 2 * 4096 * 2
    assert bytes_for_token(CONFIG, 300) - bytes_for_token(CONFIG) == 300 * per_token
    shape = Shape.of(CONFIG)
    assert cache_bytes(shape, Setting(1, training=False), 1, 28) == per_token


class Kernels(TorchDispatchMode):
    """Counts operations that a GPU would run a kernel for: those whose result is not a view of what went in."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and func.namespace == "aten" and "empty" not in func.__name__
        return func(*args, **(kwargs or {}))


def test_number_of_kernels_is_about_what_a_step_runs():
    """The count of the profiler on an H100 against the operations of a narrow model with as many blocks."""
    ids = tokenizer()(["你好"], return_tensors="pt")["input_ids"]
    found = {}
    for layers in (2, 4):
        config = ChatGLMConfig.from_dict(model().config.to_dict() | {"num_layers": layers})
        decoder = Decoder(ChatGLMForConditionalGeneration(config).eval())
        decoder.generate(ids, max_new_tokens=2)
        with Kernels() as kernels:
            for stage in decoder.stages:
                stage.run()
        found[layers] = kernels.count
    wanted = found[2] + (found[4] - found[2]) / 2 * 26
    assert 0.7 * wanted <= MEASURED.launches <= 1.3 * wanted


def test_a_slow_memory_and_a_slow_host_set_the_pace():
    t4, h100 = token_time(CONFIG, "T4", 0.03), token_time(CONFIG, "H100", 0.03)
    assert t4.plain == t4.memory > t4.host
    assert h100.plain == h100.host > h100.memory
    assert t4.tokens_per_s[1] == pytest.approx(320e9 / bytes_for_token(CONFIG, 512))
    assert token_time(CONFIG, "T4", 0.05).plain == 0.05


@given(st.floats(1e-6, 1e-3), st.floats(0, 1e-3), st.integers(1, 40))
def test_no_kernel_runs_before_its_launch_or_beside_another(work, launch, kernels):
    launched, begins = timeline(work, launch, kernels)
    assert len(launched) == len(begins) == kernels
    assert all(begin >= ready for begin, ready in zip(begins, launched, strict=True))
    assert all(later - sooner >= work * (1 - 1e-9) for sooner, later in itertools.pairwise(begins))
    end = begins[-1] + work
    assert end == pytest.approx(launch + work + (kernels - 1) * max(work, launch))


CASE = {"what": "decode", "gpus": 1, "prompt": 64, "adapter": "unmerged", "floor_ms": 4.0}
LINES = [
    {"what": "machine", "device": "H100"},
    {**CASE, "way": "fixed", "ms_per_token": 25.0},
    {**CASE, "way": "fixed", "ms_per_token": 20.0},
    {**CASE, "way": "graphs", "ms_per_token": 8.0, "prompt": 512},
    {**CASE, "way": "graphs", "ms_per_token": 6.25},
    {**CASE, "way": "graphs", "ms_per_token": 5.0, "gpus": 2},
    {**CASE, "skipped": "out of time"},
    {"what": "kernels", "launches_per_token": 500, "kernel_ms_per_token": 6.0},
]


def written(path, lines):
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_lines_of_the_benchmark_become_bars(tmp_path):
    speeds = read_speeds(written(tmp_path / "x.jsonl", LINES))
    assert (speeds.device, speeds.limit, speeds.launches, speeds.kernel_seconds) == ("H100", 250.0, 500, 0.006)
    assert (speeds.host_seconds, speeds.graph_seconds) == (0.02, 0.00625), "of two lines on a case the later one"
    assert speeds.tokens_per_s("graphs") == (125, 160), "on one GPU"
    axes = plot_speeds(speeds.ranges(), speeds.limit)
    assert [bar.get_width() for bar in axes.patches] == [50, 125, 200, 0, 35, 0], "the slowest, and what is above it"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["fixed, 1 GPU", "graphs, 1 GPU", "graphs, 2 GPUs"]
    assert "125 to 160" in [text.get_text() for text in axes.texts]
    assert any("250" in text.get_text() for text in axes.texts)


@pytest.mark.parametrize("lost", [[0], [7], [1, 2, 3, 4, 5]])
def test_incomplete_measurements_are_named(tmp_path, lost):
    path = written(tmp_path / "x.jsonl", [line for at, line in enumerate(LINES) if at not in lost])
    with pytest.raises(ValueError, match=r"x\.jsonl lacks lines: run benchmarks/decode\.py"):
        read_speeds(path)


def test_recorded_speeds_can_be_read():
    assert "H100" in MEASURED.device
    assert MEASURED.tokens_per_s("graphs")[0] >= GOALS["graphs"]
    assert MEASURED.kernel_seconds < MEASURED.graph_seconds < MEASURED.host_seconds
    assert MEASURED.graph_seconds > 1 / MEASURED.limit


def test_bounds_show_gaps_only_where_the_gpu_waits():
    figure = draw_bounds(CONFIG, MEASURED, kernels=6)
    for axes, waits, how in zip(figure.axes, (True, False), ("measured", "predicted"), strict=True):
        plain = [(bar.get_x(), bar.get_width()) for bar in axes.patches if round(bar.get_y() + 0.3) == 1]
        gaps = [later - (x + width) for (x, width), (later, _) in itertools.pairwise(plain)]
        assert len(plain) == 6
        assert all((gap > 0.1) == waits for gap in gaps)
        assert how in axes.get_title(loc="left")
        assert axes.get_xlim()[0] == 0
        assert max(bar.get_x() + bar.get_width() for bar in axes.patches) <= axes.get_xlim()[1], "nothing is cut off"
        assert all(label.get_visible() for label in axes.get_xticklabels()), "ticks of its own"
    assert MEASURED.device in figure.axes[0].get_title(loc="left")
    assert f"first 6 of {MEASURED.launches} kernels" in figure.get_suptitle()
    assert len(figure.legends[0].texts) == 2


def test_the_figure_of_the_cache_counts_what_is_computed():
    figure = draw_decoding(prompt=6, new=5)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        f"without a cache: {6 + 7 + 8 + 9 + 10} computed",
        f"with a cache: {6 + 4} computed",
    ]
    assert [len(axes.patches) for axes in figure.axes] == [40, 40]


def test_labels_are_what_every_font_can_draw():
    ids = [tokenizer().encode(text, add_special_tokens=False)[-1] for text in ("the", "你", "\n")]
    assert token_labels(tokenizer(), ids) == [f"the\n{ids[0]}", str(ids[1]), str(ids[2])]


def test_top_p_figure_counts_the_tokens_that_are_kept():
    values = [0.5, 0.3, 0.1, 0.1]
    axes = plot_top_p({"temperature 1": values[::-1]}, 0.7)
    assert [text.get_text() for text in axes.get_legend().texts] == ["temperature 1: keeps 2 of 4"]
    assert np.allclose(axes.lines[0].get_ydata(), [0.5, 0.8, 0.9, 1.0])


def test_cache_figure_shows_the_planners_bytes():
    axes = plot_cache(CONFIG, (256, 2048))
    shape, setting = Shape.of(CONFIG), Setting(1, training=False)
    wanted = [cache_bytes(shape, setting, tokens, 28) / GIB for tokens in (256, 2048)]
    assert [bar.get_height() for bar in axes.patches] == wanted
