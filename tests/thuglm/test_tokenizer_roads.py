"""The short roads from text to ids give what transformers' own long one gives, for any text and any setting."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizer

from tests.helpers.reference import ROOT
from thuglm import ChatGLMTokenizer

PARTS = (
    "<sop>",
    "[MASK]",
    "[gMASK]",
    "<eop>",
    "<pad>",
    "<n>",
    "<image_7>",
    "<new>",
    " " * 79,
    " " * 81,
    "\n",
    "\t",
    "你好",
)


class LongRoad(ChatGLMTokenizer):
    """Pieces, looked up one by one; blanks as the published tokenizer looks for them."""

    _encode_plus = PreTrainedTokenizer._encode_plus
    prepare_for_model = PreTrainedTokenizer.prepare_for_model

    @staticmethod
    def encode_whitespace(text):
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        for length in range(80, 1, -1):
            text = text.replace(" " * length, f"<|blank_{length}|>")
        return text


@cache
def both(added: bool) -> tuple[ChatGLMTokenizer, LongRoad]:
    pair = ChatGLMTokenizer.from_pretrained(ROOT / "tokenizer"), LongRoad.from_pretrained(ROOT / "tokenizer")
    for each in pair if added else ():
        each.add_tokens(["<new>", "好"])
    return pair


a_text = st.lists(
    st.one_of(st.sampled_from(PARTS), st.text(max_size=6), st.integers(1, 200).map(" ".__mul__)), max_size=6
).map("".join)
how = st.fixed_dictionaries(
    {},
    optional={
        "add_special_tokens": st.booleans(),
        "padding": st.sampled_from([False, True, "max_length", "longest", "do_not_pad"]),
        "truncation": st.sampled_from([False, True, "only_first", "do_not_truncate"]),
        "max_length": st.integers(3, 30),
        "padding_side": st.sampled_from(["left", "right"]),
        "pad_to_multiple_of": st.just(8),
        "return_tensors": st.sampled_from([None, "np"]),
        "return_attention_mask": st.sampled_from([None, True, False]),
        "return_token_type_ids": st.booleans(),
        "return_special_tokens_mask": st.booleans(),
        "return_length": st.booleans(),
        "verbose": st.booleans(),
    },
)


def result(tokenizer, *texts, **asked):
    try:
        found = tokenizer(*texts, **asked)
    except ValueError as error:
        return str(error)
    return {name: repr(value) for name, value in found.items()}


@given(st.lists(a_text, min_size=1, max_size=4), a_text, st.booleans(), how)
@settings(max_examples=300, deadline=None)
@pytest.mark.filterwarnings("ignore:.max_length. is ignored")
def test_any_text_with_any_setting(texts, answer, added, asked):
    short, long = both(added)
    for call in ((texts[0],), (texts,), (texts[0], answer), (texts, [answer] * len(texts))):
        assert result(short, *call, **asked) == result(long, *call, **asked)


@given(st.lists(a_text, max_size=5), st.booleans())
@settings(max_examples=200, deadline=None)
def test_many_texts_in_one_call_from_several_threads(texts, added):
    short, long = both(added)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(short.text_ids, [texts] * 3))
    assert found == [[long.encode(text, add_special_tokens=False) for text in texts]] * 3


def test_words_and_ids_are_taken_as_before():
    short, long = both(False)
    for call, asked in (
        ((["你", "好 吗"],), {"is_split_into_words": True}),
        (([["你", "好"], ["a"]],), {"is_split_into_words": True}),
        (([("问", "答"), ("a", "b")],), {}),
        (([5, 6, 7],), {}),
        (([[5, 6], [7]],), {"padding": True}),
        (([],), {}),
        (("",), {}),
        (([""],), {}),
        (("a", None), {}),
        ((3,), {}),
    ):
        assert result(short, *call, **asked) == result(long, *call, **asked), call
