"""Training with recorded steps, on the CPU with a stand-in for CUDA graphs: no bit of a run depends on them."""

from types import SimpleNamespace

import pytest
import torch

from glmhelpers.devicemap.captured import ON_CPU, Captured
from glmhelpers.lora.attach import adapter_weights, attach_lora
from glmhelpers.training import finetune
from tests.helpers.graph_home import Home, Never
from tests.helpers.reference import fresh_model
from tests.helpers.resumable_run import StopAt, run

FEW = {"max_steps": 7, "save_steps": 3, "eval_steps": 4, "logging_steps": 1}


@pytest.fixture
def recorders(monkeypatch):
    """Every recorder that a training makes; their kind is `kind`."""
    made = []

    def make(model):
        made.append(make.kind(model))
        return made[-1]

    make.kind, make.made = (lambda model: Captured(model, Home)), made
    monkeypatch.setattr(finetune, "Captured", make)
    return make


def result(folder, callbacks=()):
    log, model = run(folder, callbacks, cuda_graphs=None, **FEW)
    facts = [(entry["step"], entry.get("loss"), entry.get("eval_loss"), entry.get("grad_norm")) for entry in log]
    return facts, adapter_weights(model)


def test_a_training_with_graphs_is_the_training_without_even_if_it_was_stopped(recorders, tmp_path, capsys):
    seen = []
    real = Captured.forget
    Captured.forget = lambda self: (seen.append(len(self.known)), real(self))[1]
    try:
        facts, weights = result(tmp_path / "graphs")
        with pytest.raises(KeyboardInterrupt):
            result(tmp_path / "stopped", [StopAt(5)])
        gone_on = result(tmp_path / "stopped")
    finally:
        Captured.forget = real
    assert max(seen) > 0
    assert not any(recorder.known for recorder in recorders.made), "their memory was not given back"
    assert "without CUDA graphs" not in capsys.readouterr().out
    recorders.kind = Never
    for others, other_weights in (gone_on, result(tmp_path / "without")):
        assert others == facts
        for name, weight in weights.items():
            assert torch.equal(other_weights[name], weight), name


def test_no_room_half_way_changes_no_training(recorders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Home, "room", 9)
    facts, weights = result(tmp_path / "graphs")
    assert capsys.readouterr().out.count("without CUDA graphs: no room") == 1
    recorders.kind = Never
    others, other_weights = result(tmp_path / "without")
    assert facts == others
    assert all(torch.equal(other_weights[name], weight) for name, weight in weights.items())


def test_graphs_are_taken_where_they_can_be_and_the_reason_is_said_where_not(capsys):
    model = attach_lora(fresh_model())
    assert finetune.captured_for(model, None, None) is None  # blocks on the CPU: nothing to say
    assert finetune.captured_for(model, False, None) is None
    assert capsys.readouterr().out == ""
    wanted = finetune.captured_for(model, True, None)
    assert wanted is not None
    assert wanted.look()[0] == ON_CPU


@pytest.mark.parametrize("room", [True, False])
def test_a_plan_without_room_for_graphs_is_trained_without(room, recorders, capsys):
    model = attach_lora(fresh_model())
    plan = SimpleNamespace(graphs_fit=room)
    assert (finetune.captured_for(model, None, plan) is not None) == room
    assert ("the plan leaves no room" in capsys.readouterr().out) != room
    assert finetune.captured_for(model, True, plan) is not None


def test_hooks_on_a_block_are_named(recorders, capsys):
    model = attach_lora(fresh_model())
    model.get_base_model().transformer.layers[2].attention.register_forward_hook(lambda *_: None)
    assert finetune.captured_for(model, None, None) is None
    assert "without CUDA graphs: a hook on attention" in capsys.readouterr().out
