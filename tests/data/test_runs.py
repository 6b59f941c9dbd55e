"""Rows written in runs, and texts made in columns: the same rows, figures and tokens as one by one."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmhelpers.data.convert import convert_alpaca
from glmhelpers.tokens import examples
from glmhelpers.tokens.examples import chunks
from glmhelpers.tokens.report import Settings, TokenReport

TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", "a", "No input.", "  x = 1\n  y", "a\r\nb", "\x00", "\ud83d", "\u2028", "好\x85", "\t", "x "]
    ),
    st.text(st.characters(codec=None), max_size=6),
)
VALUES = st.one_of(TEXTS, TEXTS, TEXTS, st.none(), st.integers(0, 3), st.just([["q", "a"]]))
ROWS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"instruction": TEXTS, "input": TEXTS, "output": TEXTS}),
        st.fixed_dictionaries({"prompt": TEXTS, "response": TEXTS}),
        st.dictionaries(st.sampled_from(["instruction", "input", "output", "history", "system", "id"]), VALUES),
    ),
    min_size=1,
    max_size=12,
)
GOOD = {"instruction": "q", "input": "", "output": "a"}


@settings(max_examples=300, deadline=None)
@given(ROWS, st.booleans())
def test_runs_are_what_the_rows_are_one_by_one(tmp_path_factory, rows, dedupe):
    folder = tmp_path_factory.mktemp("runs")
    source = folder / "a.json"
    source.write_text(json.dumps([GOOD, GOOD, *rows, GOOD], indent=1), "utf-8")
    # With a limit, each row is looked at by itself.
    one_by_one = convert_alpaca(source, folder / "b" / "x.jsonl", dedupe=dedupe, max_answer_chars=10**9)
    runs = convert_alpaca(source, folder / "c" / "x.jsonl", dedupe=dedupe)
    assert runs.output.read_bytes() == one_by_one.output.read_bytes()
    assert (runs.files, runs.changes, runs.placeholders) == (
        one_by_one.files,
        one_by_one.changes,
        one_by_one.placeholders,
    )
    assert convert_alpaca([*rows, GOOD], folder / "d" / "x.jsonl").rows == len(rows) + 1


def test_a_generator_may_fill_one_dict_again_and_again(tmp_path):
    def rows():
        row = {"input": ""}
        for number in range(5):
            row |= {"instruction": f"q{number}", "output": f"a{number}"}
            yield row

    lines = convert_alpaca(rows(), tmp_path / "x.jsonl").output.read_text("utf-8").splitlines()
    assert [json.loads(line)["output"] for line in lines] == [f"a{number}" for number in range(5)]


LINES = st.lists(
    st.one_of(
        st.fixed_dictionaries({"instruction": TEXTS, "input": TEXTS, "output": TEXTS}).map(json.dumps),
        st.fixed_dictionaries({"instruction": TEXTS, "output": TEXTS, "history": st.just([["q", "a"]])}).map(
            json.dumps
        ),
        st.sampled_from(['{"instruction": "a",', '"input": "b", "output": "c"}', json.dumps(GOOD) * 2, "", "[]", "{}"]),
        st.just(f"{json.dumps(GOOD)}, {json.dumps(GOOD)}"),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=300, deadline=None)
@given(LINES, st.sampled_from(["chatglm", "alpaca"]), st.sampled_from(["last", "all"]))
def test_columns_are_what_the_lines_are_one_by_one(tmp_path_factory, lines, template, answers):
    path = tmp_path_factory.mktemp("columns") / "x.jsonl"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    chosen = Settings(template, answers=answers)

    def made() -> object:
        report = TokenReport("x", {})
        try:
            found = [(chunk.texts, chunk.keys.tolist()) for chunk in chunks(path, chosen, report)]
        except (ValueError, AttributeError, TypeError) as error:
            return type(error), str(error)
        return found, report.rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "_in_columns", lambda *_: None)
        expected = made()
    assert made() == expected
