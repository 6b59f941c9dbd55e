"""Training on a real GPU: the loss scale, the way back from a checkpoint, memory. Skipped without one."""

import contextlib
import gc
import json

import pytest
import torch
from safetensors.torch import load_file

from glmhelpers.devicemap.activation_checkpointing import checkpoint_only
from glmhelpers.lora.attach import adapter_weights, attach_lora
from glmhelpers.tokens.collate import RightPadCollator
from glmhelpers.training import finetune, trainer
from glmhelpers.training.checkpoint_manager import checkpoints
from glmhelpers.training.finetune import train, training_arguments
from glmhelpers.training.progress import Watch
from glmhelpers.utils.units import MIB
from tests.helpers.graph_home import Never
from tests.helpers.reference import fresh_model, tokenizer
from tests.helpers.resumable_run import StopAt, rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

PARTS = ["transformer.word_embeddings", *(f"transformer.layers.{i}" for i in range(4)), "transformer.final_layernorm"]


def halves():
    """Device map over two GPUs."""
    return {name: "cuda:0" if number < 3 else "cuda:1" for number, name in enumerate([*PARTS, "lm_head"])}


def run(output, model, callbacks=(), watch=None, cuda_graphs=False, in_flight=None, **changes):
    how = {
        "max_steps": 12,
        "per_device_train_batch_size": 6,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_steps": 4,
    }
    arguments = training_arguments(output, True, **{**how, **changes})
    examples = rows()
    return train(
        model,
        examples[:18],
        RightPadCollator(tokenizer()),
        arguments,
        examples[18:],
        micro_batches=3,
        watch=watch or Watch(live=False),
        callbacks=callbacks,
        cuda_graphs=cuda_graphs,
        in_flight=in_flight,
    )


def half_model(split):
    places = {"device_map": halves()} if split else {}
    model = fresh_model(torch.float16, **places)
    return attach_lora(model if split else model.cuda(), dropout=0.2)


@pytest.mark.parametrize(("split", "in_flight"), [(False, None), (True, None), (False, 1), (True, 2)])
def test_a_stopped_training_goes_on_with_the_same_losses(split, in_flight, tmp_path):
    """Nearly those of all micro-batches in flight, too, where it has fewer: in float16 their gradients are rounded after
    each, and not after their sum."""
    if split and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    want = [entry["loss"] for entry in run(tmp_path / "unbroken", half_model(split), in_flight=in_flight)]
    if in_flight:
        all_at_once = [entry["loss"] for entry in run(tmp_path / "all", half_model(split))]
        assert want == pytest.approx(all_at_once, rel=1e-3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", half_model(split), [StopAt(6)], in_flight=in_flight)
    got = [entry["loss"] for entry in run(tmp_path / "broken", half_model(split), in_flight=in_flight)]
    assert got == pytest.approx(want, rel=1e-4)
    (folder,) = (tmp_path / "broken").glob("run-*")
    newest = checkpoints(folder)[0]
    assert {"scaler.pt", "rng_state_gpus.pth", "optimizer.pt", "complete.json"} <= {p.name for p in newest.iterdir()}
    (other,) = (tmp_path / "unbroken").glob("run-*/checkpoint-12")
    mine, theirs = (load_file(f / "adapter_model.safetensors") for f in (newest, other))
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, atol=1e-4, rtol=1e-2)


SOME = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 3}


@pytest.mark.parametrize("layers", [(), range(4), (1, 2)])
@pytest.mark.parametrize("split", [False, True])
def test_cuda_graphs_change_no_bit_of_a_training_not_even_of_one_that_was_stopped(
    split, layers, tmp_path, monkeypatch, capsys
):
    if split and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")

    def trained(folder, callbacks=()):
        model = half_model(split)
        checkpoint_only(model, layers)
        log = run(tmp_path / folder, model, callbacks, cuda_graphs=None, **SOME)
        return log, {name: weight.cpu() for name, weight in adapter_weights(model).items()}

    log, weights = trained("graphs")
    with pytest.raises(KeyboardInterrupt):
        trained("stopped", [StopAt(6)])
    gone_on = trained("stopped")
    assert "without CUDA graphs" not in capsys.readouterr().out
    monkeypatch.setattr(finetune, "Captured", Never)
    for other, others in (gone_on, trained("without")):
        assert [(e["step"], e.get("loss"), e.get("eval_loss")) for e in other] == [
            (e["step"], e.get("loss"), e.get("eval_loss")) for e in log
        ]
        for name, weight in weights.items():
            assert torch.equal(others[name], weight), name


def test_graphs_that_find_no_room_leave_the_training_as_it_is(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(finetune, "Captured", Never)
        model = half_model(False)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        want = run(tmp_path / "without", model, max_steps=3, cuda_graphs=None)
    total, peak = torch.cuda.get_device_properties(0).total_memory, torch.cuda.max_memory_reserved(0)
    del model
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((peak + 2**21) / total, 0)
    try:
        got = run(tmp_path / "graphs", half_model(False), cuda_graphs=None, max_steps=3)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
    print(capsys.readouterr().out)
    assert [entry.get("loss") for entry in got] == [entry.get("loss") for entry in want]


def test_labels_are_counted_before_they_leave_the_cpu(tmp_path, monkeypatch):
    seen, real = [], trainer.run_step

    def spy(model, batch, *args, **kwargs):
        seen.append({key: value.device.type for key, value in batch.items()})
        return real(model, batch, *args, **kwargs)

    monkeypatch.setattr(trainer, "run_step", spy)
    run(tmp_path, half_model(False), max_steps=2)
    assert seen
    assert all(set(places.values()) == {"cpu"} for places in seen)


def test_evaluation_costs_no_more_memory_than_training(tmp_path):
    model = half_model(False)
    checkpoint_only(model, range(4))
    watch = Watch(live=False)
    run(tmp_path, model, watch=watch, max_steps=2)
    training = watch.measured["GPU 0"]
    evaluated = Watch(live=False)
    run(tmp_path, model, watch=evaluated, max_steps=2, eval_strategy="steps", eval_steps=1, learning_rate=4e-3)
    assert evaluated.measured["GPU 0"] <= training * 1.01


def test_a_real_out_of_memory_error_is_explained(tmp_path):
    model = half_model(False)
    total = torch.cuda.get_device_properties(0).total_memory
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved(0) / total + 1e-6, 0)
    filling = []
    for size in (2 * MIB, 64 * 1024):  # what the allocator holds and nobody uses would do for such a small batch
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                filling.append(torch.empty(size, device="cuda", dtype=torch.uint8))
    try:
        with pytest.raises(torch.OutOfMemoryError, match=r"ran out of memory in step 1, a batch of 6 x") as error:
            run(tmp_path, model)
    finally:
        filling.clear()
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
    assert "GPU 0: measured peak of tensors" in str(error.value)
    assert "predicted" in str(error.value)
    (marker,) = tmp_path.glob("run-*/checkpoint-0/complete.json")
    assert json.loads(marker.read_text())["step"] == 0
    log = run(tmp_path, model)
    assert log[-1]["step"] == 12, "with the memory back, the same call goes on"
