"""Checkpoints, tokens and places that others make: whole, kept, or refused before anything is read."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, modeling_utils

from glmhelpers.inference import answers
from glmhelpers.tokens.encode import text_ids
from tests.helpers.reference import CHECKPOINT, ROOT, fresh_model, model, tokenizer
from tests.helpers.tiny_models import training_rows
from thuglm import ChatGLMForConditionalGeneration

EMBEDDING = "transformer.word_embeddings.weight"
PARTS = [EMBEDDING.rpartition(".")[0], *(f"transformer.layers.{n}" for n in range(4))]
PARTS += ["transformer.final_layernorm", "lm_head"]


# Checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("holds_head", [False, True])
def test_a_checkpoint_without_its_embedding(holds_head, tmp_path):
    model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors.pop(EMBEDDING)
    save_file({**tensors, **({"lm_head.weight": embedding} if holds_head else {})}, file, {"format": "pt"})
    if holds_head:  # the same matrix by its other name
        net = ChatGLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
        ids = torch.tensor([training_rows()[0]])
        assert torch.equal(net(ids).logits, model()(ids).logits)
    else:
        with pytest.raises(ValueError, match=f"no {EMBEDDING}"):
            ChatGLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)


# Tokens ------------------------------------------------------------------------------------------------------------


def test_added_tokens_are_used_and_kept(tmp_path):
    tokens = AutoTokenizer.from_pretrained(ROOT / "tokenizer")
    before = len(tokens)
    assert tokens.add_tokens(["<工具>", "bambam"]) == 2
    assert tokens.add_special_tokens({"extra_special_tokens": ["<|user|>"]}) == 1
    text = "你好<工具>好 bambam <|user|> you"
    tokens.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path)
    for known in (tokens, again, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(known) == before + 3
        ids = known(text, add_special_tokens=False)["input_ids"]
        assert [token for token in ids if token >= before] == [before, before + 1, before + 2]
        assert text_ids(known, [text, "你好"]) == [ids, tokenizer().encode("你好", add_special_tokens=False)]
        decoded = known.decode(ids)
        assert [part in decoded for part in ("<工具>", "bambam", "<|user|>")] == [True] * 3
        assert "<|user|>" not in known.decode(ids, skip_special_tokens=True)
        # What is not added is spelled out as before.
        assert known("[gMASK]")["input_ids"] == tokenizer()("[gMASK]")["input_ids"]
        assert "<|user|>" in known.all_special_tokens
        assert known.gmask_token not in known.all_special_tokens


def test_an_added_token_can_be_answered():
    tokens, net = AutoTokenizer.from_pretrained(ROOT / "tokenizer"), fresh_model()
    assert tokens.add_tokens(["<工具>"]) == 1
    new = tokens.convert_tokens_to_ids("<工具>")
    with torch.no_grad():
        net.lm_head.weight[new] = net.lm_head.weight.abs().sum(0) * 100
        net.transformer.final_layernorm.bias.fill_(10)
    assert answers(net, tokens, ["你好"], max_new_tokens=2) == ["<工具><工具>"]


# Places ------------------------------------------------------------------------------------------------------------


def test_offload_to_disk_is_refused_before_a_weight_is_read(monkeypatch, tmp_path):
    def read(*args, **kwargs):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(modeling_utils.PreTrainedModel, "_load_pretrained_model", read)
    disk = {**dict.fromkeys(PARTS, "cpu"), "transformer.layers.3": "disk"}
    for places in ({"device_map": disk}, {"device_map": "auto", "max_memory": {"cpu": "600KB"}}):
        with pytest.raises(ValueError, match="Offload is not supported"):
            ChatGLMForConditionalGeneration.from_pretrained(CHECKPOINT, offload_folder=tmp_path, **places)


def test_weights_that_accelerate_takes_away_are_refused(tmp_path):
    places = {**dict.fromkeys(PARTS, "cpu"), "transformer.rotary_emb": "cpu"}
    for number, take in enumerate(
        (
            lambda net: cpu_offload(net, execution_device=torch.device("cpu")),
            lambda net: disk_offload(net, tmp_path / "a", execution_device=torch.device("cpu")),
            *(
                lambda net, part=part: dispatch_model(
                    net, {**places, part: "disk"}, main_device="cpu", offload_dir=tmp_path / part, force_hooks=True
                )
                for part in ("transformer.layers.3", "lm_head")
            ),
        )
    ):
        net = copy.deepcopy(model())
        if number == 3:
            net.lm_head.weight = torch.nn.Parameter(net.lm_head.weight.detach().clone())
        net = take(net)
        with pytest.raises(RuntimeError, match="Offload is not supported"):
            net(torch.tensor([training_rows()[0]]))


def test_a_map_for_a_model_without_a_prefix_is_not_warned_about(recwarn):
    places = {**dict.fromkeys(PARTS, "cpu"), "transformer.layers.3": "meta"}
    ChatGLMForConditionalGeneration.from_pretrained(CHECKPOINT, device_map=places)
    assert not [warning for warning in recwarn if "device_map" in str(warning.message)]
