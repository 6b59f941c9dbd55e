"""The step and the evaluation inside the Trainer, the base's checksum, and what is recorded beside an adapter."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import TrainerCallback

from glmhelpers.devicemap.activation_checkpointing import checkpoint_only
from glmhelpers.devicemap.plan import plan_device_map
from glmhelpers.inference.batch import Comparison
from glmhelpers.inference.scores import kept
from glmhelpers.lora.adapter import load_adapter, save_adapter
from glmhelpers.lora.attach import adapter_weights, attach_lora
from glmhelpers.lora.fingerprint import base_checksum, fingerprint, tensor_sums
from glmhelpers.lora.proof import prove
from glmhelpers.tokens.collate import RightPadCollator
from glmhelpers.training import trainer as trainer_module
from glmhelpers.training.checkpoint_manager import run_settings
from glmhelpers.training.finetune import train, training_arguments
from glmhelpers.training.guards import NoLabelsError
from glmhelpers.training.memory_plan import model_settings
from glmhelpers.training.progress import Watch
from glmhelpers.training.trainer import GLMTrainer, SameOrderSampler
from tests.helpers.reference import fresh_model, tokenizer
from tests.helpers.resumable_run import rows
from tests.helpers.storage_tracker import StorageTracker

ROWS = rows(12)


class KeepGradients(TrainerCallback):
    """The gradients of the first step, before the optimizer uses them."""

    def __init__(self):
        self.found = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def random_lora(dropout=0.0):
    """An adapter whose B is not 0, so that every gradient is not 0 either."""
    model = attach_lora(fresh_model(), dropout=dropout)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def first_step(tmp_path, batch, accumulate, parts, layers=None, dropout=0.0, **how):
    model, keep = random_lora(dropout), KeepGradients()
    if layers is not None:
        checkpoint_only(model, layers)
    changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
    arguments = training_arguments(
        tmp_path, False, max_steps=1, max_grad_norm=0.0, logging_steps=1, save_strategy="no", **changes
    )
    how = {"micro_batches": parts, "loss_chunk": 7, "callbacks": [keep], **how}
    log = train(model, ROWS, RightPadCollator(tokenizer()), arguments, **how)
    return log[0]["loss"], keep.found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return first_step(tmp_path_factory.mktemp("whole"), 12, 1, 1)


@pytest.mark.parametrize("layers", [None, (0, 2), range(4)], ids=["kept", "some", "checkpointed"])
@pytest.mark.parametrize(("batch", "accumulate", "parts"), [(12, 1, 3), (12, 1, 5), (3, 4, 1), (5, 3, 2)])
def test_however_a_batch_is_cut_loss_and_gradients_are_the_same(batch, accumulate, parts, layers, whole, tmp_path):
    loss, gradients = first_step(tmp_path, batch, accumulate, parts, layers)
    assert loss == pytest.approx(whole[0], abs=1e-5)
    assert gradients.keys() == whole[1].keys()
    for name, gradient in whole[1].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("batch", "accumulate", "parts", "in_flight"), [(12, 1, 5, 2), (12, 1, 3, 1), (5, 3, 4, 2)])
def test_a_few_micro_batches_in_flight_give_the_same_loss_and_gradients(
    batch, accumulate, parts, in_flight, whole, tmp_path
):
    loss, gradients = first_step(tmp_path, batch, accumulate, parts, (0, 2), in_flight=in_flight)
    assert loss == pytest.approx(whole[0], abs=1e-5)
    for name, gradient in whole[1].items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4)


def test_a_plan_says_how_many_are_in_flight(tmp_path, monkeypatch):
    seen, real = [], trainer_module.run_step

    def spy(model, batch, parts, **how):
        seen.append((parts, how["in_flight"]))
        return real(model, batch, parts, **how)

    monkeypatch.setattr(trainer_module, "run_step", spy)
    model = random_lora()
    how = {**model_settings(model), "checkpointed": "none", "in_flight": 2}
    plan = plan_device_map(model.config, ["1GiB"], 12, 64, micro_batches=6, **how)
    monkeypatch.setattr(type(plan), "apply", lambda self, model: [])  # there may be no GPU here
    first_step(tmp_path, 12, 1, 1, plan=plan)
    assert seen == [(6, 2)]


def test_dropout_in_training_is_repeated_by_recomputation(tmp_path):
    loss, want = first_step(tmp_path, 12, 1, 2, dropout=0.3)
    again, got = first_step(tmp_path, 12, 1, 2, range(4), dropout=0.3)
    assert again == loss
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient)


# Evaluation ------------------------------------------------------------------------------------------------------------


def make_trainer(tmp_path, parts=1, **changes):
    arguments = training_arguments(tmp_path, False, max_steps=4, save_strategy="no", **changes)
    collator = RightPadCollator(tokenizer())
    data = {"train_dataset": ROWS, "eval_dataset": ROWS, "data_collator": collator}
    return GLMTrainer(random_lora(), arguments, micro_batches=parts, forward={"loss_chunk": 9}, **data)


@torch.no_grad()
def loss_row_by_row():
    """Mean over all labels, from all logits, one row at a time: no padding, no chunks, no Trainer."""
    model, total, count = random_lora().eval(), 0.0, 0
    for row in ROWS:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        logits = model(input_ids=ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").item()
        count += int((labels[:, 1:] != -100).sum())
    return total / count


@pytest.mark.parametrize(("eval_batch", "train_batch", "parts"), [(12, 4, 1), (5, 4, 2), (1, 2, 1), (12, 12, 12)])
def test_evaluation_counts_labels_not_batches(eval_batch, train_batch, parts, tmp_path):
    batches = {"per_device_eval_batch_size": eval_batch, "per_device_train_batch_size": train_batch}
    trainer = make_trainer(tmp_path, parts, **batches)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_row_by_row(), abs=1e-5)


def test_rows_without_a_label_count_for_nothing_in_an_evaluation_but_none_at_all_is_refused(tmp_path):
    blank = [{**row, "labels": [-100] * len(row["labels"])} for row in ROWS[:3]]
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=3)
    loss = trainer.evaluate(blank + ROWS)["eval_loss"]
    assert loss == pytest.approx(loss_row_by_row(), abs=1e-5)
    with pytest.raises(NoLabelsError, match="the 3 rows for evaluation have no label"):
        trainer.evaluate(blank)


class Largest(StorageTracker):
    """Also notes the largest number of rows of a tensor as wide as the vocabulary."""

    rows_of_logits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        wide = isinstance(result, torch.Tensor) and result.dim() and result.shape[-1] == 3040
        if wide and StorageWeakRef(result.untyped_storage()) not in self.ignored:
            self.rows_of_logits = max(self.rows_of_logits, result.numel() // 3040)
        return result


def test_evaluation_keeps_no_logits_and_needs_no_more_memory_than_a_step(tmp_path):
    trainer = make_trainer(tmp_path, parts=3, per_device_train_batch_size=12, per_device_eval_batch_size=12)
    collator = RightPadCollator(tokenizer())
    batch = collator(ROWS)
    training, evaluation, larger = Largest(), Largest(), Largest()
    for tracker in (training, evaluation, larger):
        tracker.ignore(*trainer.model.parameters())
    with training:
        trainer.training_step(trainer.model, batch, None)
    with evaluation:
        trainer.evaluate()
    assert evaluation.rows_of_logits == training.rows_of_logits == 9
    assert evaluation.peak <= training.peak
    trainer.forward["loss_chunk"] = 200
    with larger:
        trainer.evaluate()
    assert larger.rows_of_logits > 9, "the tracker sees logits"


def test_evaluation_leaves_the_random_state_and_the_weights_alone(tmp_path):
    trainer = make_trainer(tmp_path)
    state, weights = torch.get_rng_state(), {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, weights[n]) for n, p in trainer.model.named_parameters())
    assert all(p.grad is None for p in trainer.model.parameters())


# What the Trainer would do by itself -----------------------------------------------------------------------------------


def test_batches_stay_on_the_cpu_and_the_model_where_it_is(tmp_path):
    trainer = make_trainer(tmp_path)
    assert trainer.accelerator.device_placement is False
    before = [p.data_ptr() for p in trainer.model.parameters()]
    trainer._move_model_to_device(trainer.model, torch.device("meta"))
    assert [p.data_ptr() for p in trainer.model.parameters()] == before


def test_a_model_on_one_gpu_of_several_is_not_copied_to_all_of_them(tmp_path):
    arguments = training_arguments(tmp_path, False, max_steps=1)
    arguments._n_gpu = 2
    trainer = GLMTrainer(random_lora(), arguments, train_dataset=ROWS, data_collator=RightPadCollator(tokenizer()))
    assert arguments.n_gpu == 1
    assert trainer._train_batch_size == arguments.per_device_train_batch_size


def test_rows_of_similar_length_share_a_batch_in_an_order_that_repeats(tmp_path):
    trainer = make_trainer(tmp_path, per_device_train_batch_size=2)
    sampler = trainer._get_train_sampler()
    assert type(sampler) is SameOrderSampler
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        torch.rand(epoch + 1)  # whatever else draws numbers
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == list(range(12))


# The base --------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.float16, torch.float32, torch.int8]),
    size=st.integers(1, 40),
    data=st.data(),
)
def test_one_flipped_bit_or_two_swapped_values_change_the_sums(dtype, size, data):
    tensor = torch.arange(size, dtype=torch.float32).mul(0.75).sub(9).to(dtype)
    before = tensor_sums(tensor)
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    place, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 8 * tensor.element_size() - 2))
    other = tensor.clone()
    other.view(integers)[place] ^= 1 << bit
    assert tensor_sums(other) != before
    if size > 1 and tensor[0] != tensor[-1]:
        swapped = tensor.clone()
        swapped[0], swapped[-1] = tensor[-1].clone(), tensor[0].clone()
        assert tensor_sums(swapped) != before


def test_pieces_of_a_large_tensor_cannot_change_places(monkeypatch):
    tensor = torch.randn(4, 6)
    whole = tensor_sums(tensor)
    monkeypatch.setattr("glmhelpers.lora.fingerprint.PIECE", 6)
    assert tensor_sums(tensor)[0] == whole[0], "the first sum does not depend on the pieces"
    assert tensor_sums(tensor) != tensor_sums(tensor[[1, 0, 2, 3]])


def test_checksum_sees_every_frozen_weight_and_no_adapter():
    want = base_checksum(fresh_model())
    model = random_lora()
    assert base_checksum(model) == want
    seen = 0
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            continue
        seen += 1
        with torch.no_grad():
            old = parameter.flatten()[-1].clone()
            parameter.view(-1)[-1] = torch.nextafter(old, torch.tensor(9.0))
            assert base_checksum(model) != want, name
            parameter.view(-1)[-1] = old
    assert seen == len(list(fresh_model().parameters()))
    assert base_checksum(model) == want


def test_proof_notices_a_touched_base_and_forgotten_knowledge(tmp_path):
    model = random_lora()
    ids = tokenizer()(["数字3"], return_tensors="pt")["input_ids"]
    before = base_checksum(model)
    reloaded = load_adapter(fresh_model(), save_adapter(model, tmp_path / "adapter"))
    proof = prove(model, reloaded, ids, before, general=(0.97, 0.92))
    assert proof.ok
    assert f"[OK] frozen weights: checksum {before}, as before" in str(proof)
    assert "[OK] general questions: 97% right before, 92% after; 5 points may be lost" in str(proof)
    assert not prove(model, reloaded, ids, before, general=(0.97, 0.91)).ok
    lost = kept(
        [{"question": "什么是月亮？", "expect": "卫星", "answer": "地球的卫星。"}],
        [Comparison("什么是月亮？", "地球的卫星。", "地球的卫星， a good am language model.")],
    )
    garbled = prove(model, reloaded, ids, before, general=lost)
    assert not garbled.ok
    assert "[FAIL] general questions: 100% whole answers before, 0% after; 5 points may be lost" in str(garbled)
    taught = prove(model, reloaded, ids, before, learnt=(0.0, 0.975))
    assert taught.ok
    assert "[OK] what was taught: 0% of the answers before, 98% after" in str(taught)
    assert not prove(model, reloaded, ids, before, learnt=(0.5, 0.5)).ok
    with torch.no_grad():
        model.base_model.model.transformer.layers[3].mlp.dense_4h_to_h.bias[0] += 1e-3
    proof = prove(model, reloaded, ids, before)
    assert not proof.ok
    assert f"[FAIL] frozen weights: {before} became" in str(proof)


def test_settings_are_recorded_beside_the_adapter(tmp_path):
    model = random_lora()
    arguments = training_arguments(tmp_path, False, max_steps=3, learning_rate=1e-3)
    folder = save_adapter(model, tmp_path / "adapter", settings=run_settings(model, ROWS, arguments))
    note = json.loads((folder / "course.json").read_text(encoding="utf-8"))["settings"]
    assert note["base"] == fingerprint(model)
    assert (note["r"], note["alpha"], note["targets"], note["rows"]) == (8, 32, ["query_key_value"], 12)
    assert (note["learning_rate"], note["max_steps"], note["rows_per_step"]) == (1e-3, 3, 8)


def test_a_new_run_from_a_trained_adapter_says_so(tmp_path, capsys):
    arguments = training_arguments(tmp_path, False, max_steps=1, save_strategy="no")
    train(random_lora(), ROWS, RightPadCollator(tokenizer()), arguments, watch=Watch(live=False))
    assert "this adapter is not fresh" in capsys.readouterr().out
    train(attach_lora(fresh_model()), ROWS, RightPadCollator(tokenizer()), arguments, watch=Watch(live=False))
    assert "not fresh" not in capsys.readouterr().out


def test_an_adapter_with_nan_is_neither_saved_nor_loaded(tmp_path):
    model = random_lora()
    folder = save_adapter(model, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"adapter/adapter_model.safetensors: .* holds NaN or infinity"):
        load_adapter(fresh_model(), folder)
    next(iter(adapter_weights(model).values())).data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        save_adapter(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


class SwitchedOff(TrainerCallback):
    """Somebody looks at an answer between two steps, and leaves a part of the model in evaluation mode."""

    def __init__(self):
        self.modes, self.gradients, self.replaced = [], [], False

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        self.replaced = "zero_grad" in vars(model)
        model.get_base_model().transformer.layers[1].eval()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.modes.append(all(module.training for module in model.modules()))


def test_what_each_step_does_in_less_time_is_what_the_trainer_does(tmp_path):
    model, seen = random_lora(), SwitchedOff()
    arguments = training_arguments(tmp_path, False, max_steps=3, save_strategy="no", per_device_train_batch_size=4)
    trainer = GLMTrainer(
        model, arguments, train_dataset=ROWS, data_collator=RightPadCollator(tokenizer()), callbacks=[seen]
    )
    trainer.train()
    assert seen.modes == [True] * 3
    assert seen.gradients == [[]] * 3
    assert seen.replaced
    assert "zero_grad" not in vars(model)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.work = 0
    want = 6 * batch["input_ids"].numel() * model.num_parameters(exclude_embeddings=True)
    assert trainer.floating_point_ops(batch) == trainer.floating_point_ops(batch) == want
    assert trainer.bare(model) is model


def test_a_parameter_in_two_places_is_clipped_once(tmp_path):
    """As the bank of vectors of VB-LoRA is, in every block."""
    model, other = random_lora(), random_lora()
    for each in (model, other):
        first, second, *_ = (part for name, part in each.named_modules() if name.endswith("lora_A.default"))
        second.weight = first.weight
        for number, weight in enumerate(p for p in each.parameters() if p.requires_grad):
            weight.grad = torch.full_like(weight, 1.0 + number)
    arguments = training_arguments(tmp_path, False, max_steps=1, max_grad_norm=1.0)
    trainer = GLMTrainer(model, arguments, train_dataset=ROWS, data_collator=RightPadCollator(tokenizer()))
    norm = trainer._clip_grad_norm(model)
    assert float(norm) == pytest.approx(float(torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)), rel=1e-6)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)
