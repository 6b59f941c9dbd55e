"""The memory of P-tuning v2: the formula against the real model, on tensors without data and on the CPU, byte by byte."""

import gc
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from glmhelpers.cost_model.block_memory import block_cost
from glmhelpers.cost_model.sizes import Setting, Shape
from glmhelpers.cost_model.step_memory import Stage, predict, prefix_bytes, stage_terms
from glmhelpers.devicemap import plan_device_map
from glmhelpers.devicemap.activation_checkpointing import checkpoint_only, recompute
from glmhelpers.devicemap.check import part_names
from glmhelpers.devicemap.plan import DoesNotFit
from glmhelpers.inference.model_state import peft_prefix
from glmhelpers.lora import attach_prefix, count_parameters
from glmhelpers.lora.attach import prefix_config
from glmhelpers.training import predict_training, run_step
from tests.helpers.reference import fresh_model
from tests.helpers.storage_tracker import GradientFromNowhere, StorageTracker, as_on_a_gpu
from tests.helpers.tiny_models import tiny_config
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMModel

PUBLISHED = ChatGLMConfig()
MIDDLE = ChatGLMConfig(num_layers=4, hidden_size=256, num_attention_heads=8, inner_hidden_size=1024, vocab_size=130528)


@pytest.mark.parametrize("first", [False, True], ids=["later block", "first block"])
@pytest.mark.parametrize("case", [(128, "float16", 4, 1024), (8, "float16", 1, 512), (64, "float32", 2, 512)], ids=str)
def test_block_cost_equals_the_real_block_to_the_byte(case, first):
    length, name, rows, tokens = case
    dtype = getattr(torch, name)
    with torch.device("meta"):
        net = ChatGLMModel(replace_config(PUBLISHED, num_layers=1)).to(dtype).requires_grad_(False)
    block = net.to("meta").layers[0]
    hidden = torch.empty(rows, tokens, 4096, device="meta", dtype=dtype, requires_grad=not first)
    bias = torch.empty(rows, 1, tokens, length + tokens, device="meta", dtype=dtype)
    cos, sin = net.rotary_emb(torch.zeros(rows, 2, tokens, dtype=torch.long, device="meta"), dtype)
    learnt = [torch.empty(1, 32, length, 128, device="meta", requires_grad=True) for _ in range(2)]
    casts = [part.to(dtype) for part in learnt]
    cost = block_cost(Shape.of(PUBLISHED), Setting(rows, tokens, lora_rank=0, prefix_length=length, dtype=name), first)

    def measure(run):
        tracker = StorageTracker()
        tracker.ignore(*net.parameters(), hidden, bias, cos, sin, *learnt, *casts)
        with as_on_a_gpu(), tracker:
            output = run(lambda x, *keys: block(x, bias, cos, sin, *keys)[0], hidden, *casts)
            forward = tracker.peak
            output = GradientFromNowhere.apply(output)
            saved, tracker.peak = tracker.now, 0
            output.backward()
        for part in learnt:
            part.grad = None
        return forward, saved, tracker.peak

    forward, saved, undone = measure(lambda function, *args: function(*args))
    assert [forward, saved, undone] == pytest.approx([cost.keeping, cost.saved, cost.saved + cost.undo], abs=64)
    forward, _, again = measure(recompute)
    assert [forward, again] == pytest.approx([cost.forward, cost.again], abs=64)


def replace_config(config, **changes):
    return ChatGLMConfig(**{**config.to_dict(), **changes})


def meta_model(config, dtype):
    with torch.device("meta"):
        net = ChatGLMForConditionalGeneration(config).to(dtype)
    net = net.to("meta")
    net.lm_head.weight = net.transformer.word_embeddings.weight
    return net.requires_grad_(False).train()


def checkpoint_some(net, marks):
    for block, mark in zip(net.transformer.layers, marks, strict=True):
        block.gradient_checkpointing, block._gradient_checkpointing_func = mark, recompute


def track_step(net, learnt, prefix, setting, **inputs):
    """Peak of forward of all micro-batches and one backward; `prefix()` gives the keys, made inside."""
    tracker = StorageTracker()
    tracker.ignore(*net.parameters(), *learnt, *inputs.values())
    answers = round(setting.rows * (setting.seq_length - 1) * setting.label_share)
    ids = torch.zeros(setting.rows, setting.seq_length, dtype=torch.long, device="meta")
    target_rows = torch.zeros(answers, dtype=torch.long, device="meta")
    tracker.ignore(ids, target_rows)
    how = {"labels": ids, "target_rows": target_rows, "num_items_in_batch": 10, "loss_chunk": setting.loss_chunk}
    with as_on_a_gpu(), tracker:
        keys = prefix()
        losses = [net(input_ids=ids, prefix=keys, **how, **inputs).loss for _ in range(setting.micro_batches)]
        sum(losses).backward()
    return tracker.peak


KEPT_BEFORE = ("weights", "embedding", "lora", "adam", "workspace")

CASES = [
    # rows, length, parts, kept, prefix, projection, share, chunk, dtype, when
    (4, 1024, 1, 0, 128, 0, 1.0, 512, "float16", "loss of the last micro-batch"),
    (8, 512, 4, 1, 128, 0, 0.5, 128, "float16", "loss of the last micro-batch"),
    (4, 512, 2, 4, 64, 0, 0.01, 1, "float16", "forward of its last block"),
    (4, 256, 2, 0, 128, 0, 0.01, 1, "float16", "backward of its block 4 of 4"),
    (2, 64, 1, 0, 2000, 64, 0.02, 1, "float16", "gradient of the prefix"),
    (4, 256, 2, 0, 128, 64, 0.01, 1, "float16", "backward of its block 4 of 4"),
    (4, 512, 2, 0, 128, 0, 1.0, 128, "float32", "loss of the last micro-batch"),
    (4, 512, 2, 4, 128, 512, 0.005, 1, "float32", "backward of its block 4 of 4"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_step_equals_the_real_model(case):
    rows, tokens, parts, kept, length, middle, share, chunk, name, when = case
    how = {"lora_rank": 0, "prefix_length": length, "prefix_projection": middle, "dtype": name}
    setting = Setting(rows, tokens, parts, loss_chunk=chunk, label_share=share, **how)
    marks = [layer < 4 - kept for layer in range(4)]
    moment, terms = stage_terms(
        Shape.of(MIDDLE), setting, Stage(tuple(marks), embedding=True, head=True, shared=True, first=True)
    )
    net = meta_model(MIDDLE, getattr(torch, name))
    tuned = get_peft_model(net, prefix_config(length, projection=middle > 0, width=middle or None)).train()
    trained = sum(p.numel() * 4 for p in tuned.parameters() if p.requires_grad)
    assert trained == prefix_bytes(Shape.of(MIDDLE), setting) == terms["lora"]
    tuned.to("meta")
    checkpoint_some(net, marks)
    real = track_step(net, tuned.parameters(), lambda: peft_prefix(tuned), setting)
    predicted = sum(size for term, size in terms.items() if term not in KEPT_BEFORE)
    assert real == pytest.approx(predicted, rel=1e-4)
    assert moment == when


def test_a_second_gpu_holds_copies_of_its_blocks_keys():
    """The stage behind a cut: hidden states come with a gradient, and keys from another device."""
    setting = Setting(4, 512, 2, lora_rank=0, prefix_length=128, loss_chunk=128)
    stage = Stage((True, True), head=True, embedding=True, shared=True)
    moment, terms = stage_terms(Shape.of(MIDDLE), setting, stage)
    assert (moment, terms["lora"]) == ("loss of the last micro-batch", 0)
    assert terms["cache"] == 2 * 2 * 128 * 256 * (4 + 2 * 2)
    net = meta_model(replace_config(MIDDLE, num_layers=2), torch.float16)
    checkpoint_some(net, stage.blocks)
    learnt = [torch.empty(1, 8, 128, 32, device="meta", requires_grad=True) for _ in range(4)]
    hidden = torch.empty(2, 512, 256, device="meta", dtype=torch.float16, requires_grad=True)

    def copies():
        keys = [part.clone() for part in learnt]
        return [tuple(keys[:2]), tuple(keys[2:])]

    real = track_step(net, learnt, copies, setting, inputs_embeds=hidden)
    predicted = sum(size for term, size in terms.items() if term not in KEPT_BEFORE)
    # Its input was counted with the stage that sent it; here it is the same tensor for both micro-batches.
    sent = 2 * hidden.nbytes
    assert real == pytest.approx(predicted - sent, rel=1e-3)


def test_a_real_step_of_peft_on_the_cpu_is_predicted():
    """Float32, nothing faked: what attention needs on a CPU besides is small."""
    net = fresh_model()
    tuned = attach_prefix(net, 64).train()
    checkpoint_only(tuned, range(4))
    torch.manual_seed(0)
    length = 96
    ids = torch.randint(10, 1000, (4, length))
    ids[:, 40], ids[:, 41] = net.config.gmask_token_id, net.config.bos_token_id
    labels = ids.clone()
    labels[:, :48] = -100
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)
    batch = {"input_ids": ids, "labels": labels}
    run_step(tuned, batch, 2)
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    before = sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in tuned.parameters()}.values())
    states = sum(s.nbytes for state in optimizer.state.values() for s in state.values())
    tracker = StorageTracker()
    tracker.ignore(*tuned.parameters())
    with tracker:
        run_step(tuned, batch, 2, loss_chunk=16)
    share = (length - 48) / (length - 1)
    forecast = predict_training(tuned, 4, length, 2, loss_chunk=16, label_share=share)
    (terms,) = forecast.breakdown
    assert terms["weights"] + terms["embedding"] + terms["lora"] == before
    assert terms["adam"] == pytest.approx(states, abs=16)
    assert tracker.peak + before + states == pytest.approx(forecast.peak_bytes[0], rel=0.005)


def test_the_published_prefix_is_counted():
    """128 keys: 29,360,128 numbers. A configuration with pre_seq_len says so itself; with a network it does not fit."""
    assert prefix_bytes(Shape.of(PUBLISHED), Setting(lora_rank=0, prefix_length=128)) == 4 * 128 * 56 * 4096
    config = replace_config(PUBLISHED, pre_seq_len=128)
    net = ChatGLMForConditionalGeneration(tiny_config(pre_seq_len=5, prefix_projection=True))
    trained = sum(p.numel() for name, p in net.named_parameters() if "prefix_encoder" in name)
    how = Setting(lora_rank=0, prefix_length=5, prefix_projection=64)
    assert prefix_bytes(Shape.of(net.config), how) == 4 * trained
    plan, without = plan_device_map(config, batch_size=4), plan_device_map(PUBLISHED, batch_size=4)
    assert plan.setting.prefix_length == 128
    assert plan.setting.lora_rank == 0
    assert plan == plan_device_map(PUBLISHED, batch_size=4, prefix_length=128)
    assert plan.seconds > without.seconds
    assert sum(terms["lora"] for terms in plan.breakdown) == 4 * 29_360_128
    assert [terms["lora"] > 0 for terms in plan.breakdown] == [True, False]  # beside block 0
    assert "keys of the prefix" in str(plan.prediction)
    with pytest.raises(DoesNotFit, match="prefix_projection=0") as refused:
        plan_device_map(replace_config(config, prefix_projection=True), gpus=["T4", "T4"])
    plan_device_map(config, gpus=["T4", "T4"], **refused.value.changes)


def test_a_prefix_beside_lora_is_refused():
    with pytest.raises(ValueError, match="prefix_length is 128 and lora_rank 8"):
        Setting(prefix_length=128)
    with pytest.raises(ValueError, match="prefix_length is 128 and lora_rank 4"):
        plan_device_map(PUBLISHED, prefix_length=128, lora_rank=4)
    with pytest.raises(ValueError, match="prefix_length is -1"):
        Setting(lora_rank=0, prefix_length=-1)


@given(st.integers(1, 6), st.sampled_from([64, 512]), st.integers(0, 28), st.sampled_from([1, 64, 128]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_longer_prefix_never_needs_less(rows, length, checkpointed, keys, training):
    halves = {name: int(number > 14) for number, name in enumerate(part_names(28))}

    def peak(**changes):
        values = {"prefix_length": keys, "checkpointed": checkpointed, "training": training, **changes}
        return sum(predict(PUBLISHED, halves, rows, length, **values).peak_bytes)

    assert peak(prefix_length=0, lora_rank=0) < peak() < peak(prefix_length=2 * keys) < peak(prefix_projection=4096)


def test_what_a_model_carries_is_what_is_predicted_for():
    tuned = attach_prefix(fresh_model(), 16, projection=True, width=32)
    setting = predict_training(tuned, 2, 64).setting
    assert (setting.lora_rank, setting.prefix_length, setting.prefix_projection) == (0, 16, 32)
    assert prefix_bytes(Shape.of(tuned.config), setting) == 4 * count_parameters(tuned)[0]
    assert replace(setting, prefix_projection=0).keys == 16 + 64
