"""P-tuning v2 on GPUs: no waiting, two GPUs as one, and the decoder's graphs behind a prefix. Skipped without one."""

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model

from glmhelpers.inference.decoder import Decoder
from glmhelpers.training import run_step
from tests.helpers.reference import fresh_model, tokenizer
from tests.helpers.tiny_models import PROMPTS, the_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

PARTS = ["transformer.word_embeddings", *(f"transformer.layers.{n}" for n in range(4)), "transformer.final_layernorm"]
HALVES = {name: "cuda:0" if number < 3 else "cuda:1" for number, name in enumerate([*PARTS, "lm_head"])}


def tuned(dtype=torch.float32, **places):
    net = get_peft_model(
        fresh_model(dtype, **(places or {"device_map": "cuda:0"})),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    )
    torch.manual_seed(0)
    weight = net.prompt_encoder["default"].embedding.weight
    weight.data.copy_(torch.randn(weight.shape))
    return net


def test_training_never_waits_for_the_gpu():
    net = tuned(torch.float16).train()
    batch = {name: tensor.cuda() for name, tensor in the_batch().items()}
    rows = (batch["labels"][:, 1:].reshape(-1) != -100).nonzero().squeeze(1)

    def step(prefix):
        net.get_base_model()(**batch, target_rows=rows, past_key_values=prefix).loss.backward()

    # peft keeps the numbers of the virtual tokens on the CPU and copies them in each step, outside of the model.
    first, second = (net.get_prompt(len(batch["labels"])) for _ in range(2))
    step(first)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(second)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_two_gpus_learn_and_answer_as_one(checkpointed):
    results = []
    for net in (tuned(), tuned(device_map=HALVES)):
        if checkpointed:
            net.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = run_step(net.train(), the_batch(), 3).item()
        inputs = tokenizer()(PROMPTS, padding=True, return_tensors="pt").to("cuda:0")
        answers = Decoder(net).generate(**inputs, max_new_tokens=12)
        results.append((loss, net.prompt_encoder["default"].embedding.weight.grad.cpu(), answers))
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-4)
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-5, rtol=1e-3)
    assert results[1][2] == results[0][2]


def test_graphs_behind_a_prefix_answer_as_without_graphs():
    net = tuned()
    inputs = tokenizer()(PROMPTS, padding=True, return_tensors="pt").to("cuda")
    graphs = Decoder(net)
    want = Decoder(net, graphs=False).generate(**inputs, max_new_tokens=16)
    assert graphs.generate(**inputs, max_new_tokens=16) == want
    with net.disable_adapter():
        assert graphs.generate(**inputs, max_new_tokens=16) == Decoder(fresh_model().cuda()).generate(
            **inputs, max_new_tokens=16
        )
    assert graphs.generate(**inputs, max_new_tokens=16) == want
