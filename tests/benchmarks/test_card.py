"""The card of a machine: every figure is there, and the line can be read back."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import card
from glmhelpers.cost_model.gpus import find_gpus
from glmhelpers.devicemap import plan_device_map
from thuglm import ChatGLMConfig


def test_the_last_line_is_the_card(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["card.py", "--tiny", "--repeats", "1"])
    card.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["torch"] == torch.__version__
    assert [(step["rows"], step["length"]) for step in found["steps"]] == [(4, 64), (16, 56)]
    for step in found["steps"]:
        assert sum(step["blocks"]) == 8
        assert min(step["ms"], step["predicted_ms"], *step["predicted_peak_gib"]) > 0
        assert len(step["peak_gib"]) == len(found["gpus"]) == torch.cuda.device_count()
    assert min(found["decode"]["tokens_per_s"], found["load"]["gb_per_s"]) > 0


def test_the_step_has_as_many_micro_batches_in_flight_as_its_plan(monkeypatch):
    config, seen = ChatGLMConfig.from_pretrained(card.TINY), []
    (small,) = find_gpus(["55MiB"])
    free = dict.fromkeys(("context", "gemm_workspace", "launch_forward", "launch_again", "launch_backward"), 0)
    small = replace(small, **free)
    plan = plan_device_map(config, [small], 4, 128, label_share=0.5)
    assert plan.setting.waves  # with all of them it would run blocks again
    monkeypatch.setattr(
        card, "run_step", lambda *_, micro_batches, in_flight, **__: seen.append((micro_batches, in_flight))
    )
    found = card.training_step(config, [small], 4, 128, 1)
    assert set(seen) == {(plan.micro_batches, 1)}
    assert found["in_flight"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_full_size_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["card.py"])
    with pytest.raises(SystemExit, match="--tiny"):
        card.main()
