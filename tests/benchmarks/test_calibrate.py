"""A trial of calibrate.py on the CPU: its head is tied as long as a plan allows it, and short steps are timed often."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import calibrate
from glmhelpers.cost_model.sizes import Setting
from glmhelpers.devicemap.check import part_names
from thuglm import ChatGLMConfig

CONFIG = ChatGLMConfig.from_pretrained(calibrate.TINY)


def test_behind_a_plan_for_two_gpus_the_head_is_tied_again():
    """Else the next plan on one GPU holds a second matrix, 1.07 GB at full size."""
    trial = calibrate.Trial(CONFIG, 0)
    net = trial.model.get_base_model()
    whole = dict.fromkeys(part_names(CONFIG.num_layers), "cpu")
    for _ in range(2):
        net.place(whole)
        assert net.lm_head.weight is net.transformer.word_embeddings.weight
        net.place(whole | {"lm_head": "meta"})
        assert net.lm_head.weight.is_meta


@pytest.mark.parametrize(
    ("each", "steps", "median"), [([60.0, 50.0, 52.0], 12, 52.0), ([900.0, 500.0, 700.0], 3, 700.0)]
)
def test_short_steps_are_timed_often_and_long_ones_three_times(monkeypatch, each, steps, median):
    trial, clock, count = calibrate.Trial(CONFIG, 0), [0.0], []

    def run_step(*_, **__):
        clock[0] += 1e-3 * each[(len(count) - 1) % 3] if count else 100.0
        count.append(1)

    monkeypatch.setattr(calibrate, "run_step", run_step)
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: clock[0])
    plan = SimpleNamespace(apply=lambda model: [], setting=Setting(1, 16))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        timed = trial.run(plan, 1, 16, 3)
    assert len(count) == 1 + steps
    assert (timed.ms, timed.least_ms) == (median, min(each))
