"""The chunked loss against torch's own cross entropy, its gradient against autograd's."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from tests.helpers.reference import fresh_model
from tests.helpers.tiny_models import lora, the_batch
from thuglm.chunked_loss import chunked_cross_entropy


def problem(rows, hidden, vocab, share_ignored, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, hidden, generator=generator).to(dtype)
    weight = (torch.randn(vocab, hidden, generator=generator) * 0.3).to(dtype)
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < share_ignored] = -100
    return states, weight, labels


def both(states, weight, labels, chunk):
    results = []
    for loss_of in (
        lambda h: chunked_cross_entropy(h, weight, labels, chunk),
        lambda h: F.cross_entropy((h @ weight.T).float(), labels, ignore_index=-100, reduction="sum"),
    ):
        leaf = states.clone().requires_grad_()
        loss = loss_of(leaf)
        (loss * 0.25).backward()
        results.append((loss.detach(), leaf.grad))
    return results


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    vocab=st.integers(2, 50),
    chunk=st.integers(1, 64),
    share=st.sampled_from([0.0, 0.3, 0.9]),
    seed=st.integers(0, 99),
)
def test_equals_the_plain_loss_for_any_chunk(rows, vocab, chunk, share, seed):
    (loss, grad), (plain, plain_grad) = both(*problem(rows, 8, vocab, share, seed=seed), chunk)
    torch.testing.assert_close(loss, plain, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(grad, plain_grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_float16_is_as_near_to_the_exact_result_as_the_plain_loss(chunk):
    states, weight, labels = problem(100, 32, 500, 0.2, torch.float16)
    (loss, grad), (plain, plain_grad) = both(states, weight, labels, chunk)
    _, (exact, exact_grad) = both(states.double(), weight.double(), labels, chunk)
    assert loss.dtype == torch.float32
    assert (loss - exact).abs() <= 2 * (plain - exact).abs() + 1e-3 * exact.abs()
    distance, plain_distance = (grad - exact_grad).norm(), (plain_grad - exact_grad).norm()
    assert distance <= 2 * plain_distance + 1e-3 * exact_grad.norm()


def test_equals_torchs_linear_cross_entropy_where_it_exists():
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip(f"torch {torch.__version__} has no linear_cross_entropy (2.15 has)")
    states, weight, labels = problem(50, 16, 200, 0.3)
    want = F.linear_cross_entropy(states, weight, labels, reduction="sum")
    torch.testing.assert_close(chunked_cross_entropy(states, weight, labels, 16), want, atol=1e-4, rtol=1e-5)


def test_never_more_than_one_chunk_of_logits_alive():
    """Every tensor a kernel returns is watched: the sum of those of vocabulary width alive at once stays within a chunk."""
    import weakref

    from torch.utils._python_dispatch import TorchDispatchMode

    states, weight, labels = problem(96, 8, 700, 0.0)
    alive, peak = {}, 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal peak
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and tensor.shape[1] == 700:
                    key = tensor.untyped_storage()._cdata
                    alive[key] = tensor.numel()
                    weakref.finalize(tensor, alive.pop, key, None)
            peak = max(peak, sum(alive.values()))
            return out

    leaf = states.clone().requires_grad_()
    with Watch():
        chunked_cross_entropy(leaf, weight, labels, 16).backward()
    assert 0 < peak <= 3 * 16 * 700  # logits, log-probabilities and one conversion of a single chunk


def test_a_trainable_head_gets_its_gradient():
    states, weight, labels = problem(20, 8, 30, 0.3)
    head, plain_head = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    chunked_cross_entropy(states, head, labels, 4).backward()
    F.cross_entropy(states @ plain_head.T, labels, reduction="sum").backward()
    torch.testing.assert_close(head.grad, plain_head.grad)


def test_without_gradients_nothing_is_kept():
    states, weight, labels = problem(20, 8, 30, 0.0)
    with torch.no_grad():
        loss = chunked_cross_entropy(states, weight, labels, 4)
    assert loss.grad_fn is None
    torch.testing.assert_close(loss, F.cross_entropy(states @ weight.T, labels, reduction="sum"))


def test_float16_gradient_of_a_sure_model_is_not_rounded_away():
    """p = 0.9999 is 1 in float16; p - 1 is not 0."""
    states, weight, labels = torch.ones(1, 1), torch.tensor([[9.2], [0.0]]), torch.tensor([0])
    results = []
    for dtype in (torch.float16, torch.float64):
        leaf = states.to(dtype).requires_grad_()
        chunked_cross_entropy(leaf, weight.to(dtype), labels).backward()
        results.append(leaf.grad.item())
    assert results[1] != 0
    assert results[0] == pytest.approx(results[1], rel=1e-2)


# Heads that are more than a matrix ---------------------------------------------------------------------------------


def adapted_head(**settings):
    torch.manual_seed(0)
    config = LoraConfig(r=4, init_lora_weights=False, **{"target_modules": ["query_key_value"], **settings})
    return get_peft_model(fresh_model(), config)


def hooked_head(**_):
    net = lora(fresh_model())
    net.get_base_model().lm_head.register_forward_hook(lambda module, args, output: output * 0.5)
    return net


def byte_head(**_):
    """A head whose weight is no matrix to multiply with, as of 8-bit layers."""

    class Bytes(torch.nn.Linear):
        def forward(self, x):
            scale = self.weight.abs().amax() / 127
            return F.linear(x, (self.weight / scale).round() * scale)

    net = lora(fresh_model())
    head = Bytes(64, 3040, bias=False)
    head.weight.data.copy_(net.get_base_model().lm_head.weight)
    net.get_base_model().lm_head = head.requires_grad_(False)
    return net


HEADS = {
    "adapter on the head": (adapted_head, {"target_modules": ["query_key_value", "lm_head"]}),
    "with dropout": (adapted_head, {"target_modules": ["lm_head"], "lora_dropout": 0.5}),
    "head trained whole": (adapted_head, {"modules_to_save": ["lm_head"]}),
    "hook": (hooked_head, {}),
    "8 bits": (byte_head, {}),
}


@pytest.mark.filterwarnings("ignore:Model.*tie_word_embeddings")
@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_is_no_matrix_is_called(kind):
    make, arguments = HEADS[kind]
    net, batch = make(**arguments), the_batch()
    shifted = batch["labels"][:, 1:]

    def step(loss_of):
        torch.manual_seed(3)
        net.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

    def plain():
        hidden = net.get_base_model().transformer(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        keep = shifted != -100
        logits = net.get_base_model().lm_head(hidden[:, :-1][keep])
        return F.cross_entropy(logits, shifted[keep])

    net.train()
    want, wanted = step(plain)
    got, gradients = step(lambda: net(**batch, loss_chunk=1000).loss)
    assert got == pytest.approx(want, abs=1e-5)
    assert gradients.keys() == wanted.keys()
    assert {name for name, p in net.named_parameters() if p.requires_grad} == gradients.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-3)
    if "dropout" not in kind:
        assert net(**batch, loss_chunk=3).loss.item() == pytest.approx(want, abs=1e-5)
