"""The recorder sees each micro-batch once on each stage, in an order that a step can have."""

import pytest
import torch

from glmhelpers.cost_model.step_time import StageTime, schedule
from glmhelpers.devicemap.activation_checkpointing import checkpoint_only
from glmhelpers.training.pipeline import run_step
from glmhelpers.training.step_recorder import StepRecorder, idle_shares
from tests.helpers.reference import fresh_model
from tests.helpers.tiny_models import lora, the_batch


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_every_micro_batch_is_seen_once_on_each_stage(parts, checkpointed):
    model = lora(fresh_model()).train()
    if checkpointed:
        checkpoint_only(model, range(4))
    with StepRecorder(model, cut=(1, 3)) as recorder:
        run_step(model, the_batch(), parts, backward=recorder.backward)
    tasks = recorder.tasks()
    seen = {(task.gpu, task.kind, task.micro_batch) for task in tasks}
    assert len(tasks) == len(seen) == 2 * 2 * parts
    assert all(task.end >= task.start >= 0 for task in tasks)
    at = {(task.gpu, task.kind, task.micro_batch): task for task in tasks}
    for part in range(parts):
        assert at[0, "forward", part].end <= at[1, "forward", part].start
        assert at[1, "forward", part].end <= at[1, "backward", part].start
        assert at[1, "backward", part].end <= at[0, "backward", part].end
    assert max(t.end for t in tasks if t.kind == "forward") <= min(t.start for t in tasks if t.kind == "backward")
    assert all(0 <= share < 1 for share in idle_shares(tasks))


def test_micro_batches_that_go_back_at_once_are_seen_too():
    model = lora(fresh_model()).train()
    with StepRecorder(model, cut=(1, 3)) as recorder:
        run_step(model, the_batch(), 3, in_flight=1, backward=recorder.backward)
    order = [(task.kind, task.micro_batch) for task in recorder.tasks() if task.gpu == 1]
    assert order == [(kind, part) for part in range(3) for kind in ("forward", "backward")]


def test_recording_changes_no_gradient_and_leaves_no_hook():
    model = lora(fresh_model()).train()
    run_step(model, the_batch(), 2)
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    with StepRecorder(model, cut=(2, 2)) as recorder:
        run_step(model, the_batch(), 2, backward=recorder.backward)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, want[name])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_idle_shares_of_a_known_schedule():
    """Two equal stages, one micro-batch: each waits for half of the step; with many parts nearly none."""
    even = [StageTime(1.0, 2.0), StageTime(1.0, 2.0)]
    assert idle_shares(schedule(even, 1)) == pytest.approx([0.5, 0.5])
    assert max(idle_shares(schedule(even, 50))) < 0.05


def test_cut_must_hold_all_blocks():
    with pytest.raises(ValueError, match=r"cut .* has 3 blocks, the model has 4"):
        StepRecorder(fresh_model(), cut=(1, 2))


def test_without_a_step_there_is_no_share():
    with pytest.raises(ValueError, match="no step has run"):
        idle_shares([])
