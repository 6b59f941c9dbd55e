"""P-tuning v2 at every door that LoRA has: attached, trained, resumed, saved, loaded, proved, packed; or refused."""

import json
import shutil

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import save_file

from glmhelpers.devicemap.activation_checkpointing import checkpoint_only
from glmhelpers.devicemap.plan import plan_device_map
from glmhelpers.inference import ChatSession, Generation, answers, compare, held_out_loss, merged_in_memory
from glmhelpers.lora import (
    attach_lora,
    attach_prefix,
    base_checksum,
    count_parameters,
    export_adapter,
    export_merged,
    import_ptuning,
    load_adapter,
    prove,
    save_adapter,
    witness,
)
from glmhelpers.lora.attach import bring_prefix_home, check_adapter
from glmhelpers.lora.fingerprint import base_note
from glmhelpers.tokens.collate import RightPadCollator
from glmhelpers.training import run_step, train, training_arguments
from glmhelpers.training.memory_plan import refuse_plan
from glmhelpers.training.pipeline import behind_prefix
from tests.helpers.reference import CHECKPOINT, fresh_model, model, tokenizer
from tests.helpers.resumable_run import StopAt
from tests.helpers.tiny_models import PROMPTS, the_batch, training_rows
from thuglm import ChatGLMForConditionalGeneration

LENGTH, LAYERS, HIDDEN = 6, 4, 64


def rows():
    made = []
    for ids in training_rows():
        start = ids.index(2660) + 1
        made.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return made * 3


def lesson(net, folder, steps=8, **how):
    settings = {"max_steps": steps, "per_device_train_batch_size": 3, "learning_rate": 0.05, "logging_steps": 1}
    more = {name: how.pop(name) for name in ("callbacks", "plan", "micro_batches", "eval_dataset") if name in how}
    arguments = training_arguments(folder, False, **{**settings, "save_steps": 3, **how})
    return train(net, rows(), RightPadCollator(tokenizer()), arguments, **more)


def ids():
    return tokenizer()([PROMPTS[1]], return_tensors="pt")["input_ids"]


def by_peft(**how):
    torch.manual_seed(0)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, **how)
    return get_peft_model(fresh_model(), config)


@pytest.mark.parametrize("made", ["here", "peft"])
@pytest.mark.parametrize("projection", [False, True])
def test_trained_saved_loaded_proved(made, projection, tmp_path):
    network = {"prefix_projection": True, "encoder_hidden_size": 16}
    ours = {"projection": projection, "width": 16 if projection else None}
    net = attach_prefix(fresh_model(), LENGTH, **ours) if made == "here" else by_peft(**(network if projection else {}))
    before = base_checksum(net)
    assert before == base_checksum(model())
    log = lesson(net, tmp_path / "run", 16, micro_batches=2, eval_dataset=rows(), eval_strategy="steps", eval_steps=8)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0] / 1.5
    evaluated = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    held_out = held_out_loss(net, rows(), RightPadCollator(tokenizer()))
    assert evaluated[-1] == pytest.approx(held_out.loss, abs=1e-4)
    folder = save_adapter(net, tmp_path / "adapter")
    said = witness(net, ids())
    again = load_adapter(fresh_model(), folder, template="chatglm")
    proof = prove(said, again, ids(), base_before=before, learnt=(0.0, 1.0), general=(1.0, 1.0))
    assert proof.ok, str(proof)
    assert proof.trained_to_reloaded < 1e-4
    assert "lora_B" not in str(proof)
    assert answers(again, tokenizer(), PROMPTS) == answers(net, tokenizer(), PROMPTS)
    theirs = PeftModel.from_pretrained(fresh_model(), folder)  # PEFT's own format
    torch.testing.assert_close(theirs(input_ids=ids()).logits, again(input_ids=ids()).logits, atol=1e-4, rtol=0)
    note = json.loads((folder / "course.json").read_text())
    assert note["base"] == base_note(model())


def test_the_checks_see_an_untrained_a_broken_and_a_second_one(tmp_path):
    net = attach_prefix(fresh_model(), LENGTH)
    with pytest.raises(ValueError, match="as random as it was attached"):
        save_adapter(net, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
    for attach in (attach_lora, attach_prefix):
        with pytest.raises(ValueError, match="has an adapter already"):
            attach(net)
    with pytest.raises(ValueError, match="length is 0"):
        attach_prefix(fresh_model(), 0)
    net.prompt_encoder["default"].embedding.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="prompt_embeddings holds NaN"):
        save_adapter(net, tmp_path / "adapter")
    net.prompt_encoder.half()
    with pytest.raises(RuntimeError, match=r"prefix is torch\.float16"):
        check_adapter(net)
    bring_prefix_home(net)  # another dtype is not mended silently
    with pytest.raises(RuntimeError, match="must be float32"):
        lesson(net, tmp_path / "run")


@pytest.mark.parametrize("projection", [False, True])
def test_stopped_and_taken_up_again_it_ends_with_the_same_bits(projection, tmp_path):
    def fresh():
        return attach_prefix(fresh_model(), LENGTH, projection=projection, width=16 if projection else None, seed=3)

    whole = fresh()
    log = lesson(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        lesson(fresh(), tmp_path / "cut", callbacks=[StopAt(5)])
    second = fresh()
    again = lesson(second, tmp_path / "cut")
    assert [e.get("loss") for e in again] == [e.get("loss") for e in log]
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    third = fresh()
    lesson(third, tmp_path / "cut")  # finished: read back
    assert torch.equal(
        whole.prompt_encoder["default"].embedding.weight, third.prompt_encoder["default"].embedding.weight
    )
    assert len(list((tmp_path / "cut").iterdir())) == 1
    lesson(attach_prefix(fresh_model(), LENGTH + 1), tmp_path / "cut", steps=1)
    assert len(list((tmp_path / "cut").iterdir())) == 2


def test_trained_on_only_if_that_was_wanted(tmp_path, capsys):
    net = attach_prefix(fresh_model(), LENGTH)
    lesson(net, tmp_path / "run", steps=2)
    folder = save_adapter(net, tmp_path / "adapter")
    with pytest.raises(ValueError, match="No parameter of this model is trained"):
        lesson(load_adapter(fresh_model(), folder), tmp_path / "more")
    lesson(load_adapter(fresh_model(), folder, trainable=True), tmp_path / "more", steps=1)
    assert "this adapter is not fresh" in capsys.readouterr().out
    network = attach_prefix(fresh_model(), LENGTH, projection=True, width=16)
    lesson(network, tmp_path / "network", steps=2)
    folder = save_adapter(network, tmp_path / "network-adapter")
    load_adapter(fresh_model(), folder)
    with pytest.raises(ValueError, match="not the network itself"):
        load_adapter(fresh_model(), folder, trainable=True)


@pytest.mark.parametrize("base", [torch.float32, torch.float16])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_gradients_are_those_of_peft_however_the_batch_is_cut(base, parts):
    """peft's own way makes keys for every row; here one row serves all. In float16, trainables stay float32."""
    net = get_peft_model(
        fresh_model(base), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    ).train()
    weight = net.prompt_encoder["default"].embedding.weight
    torch.manual_seed(0)
    weight.data.copy_(torch.randn(weight.shape))
    loss = net(**the_batch()).loss
    loss.backward()
    want, weight.grad = weight.grad, None
    checkpoint_only(net, [0, 2])
    got = run_step(net, the_batch(), parts)
    assert weight.grad.dtype == torch.float32
    coarse = base == torch.float16
    assert got.item() == pytest.approx(loss.item(), abs=2e-2 if coarse else 1e-5)
    torch.testing.assert_close(
        weight.grad, want, atol=(2e-2 if coarse else 1e-5) * want.abs().max().item(), rtol=2e-2 if coarse else 1e-4
    )


def test_checkpointed_before_or_after_and_by_a_plan(tmp_path):
    net = fresh_model()
    checkpoint_only(net, [1, 3])
    tuned = attach_prefix(net, LENGTH)
    assert [block.gradient_checkpointing for block in net.transformer.layers] == [False, True, False, True]
    plan = plan_device_map(net.config, ["T4"], 3, 64, dtype="float32", prefix_length=LENGTH, checkpointed="all")
    cpu = dict.fromkeys(plan.device_map, "cpu")
    refuse_plan(plan, tuned, 3)
    with pytest.raises(ValueError, match="prefix_length is 7 in the plan and 6 here"):
        refuse_plan(plan_device_map(net.config, ["T4"], 3, 64, dtype="float32", prefix_length=7), tuned, 3)
    with pytest.raises(ValueError, match="lora_rank is 8 in the plan and 0 here"):
        refuse_plan(plan_device_map(net.config, ["T4"], 3, 64, dtype="float32"), tuned, 3)
    assert net.place(cpu) is net
    lesson(tuned, tmp_path, steps=1)


def test_on_two_devices_the_prefix_lies_beside_block_0():
    """Blocks on "meta", which refuses tensors of the CPU, as another GPU would."""
    net = fresh_model()
    parts = ["transformer.word_embeddings", *(f"transformer.layers.{n}" for n in range(LAYERS))]
    places = dict(zip(parts, ["cpu", "cpu", "cpu", "meta", "meta"], strict=True))
    net.place({**places, "transformer.final_layernorm": "meta", "lm_head": "meta"})
    tuned = attach_prefix(net, LENGTH).train()
    assert tuned.prompt_encoder["default"].embedding.weight.device.type == "cpu"
    seen = []
    for block in net.transformer.layers:
        block.register_forward_pre_hook(lambda _, args: seen.append({x.device.type for x in args if x is not None}))
    checkpoint_only(tuned, [0, 3])
    batch = the_batch()
    called, before = behind_prefix(tuned)
    called(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **before)
    assert seen == [{"cpu"}, {"cpu"}, {"meta"}, {"meta"}]
    assert [key.device.type for key, _ in before["prefix"]] == ["cpu", "cpu", "meta", "meta"]
    net.place({"transformer.word_embeddings": "cpu", "transformer.layers": "meta"})
    with pytest.raises(RuntimeError, match="on cpu; it must be float32, on meta with block 0"):
        check_adapter(tuned)
    bring_prefix_home(tuned)  # as `train` does
    check_adapter(tuned)


def test_chats_with_the_prefix_and_without(tmp_path):
    net = attach_prefix(fresh_model(), LENGTH)
    lesson(net, tmp_path, steps=30)
    found = compare(net, tokenizer(), PROMPTS)
    assert [row.base for row in found] == answers(fresh_model(), tokenizer(), PROMPTS)
    session = ChatSession(net, tokenizer(), settings=Generation(temperature=0, max_new_tokens=16))
    for adapter in (True, False, True):
        session.clear()
        session.adapter = adapter
        said = session.chat(PROMPTS[0]).text
        assert said == answers(net if adapter else fresh_model(), tokenizer(), PROMPTS[:1], max_new_tokens=16)[0]
    with pytest.raises(ValueError, match="no part of the weights"), merged_in_memory(net):
        pass


# Files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefix")
    net = attach_prefix(fresh_model(), LENGTH)
    lesson(net, folder / "run", steps=2)
    return save_adapter(net, folder / "adapter")


def test_merging_is_refused_before_anything_is_written_and_packing_works(saved, tmp_path):
    with pytest.raises(ValueError, match="no part of the weights, so it cannot be merged"):
        export_merged(CHECKPOINT, saved, tmp_path / "merged")
    assert not list(tmp_path.iterdir())
    archive = export_adapter(saved, tmp_path / "adapter.zip")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    again = load_adapter(fresh_model(), tmp_path / "unpacked")
    torch.testing.assert_close(
        again(input_ids=ids()).logits, load_adapter(fresh_model(), saved)(input_ids=ids()).logits, atol=0, rtol=0
    )


def changed(saved, folder, config=None, tensors=None):
    shutil.copytree(saved, folder)
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**said, **(config or {})}))
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


WIDTH = LAYERS * 2 * HIDDEN


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"num_virtual_tokens": 7}, None, "num_virtual_tokens=7 rows is needed"),
        ({"num_virtual_tokens": None}, None, "num_virtual_tokens=None"),
        ({"num_virtual_tokens": True}, None, "num_virtual_tokens=True"),
        ({"num_transformer_submodules": 2}, None, "num_transformer_submodules=2"),
        ({"modules_to_save": ["lm_head"]}, None, "modules_to_save="),
        ({"something_new": 3}, None, "something_new=3"),
        ({"peft_type": "P_TUNING"}, None, "only LORA and PREFIX_TUNING"),
        ({"peft_type": "LORA"}, None, "says"),
        ({}, {"other": torch.zeros(LENGTH, WIDTH)}, "holds other"),
        ({}, {"prompt_embeddings": torch.zeros(LENGTH, WIDTH - 1)}, "belongs to another model"),
        ({}, {"prompt_embeddings": torch.zeros(LENGTH, WIDTH).int()}, "torch.int32"),
        ({}, {"prompt_embeddings": torch.full((LENGTH, WIDTH), torch.inf)}, "NaN or infinity"),
    ],
)
def test_files_that_are_no_plain_prefix_of_this_base_are_refused(config, tensors, message, saved, tmp_path):
    base = fresh_model()
    asked = [p.requires_grad for p in base.parameters()]
    with pytest.raises(ValueError, match=message):
        load_adapter(base, changed(saved, tmp_path / "adapter", config, tensors))
    assert [p.requires_grad for p in base.parameters()] == asked
    attach_lora(base)  # left as it was


def test_another_base_is_named(saved):
    net = fresh_model()
    net.transformer.layers[2].attention.dense.weight.data.mul_(2)
    with pytest.raises(ValueError, match=r"another base.*transformer\.layers\.2"):
        load_adapter(net, saved)


# The authors' checkpoints ------------------------------------------------------------------------------------------


def ptuning(folder, projection, dtype=torch.float32, **changes):
    """A checkpoint as the authors' training writes it: only what was trained, and the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model().config.to_dict() | {"pre_seq_len": LENGTH, "prefix_projection": projection}
    torch.manual_seed(1)
    net = ChatGLMForConditionalGeneration(type(model().config)(**config))
    for weight in net.transformer.prefix_encoder.parameters():
        weight.data.normal_(std=0.5)
    start = "transformer.prefix_encoder."
    state = {name: weight.to(dtype) for name, weight in net.state_dict().items() if name.startswith(start)}
    torch.save({**state, **changes}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return state


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_published_prefix_becomes_an_adapter(projection, dtype, tmp_path):
    state = ptuning(tmp_path / "checkpoint-3000", projection, dtype)
    config = type(model().config)(**json.loads((tmp_path / "checkpoint-3000" / "config.json").read_text()))
    want = ChatGLMForConditionalGeneration.from_pretrained(CHECKPOINT, config=config, dtype=torch.float32).eval()
    start = "transformer.prefix_encoder."
    want.transformer.prefix_encoder.load_state_dict({n.removeprefix(start): t.float() for n, t in state.items()})
    net = import_ptuning(fresh_model(), tmp_path / "checkpoint-3000")
    expected = want(ids()).logits
    assert (expected - model()(ids()).logits).abs().max() > 0.1
    torch.testing.assert_close(net(input_ids=ids()).logits, expected, atol=1e-4, rtol=0)
    assert answers(net, tokenizer(), PROMPTS) == answers(want, tokenizer(), PROMPTS)
    again = load_adapter(fresh_model(), save_adapter(net, tmp_path / "adapter"))
    torch.testing.assert_close(again(input_ids=ids()).logits, expected, atol=1e-4, rtol=0)
    assert base_checksum(want) == base_checksum(model()) == base_checksum(net)  # the prefix is no part of the base
    assert count_parameters(net)[0] == LENGTH * WIDTH


def test_what_is_no_published_prefix_is_refused(tmp_path):
    start, folder = "transformer.prefix_encoder.", tmp_path / "checkpoint"
    cases = [
        ({"lm_head.weight": torch.zeros(2, 2)}, "a checkpoint of the whole model"),
        ({f"{start}trans.0.weight": torch.zeros(64, 64)}, r"lacks .*trans\.0\.bias"),
        ({f"{start}embedding.weight": torch.zeros(LENGTH, 8)}, "belongs to another model"),
        ({f"{start}embedding.weight": torch.zeros(LENGTH)}, "must be a matrix"),
        ({f"{start}embedding.weight": torch.zeros(LENGTH + 1, WIDTH)}, "which is it"),
        ({f"{start}embedding.weight": torch.full((LENGTH, WIDTH), torch.nan)}, "NaN"),
        ({f"{start}embedding.weight": "text"}, "no tensor"),
    ]
    for changes, message in cases:
        ptuning(folder, False, **changes)
        with pytest.raises(ValueError, match=message):
            import_ptuning(fresh_model(), folder)
    ptuning(folder, True, **{f"{start}trans.2.weight": torch.zeros(WIDTH, 7)})
    with pytest.raises(ValueError, match="do not fit together"):
        import_ptuning(fresh_model(), folder)
    with pytest.raises(FileNotFoundError):
        import_ptuning(fresh_model(), tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="was not loaded"):
        import_ptuning(fresh_model(), folder)
    own = ChatGLMForConditionalGeneration(type(model().config)(**model().config.to_dict() | {"pre_seq_len": 5}))
    for attach in (attach_lora, attach_prefix):
        with pytest.raises(ValueError, match="a prefix of its own"):
            attach(own)
