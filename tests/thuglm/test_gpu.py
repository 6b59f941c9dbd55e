"""What only a GPU can show: float16 kernels, a real split, no waiting in forward. Skipped without one."""

import pytest
import torch

from tests.helpers.reference import fresh_model, generation_cases, logit_cases, tensors, tokenizer
from tests.helpers.tiny_models import lora, lora_gradients, right_padded, training_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

PARTS = ["transformer.word_embeddings", *(f"transformer.layers.{i}" for i in range(4)), "transformer.final_layernorm"]


def batch_on(device, length_multiple=8):
    ids, mask, labels = right_padded(training_rows(), length_multiple)
    return {key: x.to(device) for key, x in {"input_ids": ids, "attention_mask": mask, "labels": labels}.items()}


def split_map(first_on_cpu: bool) -> dict[str, str]:
    near, far = ("cpu", "cuda:0") if first_on_cpu else ("cuda:0", "cpu")
    return {name: near if number < 3 else far for number, name in enumerate([*PARTS, "lm_head"])}


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-3), (torch.float16, 0.15)])
@pytest.mark.parametrize("name", ["a_single", "e2_long_block"])
def test_logits_equal_the_golden_ones(name, dtype, atol):
    golden = tensors(name if dtype == torch.float32 else f"{name}_fp16")
    logits = fresh_model(dtype).cuda()(input_ids=golden["input_ids"].cuda()).logits.float().cpu()
    if "logits" in golden:
        torch.testing.assert_close(logits, golden["logits"], atol=atol, rtol=0)
    else:
        rows, positions = golden["logits_at_index"].T
        torch.testing.assert_close(logits[rows, positions], golden["logits_at"], atol=atol, rtol=0)


def test_forward_and_loss_never_wait_for_the_gpu():
    model = lora(fresh_model(torch.float16).cuda()).train()
    batch = batch_on("cuda")
    rows = (batch["labels"][:, 1:].reshape(-1) != -100).nonzero().squeeze(1)
    model(**batch, target_rows=rows).loss.backward()  # first use loads kernels, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch, target_rows=rows).loss.backward()
        model(**batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("first_on_cpu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32])
def test_split_between_gpu_and_cpu_equals_the_unsplit_model(first_on_cpu, dtype):
    """Logits, loss and every LoRA gradient, dropout off; the split one with every block checkpointed."""
    whole = lora(fresh_model(dtype).cuda())
    loss, want = lora_gradients(whole, **batch_on("cuda"))
    halves = lora(fresh_model(dtype, device_map=split_map(first_on_cpu)))
    halves.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, got = lora_gradients(halves, **batch_on("cuda"))
    assert again == pytest.approx(loss, abs=1e-4)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name].cpu(), gradient.cpu(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("first_on_cpu", [False, True])
def test_recomputation_repeats_dropout_on_a_split_model(first_on_cpu):
    """Checkpointed against plain gradients under one seed: any other mask in the recomputation would show."""
    model = lora(fresh_model(device_map=split_map(first_on_cpu)), dropout=0.3)
    loss, want = lora_gradients(model, **batch_on("cuda"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, got = lora_gradients(model, **batch_on("cuda"))
    assert again == pytest.approx(loss, abs=1e-6)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-5)


def test_head_and_embedding_apart_give_the_same_logits():
    golden = tensors("a_single")
    model = fresh_model(device_map=split_map(False))
    assert model.lm_head.weight.device.type == "cpu"
    assert model.transformer.word_embeddings.weight.device.type == "cuda"
    logits = model(input_ids=golden["input_ids"].cuda()).logits
    torch.testing.assert_close(logits.cpu(), golden["logits"], atol=2e-3, rtol=0)


def test_greedy_answers_on_a_split_model_equal_the_golden_ones():
    case = generation_cases()["greedy_single"][0]
    model = fresh_model(device_map=split_map(False))
    inputs = tokenizer()([case["prompt"]], return_tensors="pt").to("cuda")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
    assert ids.tolist() == case["new_ids"]


def test_left_padding_in_float16_gives_no_nan():
    texts = ["你好", "晚上睡不着应该怎么办，请你告诉我"]
    batch = tokenizer()(texts, padding=True, return_tensors="pt").to("cuda")
    model = fresh_model(torch.float16).cuda()
    logits = model(**batch).logits
    assert torch.isfinite(logits).all()
    assert logit_cases()  # the golden data is there


def test_trainer_with_a_float16_base_and_a_grad_scaler(tmp_path):
    from glmhelpers.lora.attach import attach_lora
    from glmhelpers.tokens.collate import RightPadCollator
    from glmhelpers.training.finetune import train, training_arguments

    model = attach_lora(fresh_model(torch.float16).cuda(), dropout=0.1)
    ids, _, labels = right_padded(training_rows())
    rows = [{"input_ids": i[:9].tolist(), "labels": x[:9].tolist()} for i, x in zip(ids, labels, strict=True)]
    args = training_arguments(tmp_path, True, max_steps=12, logging_steps=2, learning_rate=5e-3)
    log = train(model, rows, RightPadCollator(tokenizer()), args)
    assert log[-1]["loss"] < log[0]["loss"]
    assert {p.dtype for n, p in model.named_parameters() if "lora_" not in n} == {torch.float16}
