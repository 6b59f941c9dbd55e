"""The fused LoRA layer against peft's, and the micro-batched step against the whole batch."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef

from glmhelpers.devicemap.activation_checkpointing import checkpoint_only
from glmhelpers.devicemap.devices import head_device
from glmhelpers.lora.layer import FusedLoraLinear, fuse_lora
from glmhelpers.training.pipeline import look_up, run_step, split_batch
from tests.helpers.reference import fresh_model
from tests.helpers.tiny_models import lora, the_batch


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def step(model, **how):
    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    return run_step(model, the_batch(), **how).item(), gradients(model)


# The fused layer -------------------------------------------------------------------------------------------------------


def test_fused_layers_give_the_loss_and_gradients_of_peft():
    plain, fused = lora(fresh_model()), lora(fresh_model())
    assert fuse_lora(fused) == 4
    loss, want = step(plain)
    again, got = step(fused)
    assert again == pytest.approx(loss, abs=1e-5)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-4)


def test_fused_dropout_gradients_are_those_of_autograd():
    """Against the formula written out with the same mask, in float64."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 10).double().requires_grad_(False))
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, lora_dropout=0.4, target_modules=["0"])).double().train()
    fuse_lora(model)
    layer = model.base_model.model[0]
    assert isinstance(layer, FusedLoraLinear)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(7)
    out = layer(x)
    out.square().sum().backward()
    got = x.grad, a.grad, b.grad

    torch.manual_seed(7)
    _, mask = torch.native_dropout(x.detach().reshape(-1, 6), 0.4, True)
    assert 0 < mask.sum() < mask.numel()
    y = x.detach().clone().requires_grad_()
    a2, b2 = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
    dropped = y * mask.view(2, 5, 6) / 0.6
    want = torch.nn.functional.linear(y, layer.weight, layer.bias) + (dropped @ a2.T @ b2.T) * 2.0
    torch.testing.assert_close(out, want)
    want.square().sum().backward()
    for one, other in zip(got, (y.grad, a2.grad, b2.grad), strict=True):
        torch.testing.assert_close(one, other)


def test_fused_layer_in_float16_is_as_near_to_float32_as_peft():
    exact = step(lora(fresh_model()))[1]
    distances = []
    for fuse in (False, True):
        model = lora(fresh_model(torch.float16))
        if fuse:
            fuse_lora(model)
        found = step(model)[1]
        assert all(gradient.dtype == torch.float32 for gradient in found.values())
        distances.append(sum((found[n] - g).norm() / g.norm() for n, g in exact.items()).item() / len(exact))
    assert distances[1] < 1.5 * distances[0] + 0.01


def test_fused_layer_leaves_everything_else_to_peft():
    model = lora(fresh_model())
    ids = the_batch()["input_ids"]
    base, tuned = fresh_model()(input_ids=ids).logits, model.eval()(input_ids=ids).logits
    fuse_lora(model)
    torch.testing.assert_close(model(input_ids=ids).logits, tuned, atol=1e-4, rtol=0)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, base)
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=ids).logits, tuned, atol=1e-3, rtol=0)
    model.unmerge_adapter()
    assert set(model.state_dict()) == set(lora(fresh_model()).state_dict())


@pytest.mark.parametrize("layers", [(), (0, 3), (0, 1, 2, 3)])
def test_fused_dropout_is_repeated_by_recomputation(layers):
    model = lora(fresh_model(), dropout=0.3)
    fuse_lora(model)
    loss, want = step(model)
    checkpoint_only(model, layers)
    again, got = step(model)
    assert again == loss
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, atol=0, rtol=0)


# Micro-batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("parts", [2, 3, 4, 6])
def test_any_number_of_micro_batches_equals_the_whole_batch(parts, checkpointed):
    model = lora(fresh_model())
    if checkpointed:
        checkpoint_only(model, range(4))
    loss, want = step(model)
    again, got = step(model, micro_batches=parts)
    assert again == pytest.approx(loss, abs=1e-5)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layers", [(), (0, 3), range(4)], ids=str)
@pytest.mark.parametrize("parts", [2, 3, 6])
def test_any_number_in_flight_draws_the_same_dropout_and_adds_up_to_the_same(parts, layers):
    model = lora(fresh_model(), dropout=0.3)
    fuse_lora(model)
    checkpoint_only(model, layers)
    loss, want = step(model, micro_batches=parts)
    for in_flight in range(1, parts + 2):
        calls = []
        again, got = step(
            model,
            micro_batches=parts,
            in_flight=in_flight,
            backward=lambda loss, calls=calls: (calls.append(loss.item()), loss.backward()),
        )
        assert again == pytest.approx(loss, abs=1e-6)
        assert sum(calls) == pytest.approx(loss, abs=1e-6)
        assert len(calls) == (parts if in_flight < parts else 1)
        for name, gradient in want.items():
            exactly = {"atol": 0, "rtol": 0} if in_flight >= parts else {"atol": 1e-7, "rtol": 1e-4}
            torch.testing.assert_close(got[name], gradient, **exactly)


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_no_more_micro_batches_are_kept_than_are_in_flight(in_flight):
    """Counted by what autograd keeps of block 1's output: it goes when a micro-batch has been undone."""
    model, kept, most = lora(fresh_model()), [], []

    def count(module, args, output):
        kept.append(StorageWeakRef(output[0].untyped_storage()))
        most.append(sum(not storage.expired() for storage in kept))

    with model.base_model.model.transformer.layers[1].register_forward_hook(count):
        step(model, micro_batches=6, in_flight=in_flight)
    assert most == [min(number, in_flight) for number in range(1, 7)]


def test_embeddings_that_lie_elsewhere_are_looked_up_part_by_part_with_lanes():
    model, order = lora(fresh_model()), []
    loss, want = step(model)
    block = model.base_model.model.transformer.layers[0]
    with (
        model.get_input_embeddings().register_forward_hook(lambda *_: order.append("look-up")),
        block.register_forward_hook(lambda *_: order.append("forward")),
    ):
        again, got = step(model, micro_batches=3, in_flight=2, device=torch.device("cpu", 1))
    assert order == ["look-up", "forward"] * 3
    assert again == pytest.approx(loss, abs=1e-5)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4)


def test_whole_batch_equals_the_plain_loss_from_all_logits():
    model, batch = lora(fresh_model()), the_batch()
    loss, got = step(model, micro_batches=3, loss_chunk=5)
    model.zero_grad()
    logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 3040), batch["labels"][:, 1:].reshape(-1))
    plain.backward()
    assert loss == pytest.approx(plain.item(), abs=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4)


def test_accumulated_steps_equal_the_whole_batch():
    model, batch = lora(fresh_model()), the_batch()
    loss, want = step(model)
    items = int((batch["labels"][:, 1:] != -100).sum())
    model.zero_grad()
    halves = [{key: value[i : i + 3] for key, value in batch.items()} for i in (0, 3)]
    total = sum(run_step(model, half, micro_batches=2, num_items=items).item() for half in halves)
    assert total == pytest.approx(loss, abs=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, want[name], atol=1e-5, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), parts=st.integers(1, 9), seed=st.integers(0, 50))
def test_split_loses_no_row_that_has_a_label(rows, parts, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.where(torch.rand(rows, 4, generator=generator) < 0.5, -100, torch.arange(rows)[:, None])
    batch = {"input_ids": torch.arange(rows * 4).view(rows, 4), "labels": labels}
    if parts > rows or not (labels[:, 1:] != -100).any():
        with pytest.raises(ValueError, match=r"cannot cut|no label"):
            split_batch(batch, parts)
        return
    cut = split_batch(batch, parts)
    assert len(cut) <= parts
    assert all(len(part["target_rows"]) for part in cut)
    found = sorted(int(part["labels"][:, 1:].reshape(-1)[i]) for part in cut for i in part["target_rows"])
    assert found == sorted(labels[:, 1:][labels[:, 1:] != -100].tolist())


def test_embeddings_that_lie_elsewhere_are_looked_up_before_the_first_part():
    """A stand-in for the last GPU: the loss and gradients must not notice, and no look-up may come after a forward."""
    model, order = lora(fresh_model()), []
    loss, want = step(model)
    table = model.get_input_embeddings()
    block = model.base_model.model.transformer.layers[0]
    handles = [
        table.register_forward_hook(lambda *_: order.append("look-up")),
        block.register_forward_hook(lambda *_: order.append("forward")),
    ]
    elsewhere = torch.device("cpu", 1)  # the same memory by another name
    parts = split_batch(the_batch(), 3)
    looked_up = look_up(model, parts, elsewhere)
    assert [torch.equal(e, table.weight[p["input_ids"]]) for e, p in zip(looked_up, parts, strict=True)] == [True] * 3
    assert look_up(model, parts, torch.device("cpu")) == []
    order.clear()
    again, got = step(model, micro_batches=3, device=elsewhere)
    for handle in handles:
        handle.remove()
    assert order[:4] == ["look-up"] * 3 + ["forward"]
    assert again == pytest.approx(loss, abs=1e-5)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4)


def test_labels_go_straight_to_the_head_and_one_loss_comes_back():
    """A copy between two GPUs in every part would make them take turns. The "meta" device stands for the second one."""
    seen = []

    class Split(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(2, 2, device="meta")

        def get_output_embeddings(self):
            return self.head

        def forward(self, input_ids, labels, target_rows, num_items_in_batch, **kwargs):
            seen.append([each.device.type for each in (input_ids, labels, target_rows, num_items_in_batch)])
            return SimpleNamespace(loss=self.head.weight.sum())

    with pytest.raises(
        NotImplementedError, match="meta"
    ):  # the sum of the losses comes back, and there it has no value
        run_step(Split(), the_batch(), 3, device="cpu", num_items=torch.tensor(7))
    assert seen == [["cpu", "meta", "meta", "meta"]] * 3


def test_the_head_is_found_behind_an_adapter_and_may_be_missing():
    assert str(head_device(lora(fresh_model()))) == "cpu"
    assert head_device(torch.nn.Linear(1, 1)) is None


def test_a_loss_scale_goes_through():
    model = lora(fresh_model())
    _, want = step(model)
    _, got = step(model, micro_batches=2, backward=lambda loss: (loss * 1024).backward())
    for name, gradient in want.items():
        torch.testing.assert_close(got[name] / 1024, gradient, atol=1e-5, rtol=1e-4)
