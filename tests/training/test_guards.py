"""Training that has gone wrong stops with the cause, the knob and the last good checkpoint."""

import math
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from glmhelpers.cost_model.gpus import CATALOGUE
from glmhelpers.cost_model.step_memory import predict
from glmhelpers.devicemap.plan import plan_device_map
from glmhelpers.lora.attach import attach_lora
from glmhelpers.training import finetune as training
from glmhelpers.training import memory_plan as fit
from glmhelpers.training import trainer
from glmhelpers.training.guards import (
    Guard,
    NoLabelsError,
    TrainingStoppedError,
    gradients_finite,
    refuse_many_processes,
)
from glmhelpers.training.memory_plan import CardState, describe
from tests.helpers.reference import fresh_model
from tests.helpers.resumable_run import ScaledTrainer, run
from thuglm import ChatGLMConfig

GIB = 2**30


class At(TrainerCallback):
    """Do something to the model before a step."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.what(model)


def spoil(value):
    def what(model):
        with torch.no_grad():
            model.base_model.model.transformer.final_layernorm.bias.fill_(value)

    return what


@pytest.mark.parametrize(("value", "seen"), [(math.nan, "nan"), (3e38, "nan|inf")])
def test_a_loss_that_is_no_number_stops_before_anything_is_learnt(value, seen, tmp_path):
    with pytest.raises(TrainingStoppedError, match=f"the loss of step 7 is ({seen})") as error:
        run(tmp_path, [At(7, spoil(value))])
    assert "Lower the learning rate (it is 0.005)" in str(error.value)
    (folder,) = tmp_path.iterdir()
    assert f"The last good checkpoint is {folder / 'checkpoint-5'}" in str(error.value)
    stored = load_file(folder / "checkpoint-5" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in stored.values())
    log, _ = run(tmp_path)
    assert log[-1]["step"] == 26, "with a sound base the same run goes on"


def test_a_loss_of_exactly_zero_stops(tmp_path, monkeypatch):
    real = trainer.run_step
    monkeypatch.setattr(trainer, "run_step", lambda *args, **kwargs: real(*args, **kwargs) * 0)
    with pytest.raises(TrainingStoppedError, match=r"loss of step 1 is exactly 0.*labels.*notebook 02"):
        run(tmp_path)


def spoil_gradients(model, times=None):
    """The gradient of one lora_B becomes infinite, always or so many times."""
    left = [times]

    def hook(gradient):
        if left[0] is None or left[0] > 0:
            left[0] = None if left[0] is None else left[0] - 1
            return torch.full_like(gradient, math.inf)
        return gradient

    next(p for name, p in model.named_parameters() if "lora_B" in name).register_hook(hook)


def test_gradients_that_are_no_numbers_stop_where_no_loss_scale_looks_at_them(tmp_path, monkeypatch):
    monkeypatch.setattr(ScaledTrainer, "__init__", trainer.GLMTrainer.__init__)
    with pytest.raises(TrainingStoppedError, match="gradients of step 3 are not finite, though its loss is"):
        run(tmp_path, [At(3, spoil_gradients)])


def test_steps_skipped_for_ever_stop_and_some_skipped_steps_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr("glmhelpers.training.trainer.Guard", lambda last_good: Guard(last_good, skips_allowed=4))
    with pytest.raises(
        TrainingStoppedError, match=r"the last 4 steps up to step 6 were skipped.*scaled by 32\b"
    ) as error:
        run(tmp_path / "for ever", [At(3, spoil_gradients)])
    assert "max_grad_norm (1)" in str(error.value)
    # Gradients are accumulated, one, two and two in steps 3 to 5: three bad steps.
    log, _ = run(tmp_path / "sometimes", [At(3, lambda model: spoil_gradients(model, 5))], max_steps=8)
    assert log[-1]["step"] == 8


def test_a_batch_without_labels_is_refused(tmp_path, monkeypatch):
    good, bad = ([{"input_ids": [5, 6, 2657, 2660, 9], "labels": [-100] * 4 + [label]}] for label in (9, -100))
    monkeypatch.setattr("tests.helpers.resumable_run.rows", lambda: good * 12 + bad * 4 + good * 6)
    with pytest.raises(NoLabelsError, match=r"step \d, 4 rows, has no label.*length limit.*max_length") as error:
        run(tmp_path, train_sampling_strategy="sequential", save_steps=1)
    assert isinstance(error.value, ValueError)
    assert "step 2, 4 rows" in str(error.value)
    assert str(error.value).endswith("checkpoint-1.")


def test_gradients_are_looked_at_as_a_whole():
    model = torch.nn.Linear(3, 3)
    assert gradients_finite(model)
    model.weight.grad = torch.ones(3, 3)
    assert gradients_finite(model)
    model.bias.grad = torch.tensor([0.0, -math.inf, math.inf])
    assert not gradients_finite(model)


# Several processes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "2", "RANK": "0"},
        {"LOCAL_RANK": "0", "WORLD_SIZE": "1"},
        {"OMPI_COMM_WORLD_SIZE": "4"},
        {"TORCHELASTIC_RUN_ID": "none"},
    ],
)
def test_several_processes_are_told_the_right_road(environment):
    with pytest.raises(RuntimeError, match=r"one of several processes.*torchrun .*-m glmhelpers\.distributed"):
        refuse_many_processes(environment)


def test_one_process_is_welcome():
    refuse_many_processes({})
    refuse_many_processes({"WORLD_SIZE": "1", "SLURM_NTASKS": "8"})


def test_torchrun_is_refused_before_anything_waits_for_others(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="WORLD_SIZE=2"):
        training.training_arguments(tmp_path, False)


# Out of memory ---------------------------------------------------------------------------------------------------------

ERROR = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 14.75 GiB of which 1.2 GiB is free."
)
T4 = int(14.75 * GIB)
SETTINGS = {
    "lora_rank": 8,
    "lora_targets": ("query_key_value",),
    "lora_dropout": 0.1,
    "dtype": "float16",
    "base_bits": 16,
}


def two_t4(others=0):
    return [CardState(0, "Tesla T4", T4, 9 * GIB), CardState(1, "Tesla T4", T4, 14 * GIB, others)]


def explained(rows, length, parts=1, others=0, settings=SETTINGS):
    config = ChatGLMConfig()
    device_map = plan_device_map(config, ["T4", "T4"], 4, 1024, "memory").device_map
    rows += -rows % parts
    now = predict(config, device_map, rows, length, gpus=[T4, T4], micro_batches=parts, **settings)
    text = describe(ERROR, "step 3", two_t4(others), config, now)
    return config, device_map, text


def test_out_of_memory_names_the_gpu_the_figures_and_a_plan_that_fits():
    config, device_map, text = explained(32, 1024)
    assert text.startswith("GPU 1 (Tesla T4) ran out of memory in step 3.")
    now = predict(config, device_map, 32, 1024, gpus=[T4, T4])
    predicted = f"predicted {now.peak_bytes[1] / GIB:.2f}, with slack and context {now.total_bytes[1] / GIB:.2f}"
    assert f"GPU 1: measured peak of tensors 14.00 GiB, {predicted} of 14.75 GiB" in text
    assert now.total_bytes[1] > T4
    plan = plan_device_map(config, ["T4", "T4"], 32, 1024, "speed")
    assert f"micro_batches={plan.micro_batches}, loss_chunk={plan.setting.loss_chunk}" in text
    assert plan.fits
    assert str(plan) in text
    assert "plan = run.plan(config, 32, 1024, objective='speed');" in text


def test_out_of_memory_of_a_batch_that_no_plan_fits_says_how_many_rows_do():
    _, _, text = explained(96, 1024, parts=8)
    assert "No plan fits this batch. The nearest that fits has" in text
    assert "gradient_accumulation_steps" in text
    assert "blocks 0-" in text


def test_out_of_memory_beside_another_process_says_so():
    _, _, text = explained(4, 1024, others=6 * GIB)
    assert "6.00 GiB are held by other processes (nvidia-smi)" in text
    assert f"run.plan(config, 4, 1024, objective='memory', reserve=[0, {6 * GIB}])" in text


def test_the_call_that_makes_the_plan_keeps_the_adapter_and_the_base():
    _, _, text = explained(4, 1024, settings={**SETTINGS, "lora_rank": 16, "base_bits": 8})
    assert "objective='memory', lora_rank=16, base_bits=8)" in text


def test_a_gpu_without_a_part_of_the_model_has_no_prediction():
    config = ChatGLMConfig()
    now = predict(config, plan_device_map(config, ["T4"], 1, 256).device_map, 1, 256, gpus=[T4, T4], **SETTINGS)
    assert "GPU 1: measured peak of tensors 14.00 GiB of 14.75 GiB, nothing predicted" in describe(
        ERROR, "step 3", two_t4(), config, now
    )


def test_out_of_memory_against_the_prediction_is_answered_with_the_most_careful_plan():
    config, _, text = explained(4, 1024)
    assert str(plan_device_map(config, ["T4", "T4"], 4, 1024, "memory")) in text


def test_a_batch_that_cannot_be_cut_evenly_is_predicted_as_the_next_larger_one():
    model = attach_lora(fresh_model())
    found = fit.predict_training(model, 7, 512, micro_batches=4, loss_chunk=99)
    assert found.setting.batch_size == 8
    assert found.setting.loss_chunk == 99
    assert found.devices == ("cpu",)


def test_out_of_memory_in_training_is_explained_and_lets_go_of_its_tensors(tmp_path, monkeypatch):
    class Big:
        """Stands for the tensors of the step that failed."""

    alive = []

    def fail(*args, **kwargs):
        big = Big()
        alive.append(weakref.ref(big))
        raise torch.OutOfMemoryError(ERROR)

    monkeypatch.setattr(trainer, "run_step", fail)
    monkeypatch.setattr(fit, "card_states", lambda: two_t4())
    with pytest.raises(
        torch.OutOfMemoryError, match=r"GPU 1 \(Tesla T4\) ran out of memory in step 1, a batch of"
    ) as error:
        run(tmp_path)
    assert "4 x " in str(error.value)
    assert "in 2 micro-batches" in str(error.value)
    assert alive
    assert alive[0]() is None, "the failed step's tensors are still held"
    assert sys.getrefcount(error.value) > 0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(ERROR),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_without_a_gpu_is_explained(error, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(trainer, "run_step", fail)
    monkeypatch.setattr(fit, "card_states", list)
    expected = (
        r"^This machine's memory ran out in step 1, a batch of 4 x \d+ tokens in 2 micro-batches: [\d.]+ GiB are free "
        r"now; predicted for this batch, with the weights, 0\.0\d GiB, for one row 0\.0\d\. .*fewer rows a batch"
    )
    with pytest.raises(torch.OutOfMemoryError, match=expected):
        run(tmp_path)


def test_what_torch_really_says_without_memory_is_known():
    with pytest.raises(RuntimeError) as error:
        torch.empty(10**15)
    assert fit.out_of_memory(error.value)
    assert not fit.out_of_memory(RuntimeError("shape '[2]' is invalid"))


def test_another_error_of_a_step_stays_what_it_is(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(trainer, "run_step", fail)
    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        run(tmp_path)


def test_a_training_stopped_by_hand_lets_go_of_its_tensors(tmp_path, monkeypatch):
    class Big:
        """Stands for the tensors of the step that was stopped."""

    alive = []

    def stopped(*args, **kwargs):
        big = Big()
        alive.append(weakref.ref(big))
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "run_step", stopped)
    with pytest.raises(KeyboardInterrupt) as error:
        run(tmp_path)
    assert error.value.__traceback__ is not None, "a notebook keeps it, too"
    assert alive[0]() is None, "the stopped step's tensors are still held"


@pytest.mark.parametrize(
    ("name", "gib", "known"),
    [
        ("Tesla T4", 14.56, "T4"),
        ("Tesla P100-PCIE-16GB", 15.9, "P100"),
        ("NVIDIA L4", 22.0, "L4"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "A100"),
        ("NVIDIA H100 80GB HBM3", 79.1, "H100"),
        ("NVIDIA A10G", 22.0, "22 GiB"),
        ("NVIDIA GeForce RTX 4090", 23.5, "23.5 GiB"),
    ],
)
def test_cards_are_known_by_the_names_their_drivers_give(name, gib, known):
    gpu = fit.known_gpu(name, int(gib * GIB))
    assert (gpu.name, gpu.memory) == (known, int(gib * GIB))
    if known in CATALOGUE:
        assert gpu == replace(CATALOGUE[known], memory=gpu.memory)


def test_the_explanation_reads_the_model_itself():
    model = attach_lora(fresh_model(), r=4, dropout=0.2)
    assert fit.model_settings(model) == {**SETTINGS, "lora_rank": 4, "lora_dropout": 0.2, "dtype": "float32"}
    assert fit.checkpointed(model) == []
