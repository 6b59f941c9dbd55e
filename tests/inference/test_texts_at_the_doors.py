"""What is no text, or half a character, at every door that takes a text: named, with its place and with what helps."""

import json

import pytest

from glmhelpers.data.convert import convert_alpaca
from glmhelpers.inference.batch import answers, share_right
from glmhelpers.inference.chat import ChatSession, Generation
from glmhelpers.inference.scores import score_texts
from glmhelpers.tokens.encode import encode_example, encode_file
from glmhelpers.tokens.prompts import build_prompt
from tests.helpers.reference import model, tokenizer

HALF = "ab\ud83d c"  # as json.loads('"ab\\ud83d c"') gives it
USER = {"role": "user", "content": "hi"}


def ask(text, history=()):
    return model().chat(tokenizer(), text, list(history), do_sample=False, max_new_tokens=2)


HALVES = {
    "tokenizer": (lambda: tokenizer()(HALF), "text 0"),
    "tokenizer, many": (lambda: tokenizer()(["good", HALF]), "text 1"),
    "encode": (lambda: tokenizer().encode(HALF), "text 0"),
    "tokenize": (lambda: tokenizer().tokenize(HALF), "the text"),
    "words": (lambda: tokenizer()(["good", HALF], is_split_into_words=True), "the text"),
    "text_ids": (lambda: tokenizer().text_ids(["good", HALF]), "text 1"),
    "a chat template": (
        lambda: tokenizer().apply_chat_template([USER | {"content": HALF}]),
        "the content of message 0",
    ),
    "model.chat": (lambda: ask(HALF), "the query"),
    "stream_chat": (lambda: next(model().stream_chat(tokenizer(), HALF)), "the query"),
    "a history": (lambda: ask("hi", [("q", "a"), (HALF, "a")]), "turn 1 of the history"),
    "encode_example": (lambda: encode_example(tokenizer(), {"instruction": "q", "output": HALF}), "the row's output"),
}


@pytest.mark.parametrize("door", HALVES)
def test_half_a_character_is_named_with_its_place(door):
    call, name = HALVES[door]
    with pytest.raises(ValueError, match=rf"{name} holds half a character, '\\ud83d', at place 2 .*U\+FFFD"):
        call()


def test_the_advice_about_half_a_character_helps():
    mended = HALF.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert mended == "ab\ufffd c"
    assert tokenizer()(mended)["input_ids"]
    both = "\ud83d\ude00"  # two halves in a text of Python are two characters, and belong together
    with pytest.raises(ValueError, match="half a character"):
        tokenizer()(both)
    assert both.encode("utf-16", "surrogatepass").decode("utf-16", "replace") == "\U0001f600"


@pytest.mark.parametrize("name", ["instruction", "input", "output", "system", "history"])
def test_a_row_with_half_a_character_is_named_with_file_and_line_and_converting_it_helps(tmp_path, name):
    path, row = tmp_path / "rows.jsonl", {"instruction": "q", "input": "", "output": "a"}
    bad = row | {name: [[HALF, "a"]] if name == "history" else HALF}
    path.write_text(f"{json.dumps(row)}\n{json.dumps(bad)}\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2 .* holds half a character.*convert_alpaca"):
        encode_file(path, tokenizer())
    report = convert_alpaca(path, tmp_path / "mended.jsonl")
    assert report.files[0].repairs == {"lone surrogate": 1}
    assert len(encode_file(tmp_path / "mended.jsonl", tokenizer())) == 2


def test_an_escaped_character_of_two_halves_is_a_character_in_a_token_file(tmp_path):
    for place, text in enumerate((json.dumps("\U0001f600"), '"\U0001f600"')):
        (tmp_path / f"{place}.jsonl").write_text(f'{{"instruction": "q", "input": "", "output": {text}}}\n', "utf-8")
    escaped, plain = (encode_file(tmp_path / f"{place}.jsonl", tokenizer())["input_ids"] for place in (0, 1))
    assert escaped == plain


def test_our_own_doors_read_half_a_character_as_rows_are_read():
    """As `convert_alpaca` does, so that what is asked is what was learnt."""
    assert build_prompt(HALF, [(HALF, HALF)], system=HALF).count("\ufffd") == 4
    session = ChatSession(model(), tokenizer(), settings=Generation(max_new_tokens=1, temperature=0))
    assert session.chat(HALF).question == "ab\ufffd c"


@pytest.mark.parametrize("value", [b"abc", None, 5, float("nan"), ["a"], True])
def test_what_is_no_text_is_named_at_every_door(value):
    kind = type(value).__name__
    doors = {
        "text 1": lambda: tokenizer().text_ids(["good", value]),
        "the text": lambda: tokenizer().tokenize(value),
        "the query": lambda: ask(value),
        "the input": lambda: build_prompt("q", input=value),
        "the system": lambda: build_prompt("q", system=value),
        r"questions\[1\]": lambda: answers(model(), tokenizer(), ["q", value], max_new_tokens=1),
        r"texts\[0\]": lambda: score_texts([value], ["a"]),
        r"references\[0\]": lambda: score_texts(["a"], [value]),
        r"expected\[0\]": lambda: share_right(["a"], [value]),
        "the row's output": lambda: encode_example(tokenizer(), {"instruction": "q", "output": value}),
    }
    if not isinstance(value, list):  # which the tokenizer reads as words
        doors["text 1 "] = lambda: tokenizer()(["good", value])
    for name, call in doors.items():
        with pytest.raises(TypeError, match=rf"{name}.* an? {kind}"):
            call()


def test_one_text_is_not_taken_letter_by_letter():
    calls = [
        lambda: tokenizer().text_ids("abc"),
        lambda: score_texts("abc", "abc"),
        lambda: share_right("abc", "abc"),
        lambda: answers(model(), tokenizer(), b"abc"),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="is one text: put it in a list"):
            call()


def test_bytes_in_a_chat_template_are_no_text():
    """transformers hands the words "<bytes>" to the template."""
    with pytest.raises(TypeError, match="the content of message 0 is a bytes"):
        tokenizer().apply_chat_template([USER | {"content": b"hi"}], tokenize=False)
    with pytest.raises(TypeError, match="the content of message 0 is a bytes"):
        tokenizer().apply_chat_template([[USER], [USER | {"content": b"hi"}]])


@pytest.mark.parametrize("history", [b"ab", 5, float("nan")])
def test_a_history_that_is_none_is_named(history):
    with pytest.raises(ValueError, match=r"the history is a (bytes|int|float); expected a list of"):
        model().chat(tokenizer(), "hi", history)


@pytest.mark.parametrize(
    ("name", "value"), [("input", 0), ("input", 5), ("system", []), ("output", 5), ("input", False)]
)
def test_a_row_of_a_token_file_with_something_else_than_text_is_named(tmp_path, name, value):
    """A nought or an empty list is no text either: it would be left out without a word."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "q", "input": "", "output": "a", name: value}))
    with pytest.raises(ValueError, match=rf"line 1 .*the row's {name} is a {type(value).__name__}; expected text"):
        encode_file(path, tokenizer())


@pytest.mark.parametrize("settings", [{"train_sop": "no"}, {"train_sop": 1}, {"max_length": "5"}, {"max_length": 7.5}])
def test_a_setting_of_the_tokens_that_is_none_is_named(settings):
    """A text such as "no" is true."""
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}; "):
        encode_example(tokenizer(), {"instruction": "q", "output": "a"}, **settings)


def test_a_folder_is_no_token_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder: name the file in it that convert_alpaca wrote"):
        encode_file(tmp_path, tokenizer())
