"""The tokenizer against what the published one returned (tests/reference/tokenizer/cases.json)."""

import pytest
import torch
from transformers import AutoTokenizer

from tests.helpers.reference import logit_cases, tensors, tokenizer, tokenizer_cases
from thuglm import ChatGLMConfig, ChatGLMTokenizer
from thuglm.prefix_mask import make_position_ids, make_visible

CASES = tokenizer_cases()
INFO = CASES["info"]


def the_config() -> ChatGLMConfig:
    tok = tokenizer()
    return ChatGLMConfig(
        vocab_size=3040,
        hidden_size=64,
        num_attention_heads=4,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        mask_token_id=tok.mask_token_id,
        gmask_token_id=tok.gmask_token_id,
    )


@pytest.mark.parametrize("case", CASES["texts"], ids=lambda case: repr(case["text"][:24]))
def test_against_original_texts(case):
    tok, text = tokenizer(), case["text"]
    assert tok.encode(text) == case["encode"]
    assert tok.encode(text, add_special_tokens=False) == case["encode_no_special"]
    assert tok.tokenize(text) == case["tokenize"]
    assert tok.decode(case["encode"]) == case["decode"]
    assert tok.decode(case["encode"], skip_special_tokens=True) == case["decode_skip_special"]
    assert tok.decode(case["encode"], clean_up_tokenization_spaces=False) == case["decode_no_cleanup"]
    assert tok.decode(case["encode_no_special"]) == case["decode_no_special_ids"]


@pytest.mark.parametrize("case", CASES["pairs"], ids=lambda case: repr(case["a"][:24]))
def test_against_original_pairs(case):
    tok = tokenizer()
    assert tok.encode(case["a"], case["b"]) == case["encode"]
    assert tok.encode(case["a"], case["b"], add_special_tokens=False) == case["encode_no_special"]
    assert tok.decode(case["encode"]) == case["decode"]
    assert tok.decode(case["encode"], skip_special_tokens=True) == case["decode_skip_special"]


@pytest.mark.parametrize("number", range(len(CASES["batches"])))
def test_against_original_batches(number):
    case = CASES["batches"][number]
    got = tokenizer()(case["texts"], **case["kwargs"])
    want = case["out"]
    assert got["input_ids"] == want["input_ids"]
    if "attention_mask_rows" not in want:
        return
    # The original returns the full mask and the positions; here the model makes them from the 2-D mask.
    config = the_config()
    for ids, mask_2d, mask_rows, positions in zip(
        got["input_ids"], got["attention_mask"], want["attention_mask_rows"], want["position_ids"], strict=True
    ):
        ids, mask_2d = torch.tensor([ids]), torch.tensor([mask_2d])
        visible = make_visible(ids, config, mask_2d)[0, 0]
        masked = torch.tensor([[c == "1" for c in row] for row in mask_rows])
        assert torch.equal(~visible, masked)
        has_both = (ids == config.mask_token_id).any() and (ids == config.gmask_token_id).any()
        bos_before_hole = ids[0].tolist().index(config.bos_token_id) < ids[0].tolist().index(config.gmask_token_id)
        if not has_both and not bos_before_hole:  # there the published tokenizer and the published model differ
            assert make_position_ids(ids, config, mask_2d)[0].tolist() == positions


@pytest.mark.parametrize("number", range(len(CASES["truncation"])))
def test_against_original_truncation(number):
    case = CASES["truncation"][number]
    pair = [case["text_pair"]] if "text_pair" in case else []
    assert tokenizer().encode(case["text"], *pair, **case["kwargs"]) == case["encode"]


@pytest.mark.parametrize("case", CASES["decode_ids"], ids=lambda case: str(case["ids"])[:30])
def test_against_original_decode(case):
    tok, ids = tokenizer(), case["ids"]
    if isinstance(case["decode"], dict):  # {"error": "IndexError..."}
        with pytest.raises(IndexError, match="is no piece"):
            tok.decode(ids)
        return
    assert tok.decode(ids) == case["decode"]
    if isinstance(ids, int):
        return
    assert tok.decode(ids, skip_special_tokens=True) == case["decode_skip_special"]
    assert tok.convert_ids_to_tokens(ids) == case["tokens"]


def test_against_original_special_tokens():
    tok = tokenizer()
    for name in (
        "vocab_size",
        "bos_token",
        "bos_token_id",
        "eos_token",
        "eos_token_id",
        "pad_token",
        "pad_token_id",
        "unk_token",
        "unk_token_id",
        "mask_token",
        "mask_token_id",
        "gmask_token_id",
        "end_token_id",
        "padding_side",
        "truncation_side",
    ):
        assert getattr(tok, name) == INFO[name], name
    assert len(tok) == INFO["len"]
    assert set(INFO["all_special_ids"]) <= set(tok.all_special_ids)
    for index, piece in INFO["id_to_piece_sample"].items():
        assert tok.convert_ids_to_tokens(int(index)) == piece
    for token, index in CASES["convert_tokens_to_ids"].items():
        assert tok.convert_tokens_to_ids(token) == index, token


def test_against_original_build_inputs():
    for case in CASES["build_inputs_with_special_tokens"]:
        assert tokenizer().build_inputs_with_special_tokens(case["a"], case["b"]) == case["out"]
    for case in CASES["batch_decode"]:
        assert tokenizer().batch_decode(case["ids"]) == case["out"]
        assert tokenizer().batch_decode(case["ids"], skip_special_tokens=True) == case["out_skip_special"]


def test_special_tokens_mask_marks_what_was_added():
    tok = tokenizer()
    ids, mask = tok.encode("你好", "早"), tok("你好", "早", return_special_tokens_mask=True)["special_tokens_mask"]
    assert [token for token, added in zip(ids, mask, strict=True) if added] == [2657, 2660, 2661]


def test_save_and_load_again(tmp_path):
    tok = tokenizer()
    tok.save_pretrained(tmp_path)
    for again in (ChatGLMTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        for case in CASES["texts"][:40]:
            assert again.encode(case["text"]) == case["encode"]
            assert again.decode(case["encode"]) == case["decode"]


def test_right_padding_is_allowed_for_training():
    tok = tokenizer()
    batch = tok(["你好", "介绍一下清华大学"], padding=True, padding_side="right")
    assert batch["input_ids"][0][:5] == tok.encode("你好")
    assert batch["attention_mask"][0] == [1] * 5 + [0] * 8


def test_v1_0_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"v1\.0"):
        ChatGLMTokenizer(vocab_file=tokenizer().vocab_file, num_image_tokens=20000)


def test_model_file_without_the_special_pieces_is_refused(tmp_path):
    import sentencepiece

    (tmp_path / "text.txt").write_text("a b c d e f g h\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "other"), vocab_size=12, minloglevel=2
    )
    with pytest.raises(ValueError, match=r"has no piece .*gMASK"):
        ChatGLMTokenizer(vocab_file=tmp_path / "other.model")


def test_tokenizer_positions_may_be_passed_where_they_differ_from_the_model():
    """d2: [MASK] and [gMASK] in one prompt. The tokenizer counted from [MASK], the model counts from [gMASK]."""
    case, data = logit_cases()["d2_both_tokenizer_positions"], tensors("d2_both_tokenizer_positions")
    derived = make_position_ids(data["input_ids"], the_config())
    assert data["position_ids"][0, 0, -1] == case["mask_position"]
    assert derived[0, 0, -1] == logit_cases()["d3_both_model_positions"]["mask_position"]
