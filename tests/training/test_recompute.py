"""Our checkpointing of a block against torch's own and against none."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from glmhelpers.devicemap.activation_checkpointing import checkpoint_only, recompute
from glmhelpers.training.pipeline import run_step
from tests.helpers.reference import fresh_model
from tests.helpers.tiny_models import lora, the_batch


def gradients_with(function, dropout=0.3, parts=2, layers=range(4)):
    model = lora(fresh_model(), dropout).train()
    checkpoint_only(model, layers)
    for block in model.base_model.model.transformer.layers:
        block._gradient_checkpointing_func = function
    torch.manual_seed(5)
    loss = run_step(model, the_batch(), parts)
    return loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, torch.get_rng_state()


@pytest.mark.parametrize("layers", [range(4), (1, 2)])
def test_equals_torchs_checkpoint_and_none_at_all(layers):
    loss, got, state = gradients_with(recompute, layers=layers)

    def torchs(function, *args):
        return checkpoint(function, *args, use_reentrant=False)

    for function, chosen in ((torchs, layers), (recompute, ())):
        other_loss, want, other_state = gradients_with(function, layers=chosen)
        assert loss == other_loss
        assert torch.equal(state, other_state), "the random state after the step differs"
        for name, gradient in want.items():
            assert gradient.abs().max() > 0
            assert torch.equal(got[name], gradient), name


def test_nothing_but_the_inputs_is_alive_between_the_passes():
    import gc
    import weakref

    made = []

    def block(x, scale):
        y = (x * scale).exp()
        made.append(weakref.ref(y))
        return y.sin() * y

    x = torch.randn(5, requires_grad=True)
    scale = torch.tensor(0.5)
    out = recompute(block, x, scale).sum()
    gc.collect()
    assert [ref() for ref in made] == [None]
    out.backward()
    assert len(made) == 2, "the block must run exactly once more"
    y = x.detach().clone().requires_grad_()
    block(y, scale).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_the_second_run_stops_before_what_nobody_needs():
    calls = []

    def block(x):
        y = x.sin()
        calls.append("needed")
        z = y.cos()
        calls.append("not needed")
        return z + 1

    x = torch.randn(3, requires_grad=True)
    recompute(block, x).sum().backward()
    assert calls == ["needed", "not needed", "needed"]


def test_a_block_that_changes_its_mind_is_reported():
    times = []

    def block(x):
        times.append(0)
        return x.sin().cos() if len(times) == 1 else x.sin()

    x = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="kept 2 tensors when it ran first and 1 when it ran again"):
        recompute(block, x).sum().backward()


def test_a_second_backward_is_reported():
    x = torch.randn(3, requires_grad=True)
    out = recompute(lambda x: x.sin().cos(), x).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        out.backward()


def test_without_gradients_it_only_calls():
    x = torch.randn(3)
    with torch.no_grad():
        assert torch.equal(recompute(torch.sin, x), x.sin())
