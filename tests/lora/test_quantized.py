"""The base in 8 and 4 bits. Most of it needs bitsandbytes, which the course does not install."""

import weakref

import pytest
import torch

from glmhelpers.devicemap.activation_checkpointing import checkpoint_only
from glmhelpers.devicemap.plan import plan_device_map
from glmhelpers.lora import quantized
from glmhelpers.lora.attach import attach_lora
from glmhelpers.lora.fingerprint import base_checksum
from glmhelpers.lora.quantized import load_quantized, stored_bytes, why_not
from glmhelpers.tokens.collate import RightPadCollator
from glmhelpers.training.finetune import train, training_arguments
from glmhelpers.training.measure import random_batch
from glmhelpers.training.memory_plan import model_settings, predict_training
from glmhelpers.training.pipeline import run_step
from glmhelpers.training.progress import Watch
from tests.helpers.reference import CHECKPOINT, fresh_model, model, tokenizer
from tests.helpers.resumable_run import rows
from thuglm import ChatGLMConfig

needs_library = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def test_a_missing_library_is_a_reason_not_a_traceback(monkeypatch):
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    assert "bitsandbytes is not installed" in why_not()
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        load_quantized(CHECKPOINT, 8)


def test_other_numbers_of_bits_are_refused():
    with pytest.raises(ValueError, match="bits is 3"):
        load_quantized(CHECKPOINT, 3)


def test_the_planner_knows_what_fewer_bits_save():
    peaks = [
        plan_device_map(ChatGLMConfig(), ["T4"], 1, 256, "memory", base_bits=bits).peak_bytes[0] for bits in (16, 8, 4)
    ]
    assert peaks == sorted(peaks, reverse=True)
    matrices = 28 * 12 * 4096**2
    assert peaks[0] - peaks[1] == pytest.approx(matrices, rel=0.05)


def test_stored_bytes_of_a_plain_base():
    assert stored_bytes(attach_lora(fresh_model())) == sum(p.numel() * 4 for p in model().parameters())


@needs_library
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_shrink_as_predicted(bits):
    packed = attach_lora(load_quantized(CHECKPOINT, bits, dtype=torch.float32))
    assert model_settings(packed)["base_bits"] == bits
    terms = predict_training(packed, 2, 16).breakdown[0]
    for _ in range(2):  # before an answer and after it
        assert stored_bytes(packed) == pytest.approx(terms["weights"] + terms["embedding"], rel=1e-3)
        packed(torch.tensor([[5, 2657, 2660]]))
    assert packed.base_model.model.lm_head.weight.dtype == torch.float32


@needs_library
def test_four_bits_compute_what_their_unpacked_weights_compute():
    from bitsandbytes.functional import dequantize_4bit

    packed, unpacked = load_quantized(CHECKPOINT, 4, dtype=torch.float32), fresh_model()
    for one, other in zip(packed.transformer.layers.modules(), unpacked.transformer.layers.modules(), strict=True):
        if isinstance(other, torch.nn.Linear):
            other.weight.data = dequantize_4bit(one.weight.data, one.weight.quant_state)
    ids = tokenizer()(["晚上睡不着应该怎么办"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, unpacked(ids).logits, atol=1e-3, rtol=1e-3)


@needs_library
def test_eight_bits_stay_near_the_whole_base():
    """Activations are packed into 8 bits too, so only nearness can be asked for."""
    ids = tokenizer()(["晚上睡不着应该怎么办"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        want, got = model()(ids).logits, load_quantized(CHECKPOINT, 8, dtype=torch.float32)(ids).logits
    assert 0 < (want - got).norm() / want.norm() < 0.15


@needs_library
@pytest.mark.parametrize("bits", [8, 4])
def test_an_adapter_learns_on_a_packed_base_and_leaves_it_alone(bits, tmp_path):
    """With an evaluation in the middle: what the library does in eval mode must not spoil the next step."""
    packed = attach_lora(load_quantized(CHECKPOINT, bits, dtype=torch.float32), dropout=0.0)
    before, evaluate = base_checksum(packed), {"eval_strategy": "steps", "eval_steps": 4}
    arguments = training_arguments(tmp_path, False, max_steps=8, learning_rate=5e-3, logging_steps=1, **evaluate)
    watch = Watch(live=False)
    log = train(packed, rows(), RightPadCollator(tokenizer()), arguments, rows(4), micro_batches=2, watch=watch)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0]
    assert "eval_loss" in log[-1]
    assert base_checksum(packed) == before


class KeepsItsInput(torch.autograd.Function):
    """As bitsandbytes' product of 8-bit weights: the input hangs on the node, where no hook for saved tensors sees it."""

    @staticmethod
    def forward(ctx, x):
        ctx.tensors = (None, None, x)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_the_input_of_a_packed_layer_is_let_go():
    x = torch.ones(3, requires_grad=True)
    kept = x * 1
    alive, out = weakref.ref(kept), KeepsItsInput.apply(kept)
    del kept
    assert alive() is not None
    quantized.forget_input(None, (), out)
    assert alive() is None
    out.sum().backward()
    assert x.grad.tolist() == [2, 2, 2]
    quantized.forget_input(None, (), torch.ones(3))  # without a graph there is nothing to forget


@needs_library
def test_eight_bit_layers_keep_no_input_and_give_the_same_gradient():
    """In eval mode the CPU takes the function that GPUs always take."""
    packed = load_quantized(CHECKPOINT, 8, dtype=torch.float16).eval()
    layer = packed.transformer.layers[0].mlp.dense_h_to_4h
    x = torch.randn(5, layer.in_features, dtype=torch.float16, requires_grad=True)
    out = layer(x)
    assert type(out.grad_fn).__name__ == "MatMul8bitLtBackward"
    assert out.grad_fn.tensors == (None, None, None)
    out.float().sum().backward()
    exact = fresh_model().transformer.layers[0].mlp.dense_h_to_4h.weight.sum(dim=0)
    assert (x.grad - exact).norm() < 0.02 * exact.norm() * 5**0.5


@needs_library
def test_eight_bit_layers_keep_no_input_in_training_on_a_cpu():
    layer = load_quantized(CHECKPOINT, 8, dtype=torch.float32).train().transformer.layers[0].mlp.dense_h_to_4h
    x = torch.randn(5, layer.in_features, requires_grad=True)
    out = layer(x)
    assert type(out.grad_fn).__name__ == "MatMul8bitFpBackward"
    assert out.grad_fn.A is None
    out.sum().backward()
    assert torch.isfinite(x.grad).all()


@needs_library
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("bits", [8, 4])
def test_checkpointed_blocks_of_a_packed_base_keep_their_input_alone(bits):
    """Blocks that are run again hold one copy of the hidden states each, however they are packed."""
    model = attach_lora(load_quantized(CHECKPOINT, bits, {"": 0}), dropout=0.0).train()
    checkpoint_only(model, range(4))
    batch = random_batch(model.config, 8, 512)
    grown = []

    def backward(loss):
        grown.append(torch.cuda.memory_allocated() - before)
        loss.backward()

    for _ in range(2):
        before = torch.cuda.memory_allocated()
        run_step(model, batch, backward=backward)
    unit = 8 * 512 * model.config.hidden_size * 2
    assert grown[-1] < 12 * unit + 8 * 512 * 512 * 2, "4 inputs, the loss, the mask; 28 units more if all are kept"
