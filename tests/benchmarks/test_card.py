"""The card of a machine: every figure is there, and the line can be read back."""

import json
import sys

import pytest
import torch

from benchmarks import card


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_full_size_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["card.py"])
    with pytest.raises(SystemExit, match="--tiny"):
        card.main()
