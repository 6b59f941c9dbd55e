"""Micro-batches in lanes on two GPUs: the same gradients however the GPUs' work falls in time. Skipped on fewer."""

import random

import pytest
import torch

from glmhelpers.devicemap.activation_checkpointing import checkpoint_only
from glmhelpers.lora.attach import attach_lora
from glmhelpers.training.pipeline import run_step
from tests.helpers.reference import fresh_model
from tests.helpers.tiny_models import the_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

PARTS = ["transformer.word_embeddings", *(f"transformer.layers.{i}" for i in range(4)), "transformer.final_layernorm"]


def split_model(embedding):
    places = {name: "cuda:0" if number < 3 else "cuda:1" for number, name in enumerate([*PARTS, "lm_head"])}
    model = attach_lora(fresh_model(device_map={**places, PARTS[0]: embedding}), dropout=0.2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.train()


def steps(model, count=4, seed=0, scaled=True, **how):
    """Losses and gradients of some steps in turn, without waiting between them; a scale that each run makes anew."""
    scaler = torch.amp.GradScaler("cuda", init_scale=64.0, enabled=scaled)
    found = []
    for number in range(count):
        torch.manual_seed(seed + number)
        loss = run_step(model, the_batch(), 6, backward=lambda loss: scaler.scale(loss).backward(), **how)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        model.zero_grad(set_to_none=True)
        found.append((loss, gradients))
    return [(loss.item(), {name: grad.cpu() for name, grad in gradients.items()}) for loss, gradients in found]


@pytest.mark.parametrize("layers", [(), range(4), (1, 2)], ids=["none", "all", "some"])
@pytest.mark.parametrize("embedding", ["cuda:0", "cuda:1", "cpu"])
def test_lanes_give_the_gradients_of_one_backward_whatever_waits_for_what(embedding, layers):
    """Each run, GPUs are held up before other blocks, forward and in what is run again: a stream that does not wait for
    what it reads, or memory that is used again too soon, gives other numbers."""
    model = split_model(embedding)
    checkpoint_only(model, layers)
    want = steps(model)
    drawn = random.Random(0)

    def hold_up(module, args):
        if drawn.random() < 0.3:
            with torch.cuda.device(args[0].device):
                torch.cuda._sleep(drawn.randrange(3_000_000))

    for block in model.base_model.model.transformer.layers:
        block.register_forward_pre_hook(hold_up)
    for run in range(20):
        for in_flight in (2, 3):
            for (loss, gradients), (again, got) in zip(want, steps(model, in_flight=in_flight), strict=True):
                assert again == pytest.approx(loss, rel=1e-4), (run, in_flight)
                for name, gradient in gradients.items():
                    assert torch.isfinite(got[name]).all()
                    distance = (got[name] - gradient).norm() / gradient.norm()
                    assert distance < 1e-4, f"run {run}, {in_flight} in flight: {name} is off by {distance:.2g}"


def test_in_flight_keeps_less_memory():
    model = split_model("cuda:1")
    peaks = {}
    for in_flight in (None, 3, 2):
        steps(model, 1, in_flight=in_flight)
        torch.cuda.synchronize(0)
        torch.cuda.reset_peak_memory_stats(0)
        before = torch.cuda.memory_allocated(0)
        steps(model, 1, in_flight=in_flight)
        peaks[in_flight] = torch.cuda.max_memory_allocated(0) - before
    assert peaks[2] < peaks[3] < peaks[None]


def test_one_gpu_needs_no_lanes():
    """No stream is changed, and each micro-batch goes back before the next one goes forward."""
    model = attach_lora(fresh_model().cuda(), dropout=0.2).train()
    before, seen = torch.cuda.current_stream(), []
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.02)
    model.base_model.model.transformer.layers[0].register_forward_hook(
        lambda *_: seen.append(torch.cuda.current_stream() == before)
    )
    want, got = steps(model, 1), steps(model, 1, in_flight=1)
    assert all(seen)
    for name, gradient in want[0][1].items():
        torch.testing.assert_close(got[0][1][name], gradient, atol=1e-5, rtol=1e-3)
