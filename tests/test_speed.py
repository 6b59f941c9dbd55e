"""The time of a token: bytes of the real model, kernels counted, the two lanes of the picture, and the figures."""

import itertools
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import model, tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from glmhelpers.decode import Decoder
from glmhelpers.gpus import GIB
from glmhelpers.memory import cache_bytes
from glmhelpers.plots_inference import draw_bounds, plot_cache, plot_speeds, plot_top_p
from glmhelpers.runtime import find_project
from glmhelpers.shapes import Setting, Shape
from glmhelpers.speed import (
    KERNELS_BESIDE,
    KERNELS_PER_BLOCK,
    bytes_for_token,
    read_speeds,
    timeline,
    token_time,
)
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration

CONFIG = ChatGLMConfig()


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
    decoder = Decoder(model())
    ids = tokenizer()(["你好"], return_tensors="pt")["input_ids"]
    decoder.generate(ids, max_new_tokens=2)
    with Kernels() as kernels:
        for stage in decoder.stages:
            stage.run()
    wanted = KERNELS_PER_BLOCK * 4 + KERNELS_BESIDE
    assert 0.75 * wanted <= kernels.count <= 1.25 * wanted


def test_a_t4_waits_for_its_memory_and_an_h100_for_the_host():
    t4, h100 = token_time(CONFIG, "T4"), token_time(CONFIG, "H100")
    assert t4.plain == t4.memory > t4.host
    assert h100.plain == h100.host > h100.memory
    assert t4.tokens_per_s[1] == pytest.approx(320e9 / bytes_for_token(CONFIG, 512))


@given(st.floats(1e-6, 1e-3), st.floats(0, 1e-3), st.integers(1, 40))
def test_no_kernel_runs_before_its_launch_or_beside_another(work, launch, kernels):
    launched, begins = timeline(work, launch, kernels)
    assert len(launched) == len(begins) == kernels
    assert all(begin >= ready for begin, ready in zip(begins, launched, strict=True))
    assert all(later - sooner >= work * (1 - 1e-9) for sooner, later in itertools.pairwise(begins))
    end = begins[-1] + work
    assert end == pytest.approx(launch + work + (kernels - 1) * max(work, launch))


def test_lines_of_the_benchmark_become_bars(tmp_path):
    case = {"bench": "decode", "what": "decode", "gpus": 1, "prompt": 64, "adapter": "merged", "floor_ms": 4.0}
    lines = [
        {"label": "old", "tokens_per_s": 31},
        {"what": "machine", "device": "H100"},
        {**case, "way": "plain", "tokens_per_s": 80.0},
        {**case, "way": "graphs", "tokens_per_s": 170.0, "prompt": 512},
        {**case, "way": "graphs", "tokens_per_s": 160.0},
        {**case, "skipped": "out of time"},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    cases = {"old": 31, "plain, adapter merged": 80.0, "graphs, adapter merged": 160.0}
    assert read_speeds(path) == ("H100", cases, 250.0)
    axes = plot_speeds(*read_speeds(path)[1:])
    assert [bar.get_width() for bar in axes.patches] == [31, 80, 160]
    assert any("250" in text.get_text() for text in axes.texts)


def test_recorded_speeds_can_be_read():
    device, cases, _ = read_speeds(find_project() / "notebooks" / "assets" / "decode_h100.jsonl")
    assert "H100" in device
    assert cases["published code of 2023"] == 31


def test_bounds_show_gaps_only_where_the_gpu_waits():
    figure = draw_bounds(CONFIG, kernels=6)
    for axes, waits in zip(figure.axes, (False, True), strict=True):
        plain = [(bar.get_x(), bar.get_width()) for bar in axes.patches if round(bar.get_y() + 0.3) == 1]
        gaps = [later - (x + width) for (x, width), (later, _) in itertools.pairwise(plain)]
        assert len(plain) == 6
        assert all((gap > 0.1) == waits for gap in gaps)
        assert "predicted" in axes.get_title(loc="left")


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
