"""P-tuning v2 on GPUs: no waiting, two GPUs as one, and the decoder's graphs behind a prefix. Skipped without one."""

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model

from glmhelpers.inference.decoder import Decoder
from glmhelpers.lora import attach_prefix
from glmhelpers.tokens.collate import RightPadCollator
from glmhelpers.training import run_step, train, training_arguments
from glmhelpers.training.pipeline import behind_prefix
from tests.helpers.reference import fresh_model, tokenizer
from tests.helpers.tiny_models import PROMPTS, the_batch, training_rows

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

    def step():
        called, before = behind_prefix(net)  # peft's own get_prompt copies numbers from the CPU, and waits
        called(**batch, **before, target_rows=rows).loss.backward()

    step()  # libraries set themselves up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
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
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-4, rtol=1e-3)
    assert results[1][2] == results[0][2]


def test_a_float16_base_trains_with_a_grad_scaler(tmp_path):
    net = attach_prefix(fresh_model(torch.float16, device_map="cuda:0"), 5)
    rows = [{"input_ids": ids, "labels": [-100] * (len(ids) - 3) + ids[-3:]} for ids in training_rows() * 2]
    how = {"max_steps": 12, "per_device_train_batch_size": 3, "learning_rate": 0.05, "logging_steps": 1}
    log = train(net, rows, RightPadCollator(tokenizer()), training_arguments(tmp_path, True, **how), micro_batches=3)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0]
    weight = net.prompt_encoder["default"].embedding.weight
    assert (weight.dtype, weight.device) == (torch.float32, torch.device("cuda:0"))


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
