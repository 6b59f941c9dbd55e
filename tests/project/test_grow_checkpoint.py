"""A grown checkpoint against the tiny one that it was grown from: same ids, same logits, same answers."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import grow_checkpoint
import pytest
import sentencepiece
import torch
from grow_checkpoint import TINY, check_sizes, grow, grown_config, shard_shapes
from hypothesis import given
from hypothesis import strategies as st
from tiny_answers import ask
from tiny_tokenizer import insert_unused_pieces

from glmhelpers.lora import attach_lora
from glmhelpers.tokens.prompts import build_prompt
from glmhelpers.weights import download_weights, verify_weights
from glmhelpers.weights.layout import published_shards
from tests.helpers.hub_server import Hub
from tests.helpers.storage_tracker import StorageTracker
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer

pytestmark = pytest.mark.once

DATA = TINY.parent
LEARNED, SPECIAL = 1200, 344
TINY_CONFIG = ChatGLMConfig.from_pretrained(TINY)
# Queries times 2 exactly; times the square root of 2 with twice the width; with six times the width and more heads.
SHAPES = {
    "512 wide": None,
    "256 wide": {"hidden_size": 256, "heads": 8, "layers": 9, "inner_hidden_size": 512, "vocab_size": 1728},
    "768 wide": {"hidden_size": 768, "heads": 24, "layers": 8, "inner_hidden_size": 640, "vocab_size": 1829},
}


def load(folder: Path):
    model = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return SimpleNamespace(folder=folder, model=model, tokenizer=ChatGLMTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def tiny():
    return load(TINY)


@pytest.fixture(scope="module", params=SHAPES)
def large(request, grown, tmp_path_factory):
    sizes = SHAPES[request.param]
    return load(grow(TINY, tmp_path_factory.mktemp("grown") / "x", **sizes) if sizes else grown)


@pytest.fixture(scope="module")
def questions():
    rows = json.loads((DATA / "alpaca_tiny.json").read_text(encoding="utf-8"))[::60]
    asked = [build_prompt(row["instruction"], input=row["input"]) for row in rows]
    held_out = json.loads((DATA / "held_out.json").read_text(encoding="utf-8"))[::9]
    return [*asked, *(row["question"] for row in held_out)]


def moved(ids: torch.Tensor, large) -> torch.Tensor:
    """Ids of the tiny tokenizer as the large one has them."""
    return torch.where(ids >= LEARNED, ids + large.model.config.mask_token_id - LEARNED, ids)


def test_texts_have_the_same_ids_but_for_the_special_ones(tiny, large, questions):
    for text in [*questions, "def f(x):\n\treturn    x", "貔貅 <grown_1300> Ω", "[gMASK] <sop> [MASK]", ""]:
        ids = torch.tensor(tiny.tokenizer.encode(text, "Yes."))
        assert large.tokenizer.encode(text, "Yes.") == moved(ids, large).tolist()
        assert large.tokenizer.decode(moved(ids, large)) == tiny.tokenizer.decode(ids)


def test_logits_are_those_of_the_tiny_model(tiny, large, questions):
    history = [("你好", "你好！"), ("What is 2 plus 2?", "2 plus 2 is 4.")]
    prompts = [*questions[::4], build_prompt("3加4等于几？", history), "很长的问题 a long question " * 20]
    first, rows = large.model.config.mask_token_id, large.model.config.vocab_size
    pieces = moved(torch.arange(LEARNED + SPECIAL), large)
    unused = torch.tensor([*range(LEARNED, first), *range(first + SPECIAL, rows)])
    for prompt in prompts:
        ids = torch.tensor([tiny.tokenizer.encode(prompt, "The answer is 7.")])
        with torch.no_grad():
            wanted, found = tiny.model(ids).logits, large.model(moved(ids, large)).logits
        torch.testing.assert_close(found[..., pieces], wanted[..., : LEARNED + SPECIAL], atol=1e-4, rtol=0)
        assert (found[..., unused] + 20).abs().max() < 1e-3


def test_greedy_answers_are_those_of_the_tiny_model(tiny, large, questions):
    answers = ask(large.model, large.tokenizer, questions)
    assert answers == ask(tiny.model, tiny.tokenizer, questions)
    assert len(set(answers)) > len(questions) / 3  # not one answer to everything


def test_every_block_gives_the_adapter_a_gradient(large):
    model = attach_lora(load(large.folder).model)
    ids = torch.tensor([large.tokenizer.encode("你叫什么名字？", "我叫小星。")])
    model(input_ids=ids, labels=ids).loss.backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if "lora_B" in name}
    assert len(norms) == large.model.config.num_layers
    assert min(norms.values()) > 0.01 * max(norms.values())


def test_folder_is_as_published_and_can_be_downloaded(grown, tmp_path):
    report = verify_weights(grown)
    assert report.ok
    assert report.files == 9
    index = json.loads((grown / "pytorch_model.bin.index.json").read_text())
    shards = {path.name: torch.load(path, weights_only=True) for path in sorted(grown.glob("*.bin"))}
    assert len(shards) == 8
    assert index["weight_map"] == {name: shard for shard, tensors in shards.items() for name in tensors}
    stored = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.float32 if "layernorm" in name else torch.float16)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert torch.equal(stored["lm_head.weight"], stored["transformer.word_embeddings.weight"])

    shutil.copy(grown / "weights_manifest.json", tmp_path)
    with Hub(grown) as hub:
        assert download_weights(tmp_path, f"{hub.url}/plain", progress=False).ok
    assert {path.name for path in grown.iterdir()} <= {path.name for path in tmp_path.iterdir()}
    again, config = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, grown))
    del config["architectures"]
    assert again == config


def test_defaults_are_the_sizes_of_chatglm_6b():
    facts = grown_config(TINY, 4096, 32, 28, None, 130528)
    published = json.loads((DATA.parent / "thuglm" / "published" / "config.json").read_text())
    same = set(facts) & set(published)
    assert {key: facts[key] for key in same} == {key: published[key] for key in same}
    assert len(same) >= 16
    assert shard_shapes(ChatGLMConfig(**facts)) == published_shards(ChatGLMConfig())


def test_tokenizer_of_full_size():
    small = (TINY / "ice_text.model").read_bytes()
    one = sentencepiece.SentencePieceProcessor(model_proto=small)
    other = sentencepiece.SentencePieceProcessor(model_proto=insert_unused_pieces(small, LEARNED, 130000))
    assert other.get_piece_size() == 130344
    assert [other.piece_to_id(piece) for piece in ("[MASK]", "[gMASK]", "<sop>", "<eop>")] == [
        *(130000, 130001, 130004, 130005)
    ]
    assert all(other.is_unused(number) for number in range(LEARNED, 130000, 1000))
    for text in ("你好，世界", "What is 3 plus 4?", "貔貅"):
        assert other.encode(text, out_type=str) == one.encode(text, out_type=str)
    with pytest.raises(ValueError, match="fewer than expected"):
        insert_unused_pieces(small, 5000, 6000)


def test_same_bytes_again_and_another_seed_changes_passing_blocks_only(tmp_path):
    sizes = SHAPES["256 wide"]
    one, same, other = (grow(TINY, tmp_path / str(at), **sizes, seed=seed) for at, seed in enumerate((0, 0, 1)))
    names = sorted(path.name for path in one.iterdir())
    assert all((one / name).read_bytes() == (same / name).read_bytes() for name in names)
    first, second = ({**load(folder).model.state_dict()} for folder in (one, other))
    changed = {name for name, tensor in first.items() if not torch.equal(tensor, second[name])}
    assert changed == {"transformer.layers.8.attention.dense.weight"}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 500}, "hidden_size 500 .* 128 wide .* 256, 384"),
        ({"hidden_size": 128, "heads": 8}, "hidden_size 128 .* at least twice"),
        ({"hidden_size": 0, "heads": 8}, "hidden_size 0 "),
        ({"hidden_size": -256, "heads": 8}, "hidden_size -256 "),
        ({"heads": 4}, "heads 4 .* needs 8"),
        ({"heads": 0}, "heads 0 .* needs 8"),
        ({"heads": 24}, "heads 24 at hidden_size 4096 .* 170.667 wide.* times 16"),
        ({"hidden_size": 256, "heads": 32}, "heads 32 at hidden_size 256 .* 8 wide"),
        ({"layers": 7}, "layers 7 .* needs 8"),
        ({"inner_hidden_size": 511}, "inner_hidden_size 511 .* needs 512"),
        ({"vocab_size": 1700}, "vocab_size 1700 .* needs 1728"),
    ],
)
def test_sizes_that_cannot_work_are_named(sizes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        grow(TINY, tmp_path / "never", **sizes)
    assert list(tmp_path.iterdir()) == []


@given(
    st.integers(-1, 40).map(lambda copies: 128 * copies) | st.integers(-10, 3000),
    st.integers(1, 9).map(lambda more: 8 * more) | st.integers(-2, 70),
    st.integers(0, 40),
    st.integers(0, 9000),
    st.integers(0, 5000),
)
def test_what_is_not_refused_can_be_built(hidden, heads, layers, inner, vocab):
    try:
        check_sizes(TINY_CONFIG, hidden, heads, layers, inner, vocab)
    except ValueError:
        return
    config = ChatGLMConfig(hidden_size=hidden, num_attention_heads=heads)
    assert (hidden % 128, config.head_dim % 16, heads * config.head_dim) == (0, 0, hidden)
    assert hidden >= 256
    assert (heads >= 8, layers >= 8, inner >= 512, vocab >= 1728) == (True,) * 4


def test_nothing_of_the_users_is_touched_and_nothing_half_written(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for taken in ("mine", "file"):
        with pytest.raises(FileExistsError, match=f"something here already.*{taken}"):
            grow(TINY, tmp_path / taken, **SHAPES["256 wide"])
    (tmp_path / "empty").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(grow_checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**7))
        with pytest.raises(OSError, match=r"needed and 10,000,000 are free.*smaller sizes"):
            grow(TINY, tmp_path / "empty", **SHAPES["256 wide"])
        patch.undo()
        patch.setattr(grow_checkpoint, "write_manifest", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            grow(TINY, tmp_path / "empty", **SHAPES["256 wide"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "mine"]
    assert list((tmp_path / "empty").iterdir()) == []
    grow(TINY, tmp_path / "empty", **SHAPES["256 wide"])
    assert verify_weights(tmp_path / "empty").ok


def test_one_shard_at_a_time_is_in_memory(tmp_path):
    with StorageTracker() as tracker:
        folder = grow(TINY, tmp_path / "x", 512, 8, 28, vocab_size=2528)
    sizes = [path.stat().st_size for path in folder.glob("*.bin")]
    source = sum(path.stat().st_size for path in TINY.glob("*.bin"))
    largest = 4 * 512 * 512 * 4  # bytes of the largest matrix in float32, while random numbers are made
    assert max(sizes) < tracker.peak < max(sizes) + largest + 4 * source
    assert tracker.peak < sum(sizes) / 3
