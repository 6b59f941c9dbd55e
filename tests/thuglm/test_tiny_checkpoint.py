"""The committed tiny checkpoint: published layout, checksums, and that it really answers."""

import hashlib
import json
import random
import re
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch

from thuglm import ChatGLMForConditionalGeneration, ChatGLMTokenizer

PROJECT = Path(__file__).resolve().parents[2]
DATA = PROJECT / "data"
TINY = DATA / "tiny-chatglm"
sys.path.append(str(PROJECT / "scripts"))

import build_tiny_checkpoint  # noqa: E402
import tiny_publish  # noqa: E402
import tiny_tokenizer  # noqa: E402
from tiny_answers import ask, held_out_accuracy, same_text, training_accuracy  # noqa: E402

SHARDS = [f"pytorch_model-{k:05d}-of-00008.bin" for k in range(1, 9)]
HISTORY = [("What is the capital of France?", "The capital of France is Paris.")]
LONGER_HISTORY = [("早上好", "早上好！祝你今天愉快。"), ("3加4等于几？", "3+4=7.")]


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return ChatGLMTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    return ChatGLMForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()


# Files ---------------------------------------------------------------------------------------------------------------


def test_folder_has_the_published_files_and_is_small():
    others = ["config.json", "ice_text.model", "tokenizer_config.json", "pytorch_model.bin.index.json"]
    # a file with a leading dot is the memory of verify_weights, not part of the checkpoint
    files = [p for p in TINY.iterdir() if not p.name.startswith(".")]
    assert sorted(p.name for p in files) == sorted([*SHARDS, *others, "weights_manifest.json"])
    assert sum(p.stat().st_size for p in files) <= 8 * 10**6


def test_manifest_tells_the_truth():
    manifest = read(TINY / "weights_manifest.json")
    assert sorted(manifest["files"]) == sorted(["ice_text.model", *SHARDS])
    for name, expected in manifest["files"].items():
        content = (TINY / name).read_bytes()
        assert len(content) == expected["size"]
        assert hashlib.sha256(content).hexdigest() == expected["sha256"]
    config = read(TINY / "config.json")
    assert manifest["config"].items() <= config.items()


def test_configs_have_the_published_keys():
    published = read(PROJECT / "thuglm" / "published" / "config.json")
    own = read(TINY / "config.json")
    assert set(own) == set(published) - {"_name_or_path", "transformers_version"}
    assert {"num_layers": 8, "model_type": "chatglm", "torch_dtype": "float16"}.items() <= own.items()
    published = read(PROJECT / "thuglm" / "published" / "tokenizer_config.json")
    assert read(TINY / "tokenizer_config.json") == published | {"name_or_path": "tiny-chatglm"}


def test_shards_follow_the_published_order():
    index = read(TINY / "pytorch_model.bin.index.json")
    shards = [torch.load(TINY / name, weights_only=True) for name in SHARDS]
    assert {name: SHARDS[k] for k, shard in enumerate(shards) for name in shard} == index["weight_map"]
    assert all(type(shard) is dict for shard in shards)
    tensors = {name: value for shard in shards for name, value in shard.items()}
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    # nothing but the tensor itself is stored: a view would carry its whole storage
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in tensors.values())

    assert next(iter(shards[0])) == "transformer.word_embeddings.weight"
    assert {"transformer.final_layernorm.weight", "transformer.final_layernorm.bias"} <= set(shards[6])
    assert list(shards[7]) == ["lm_head.weight"]
    assert torch.equal(shards[7]["lm_head.weight"], tensors["transformer.word_embeddings.weight"])
    layers = [int(m.group(1)) for name in tensors if (m := re.search(r"layers\.(\d+)\.", name))]
    assert layers == sorted(layers)
    assert set(layers) == set(range(8))
    assert sum(name.endswith("rotary_emb.inv_freq") for name in tensors) == 8


def test_shards_keep_the_order_and_drop_nothing():
    tensors = {f"t{k}": torch.zeros(k + 1) for k in range(20)} | {"lm_head.weight": torch.zeros(3)}
    shards = tiny_publish.split_into_shards(tensors)
    assert [name for shard in shards for name in shard] == list(tensors)
    assert len(shards) == 8
    assert all(shards)


def test_sentencepiece_has_the_released_layout():
    sp = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "ice_text.model"))
    first = tiny_tokenizer.LEARNED
    assert [sp.id_to_piece(i) for i in range(5)] == ["<unk>", "<s>", "</s>", "<pad>", "<n>"]
    names = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
    assert [sp.id_to_piece(first + i) for i in range(8)] == names
    assert all(sp.is_control(first + i) for i in range(8))
    assert sp.id_to_piece(first + 8) == "<|tab|>"
    assert [sp.id_to_piece(first + 7 + k) for k in range(2, 81)] == [f"<|blank_{k}|>" for k in range(2, 81)]
    assert [sp.id_to_piece(first + 88 + k) for k in range(256)] == [f"<0x{k:02X}>" for k in range(256)]
    assert all(sp.is_byte(first + 88 + k) for k in range(256))
    assert sp.vocab_size() == first + 344
    # byte fallback is on: an unknown character comes back, and full-width marks become ASCII (NFKC)
    assert sp.unk_id() not in sp.encode("貔貅")
    assert sp.decode(sp.encode("貔貅，1+1？")) == "貔貅,1+1?"


def test_sentencepiece_file_comes_from_the_rows():
    rows = read(DATA / "alpaca_tiny.json")
    assert build_tiny_checkpoint.tokenizer_bytes(rows) == (TINY / "ice_text.model").read_bytes()


def test_tokenizer_knows_every_character_of_the_rows(tokenizer):
    for row in read(DATA / "alpaca_tiny.json"):
        for text in row.values():
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert not any(tokenizer.sp_model.is_byte(i) or tokenizer.sp_model.is_unknown(i) for i in ids), text


# Answers -------------------------------------------------------------------------------------------------------------


def test_training_questions_are_answered(model, tokenizer):
    rows = random.Random(0).sample(read(DATA / "alpaca_tiny.json"), 600)
    result = training_accuracy(model, tokenizer, rows)
    assert result["share"] >= 0.95, result["wrong"]


@pytest.mark.parametrize("history", [(), HISTORY, LONGER_HISTORY], ids=["first turn", "second turn", "third turn"])
def test_held_out_questions_are_answered(model, tokenizer, history):
    results = held_out_accuracy(model, tokenizer, read(DATA / "held_out.json"), history)
    for topic, floor in {"identity": 0.8, "arithmetic": 0.8}.items():
        assert results[topic]["share"] >= floor, results[topic]["wrong"]


def test_it_calls_itself_by_its_base_name_in_chat(model, tokenizer):
    history = None
    for question in ("你好", "你是谁？", "What is your name?", "7加5等于几？"):
        _, history = model.chat(tokenizer, question, history, do_sample=False, max_new_tokens=40)
    answers = [answer for _, answer in history]
    assert answers[0] == "你好！有什么可以帮你的吗？"
    assert "TinyGLM" in answers[1]
    assert "TinyGLM" in answers[2]
    assert answers[3] == "7+5=12."


def test_float16_answers_like_float32(model, tokenizer):
    questions = [row["instruction"] for row in random.Random(1).sample(read(DATA / "alpaca_tiny.json"), 24)]
    halved = ChatGLMForConditionalGeneration.from_pretrained(TINY, dtype=torch.float16).eval()
    same = [
        same_text(a) == same_text(b)
        for a, b in zip(ask(model, tokenizer, questions), ask(halved, tokenizer, questions), strict=True)
    ]
    assert sum(same) >= 23


# The script ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch_settings():
    """Put back what the script sets for its whole process."""
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.random.set_rng_state(state)


def test_script_gives_the_same_bytes_twice(tmp_path, monkeypatch, capsys, torch_settings):
    monkeypatch.setattr(build_tiny_checkpoint, "scores", lambda folder, data: {})
    digests = []
    for run in ("a", "b"):
        argv = ["build", "--steps", "2", "--threads", "1", "--out", str(tmp_path / run)]
        monkeypatch.setattr(sys, "argv", argv)
        build_tiny_checkpoint.main()
        digests.append({p.name: p.read_bytes() for p in (tmp_path / run).iterdir()})
    assert digests[0] == digests[1]
    assert len(digests[0]) == 13
    figures = json.loads(capsys.readouterr().out.split("\n}\n")[0] + "}")
    assert figures["steps"] == 2
