"""The same text gives the same prompt in training and in asking; what the tokenizer changes is counted and shown."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmhelpers.data.convert import convert_alpaca
from glmhelpers.inference.batch import _prompts
from glmhelpers.inference.chat import plain_text
from glmhelpers.tokens.encode import encode_example, encode_file, token_report
from glmhelpers.tokens.examples import examples_of
from glmhelpers.tokens.prompts import TEMPLATES, with_input
from glmhelpers.tokens.report import Settings
from glmhelpers.tokens.round_trip import RoundTrip, around_difference, text_ids
from glmhelpers.tokens.texts import AROUND, CONTROL, LINE_END, SURROGATE, clean_text
from tests.helpers.reference import tokenizer

CLEANED = {
    # text: (without indent, with indent)
    "plain": ("plain", "plain"),
    " Paris. \r\n": ("Paris.", "Paris."),
    "    return x": ("return x", "    return x"),
    "\treturn x": ("return x", "\treturn x"),
    "\n \n  a = 1\r\n  b = 2\n\n": ("a = 1\n  b = 2", "  a = 1\n  b = 2"),
    " a\n b": ("a\n b", " a\n b"),
    "　　从前有座山。\n　　山里有座庙。": ("从前有座山。\n　　山里有座庙。", "　　从前有座山。\n　　山里有座庙。"),
    " \t\n ": ("", ""),
    "a\rb\x0bc": ("a\nb c", "a\nb c"),
    "\ud83d\ude00 \ud800": ("😀 \ufffd", "😀 \ufffd"),
}


@pytest.mark.parametrize("text", CLEANED, ids=ascii)
def test_cleaned_texts(text):
    assert (clean_text(text), clean_text(text, indent=True)) == CLEANED[text]


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("a", {}),
        (" a", {AROUND: 1}),
        ("a\r\nb\rc", {LINE_END: 1}),
        ("\x00\x01", {CONTROL: 2}),
        ("\ud800a", {SURROGATE: 1}),
    ],
)
def test_every_kind_of_change_is_counted(text, counted):
    changes = Counter()
    clean_text(text, changes)
    assert +changes == counted


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=30), st.booleans())
def test_cleaning_changes_nothing_a_second_time(text, indent):
    once, changes = clean_text(text, indent=indent), Counter()
    assert clean_text(once, changes, indent) == once
    assert not +changes
    assert once.split() == once.encode("utf-8").decode().split()
    assert once == once.rstrip()


QUESTIONS = [
    "你是谁？",
    "你是谁？\n",
    " 你是谁？",
    "\t你是谁？  ",
    "3+4=\r\n",
    "a\r\nb",
    "a\rb\n\n",
    "\u3000a\u2028",
    "x\x0cy",
]


@pytest.mark.parametrize("question", QUESTIONS, ids=ascii)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_question_is_asked_as_it_was_learnt(tmp_path, question, template):
    history = [[question, "ok \r\n"], [" b", "    x = 1\r\n    y = 2"]]
    for about, turns in ({"input": ""}, []), ({"input": "  c\r\n  d\n"}, history):
        source = {"instruction": question, "output": "a", "history": turns, "system": "S \n", **about}
        convert_alpaca([source], tmp_path / "a.jsonl")
        written = json.loads((tmp_path / "a.jsonl").read_text("utf-8"))
        learnt = next(iter(examples_of(written, Settings(template))))[0]
        # A row that convert_alpaca has not seen, and a user who types instruction and input into one line.
        assert next(iter(examples_of(source, Settings(template))))[0] == learnt
        if template == "chatglm":
            asked = _prompts(tokenizer(), [with_input(question.strip(), about["input"])], turns, template)
            assert [f"S\n{prompt}" for prompt in asked] == [learnt]
    assert plain_text(question, tokenizer()) == clean_text(question)


def test_code_is_learnt_with_its_indentation(tmp_path):
    body = "    total = a + b\n    return total"
    convert_alpaca([{"instruction": "Go on:\ndef f(a, b):", "output": body + "\n"}], tmp_path / "a.jsonl")
    row = json.loads((tmp_path / "a.jsonl").read_text())
    compile(f"def f(a, b):\n{row['output']}", "row", "exec")
    example, tok = encode_example(tokenizer(), row), tokenizer()
    learnt = tok.decode([label for label in example["labels"] if label >= 0], skip_special_tokens=True)
    assert learnt == body


def survives(text: str) -> bool:
    """As the tokenizer itself says, beyond width and blanks."""
    tok = tokenizer()
    width = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
    back = tok.decode(tok.encode(text, add_special_tokens=False))
    return "".join(back.translate(width).split()) == "".join(text.translate(width).split())


TEXTS = ["你好，世界！", "x³", "H₂O", "½", "①", "a<n>b", "a<|tab|>b", "x<|blank_3|>y", "a<b>c", "a \n\tb  c", "e\u0301"]
TEXTS += [
    "Å",
    "co\u00adop",
    "a\u200bb",
    "10\u00a0km",
    "👍🏽",
    "ﬁ",
    "한",
    "\u1112\u1161\u11ab",
    "Ａ１",
    "…",
    "▁",
    "हिन्दी",
    "[gMASK]",
]


def test_texts_that_do_not_survive_are_found():
    known = RoundTrip(tokenizer())
    for _ in range(2):  # the second time from what is known of the characters
        changed = [text for text, _ in known.changed(TEXTS, text_ids(tokenizer(), TEXTS))]
        assert changed == [text for text in TEXTS if not survives(text)]
    assert {"x³", "H₂O", "½", "①", "a<n>b", "a<|tab|>b", "x<|blank_3|>y"} <= set(changed)
    assert not {"你好，世界！", "a<b>c", "a \n\tb  c", "Ａ１"} & set(changed)


letters = st.sampled_from(
    [*"ab你，。 \n\t<>|n²½é", "e\u0301", "<n>", "<|tab|>", "  ", "ﬁ", "\u1112", "\u1161", "👍", "\u200d"]
)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.lists(letters, max_size=8).map("".join), max_size=6))
def test_texts_that_do_not_survive_are_found_whatever_stands_beside(texts):
    known = RoundTrip(tokenizer())
    changed = [text for text, _ in known.changed(texts, text_ids(tokenizer(), texts))]
    assert changed == [text for text in texts if not survives(text)]


def test_the_report_counts_them_and_shows_three(tmp_path):
    answers = ["fine", "，" * 60 + "2³=8", "①", "½", "a<n>b", "fine，too"]
    rows = [{"instruction": "q", "output": answer} for answer in answers]
    convert_alpaca(rows, tmp_path / "a.jsonl")
    report = token_report(encode_file(tmp_path / "a.jsonl", tokenizer()))
    assert (report.kept, report.changed) == (6, 4)
    assert report.changed_shown == [("，" * 9 + "2³=8", "," * 9 + "23=8"), ("①", "1"), ("½", "1⁄2")]
    assert "changes, so that another text is learnt: 4" in str(report)
    convert_alpaca(rows[:1], tmp_path / "b.jsonl")
    assert "changes" not in str(token_report(encode_file(tmp_path / "b.jsonl", tokenizer())))


def test_where_texts_differ():
    before, after = around_difference("，" * 50 + "x³" + "y" * 50, "," * 50 + "x3" + "y" * 50)
    assert before.index("³") == after.index("3") == 10
    assert around_difference("ab", "ab") == ("ab", "ab")
