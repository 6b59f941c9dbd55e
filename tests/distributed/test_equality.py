"""The step of many processes has the loss and the gradients of one process, however it is cut."""

import pytest
import torch

from glmhelpers.lora.attach import adapter_weights, attach_lora
from glmhelpers.training.pipeline import run_step
from tests.helpers.process_cases import CASES, a_batch, draw_adapter
from thuglm import ChatGLMForConditionalGeneration

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def expected(folders):
    """Checkpoint -> (loss, gradients) of one process that does not cut the batch."""
    found = {}
    for name, folder in folders.items():
        base = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        model = attach_lora(base, dropout=0.0).train()
        draw_adapter(model)
        loss = run_step(model, a_batch(base.config))
        found[name] = loss.item(), {name: weight.grad for name, weight in adapter_weights(model).items()}
    return found


@pytest.mark.parametrize("name", [name for cases in CASES.values() for name in cases])
def test_loss_and_gradients_are_those_of_one_process(name, results, expected):
    checkpoint = next(cases[name] for cases in CASES.values() if name in cases)[0]
    (loss, gradients), (right_loss, right) = results[name], expected[checkpoint]
    assert loss == pytest.approx(right_loss, rel=1e-5)
    assert sorted(gradients) == sorted(right)
    for matrix, gradient in gradients.items():
        size = right[matrix].abs().max()
        assert size > 0
        assert (gradient - right[matrix]).abs().max() <= 1e-5 * size, matrix
