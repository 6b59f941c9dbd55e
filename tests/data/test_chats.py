"""Conversations in the formats that hubs publish become rows, or are refused by name; nothing of them goes silently."""

import json

import numpy as np
import pandas as pd
import pytest

from glmhelpers.data.cleaning import NO_CHAT, NO_PAIRS
from glmhelpers.data.convert import convert_alpaca
from tests.helpers.alpaca_rows import array, convert, row

WANTED = {
    "instruction": "那草呢？",
    "input": "",
    "output": "绿色。",
    "history": [["天空是什么颜色？", "蓝色。"]],
    "system": "Be kind.",
}


def said(*texts: str, names: tuple[str, str] = ("role", "content"), roles: tuple[str, str] = ("user", "assistant")):
    return [dict(zip(names, (roles[place % 2], text), strict=True)) for place, text in enumerate(texts)]


FOUR = ("天空是什么颜色？", "蓝色。", "那草呢？", "绿色。")
SYSTEM = [{"role": "system", "content": "Be kind."}]
GPT = {"names": ("from", "value"), "roles": ("human", "gpt")}
FORMATS = {
    "messages": {"messages": SYSTEM + said(*FOUR)},
    "messages as a text": {"messages": json.dumps(SYSTEM + said(*FOUR))},
    "parts of a message": {
        "messages": SYSTEM + said(*FOUR[:3]) + [{"role": "assistant", "content": [{"type": "text", "text": FOUR[3]}]}]
    },
    "ShareGPT": {"conversations": [{"from": "system", "value": "Be kind."}, *said(*FOUR, **GPT)]},
    "ShareGPT with a system column": {"system": "Be kind.", "conversations": said(*FOUR, **GPT)},
    "pairs with names": {
        "system": "Be kind.",
        "conversation": [{"human": FOUR[0], "assistant": FOUR[1]}, {"assistant": FOUR[3], "human": FOUR[2]}],
    },
    "prompt and completion": {"prompt": SYSTEM + said(*FOUR[:3]), "completion": said(*FOUR)[3:]},
    "history of messages": row(1, instruction=FOUR[2], output=FOUR[3], history=SYSTEM + said(*FOUR[:2])),
    "ShareGPT's history": row(
        1, instruction=FOUR[2], output=FOUR[3], system="Be kind.", history=said(*FOUR[:2], **GPT)
    ),
    "history as Python writes it": row(
        1, instruction=FOUR[2], output=FOUR[3], system="Be kind.", history=str([list(FOUR[:2])])
    ),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("times", [1, 3])
def test_formats(tmp_path, name, times):
    lines = "".join(json.dumps(FORMATS[name], ensure_ascii=False) + "\n" for _ in range(times))
    file, written = convert(tmp_path, lines, "chat.jsonl")
    assert (file.status, file.rejected, written) == ("ok", {}, [WANTED] * times)


@pytest.mark.parametrize("name", ["messages", "ShareGPT", "prompt and completion", "history of messages"])
def test_formats_in_tables(tmp_path, name):
    pd.DataFrame([FORMATS[name]] * 2).to_parquet(tmp_path / "chat.parquet")
    file, written = convert(tmp_path, (tmp_path / "chat.parquet").read_bytes(), "chat.parquet")
    assert (file.status, written) == ("ok", [WANTED] * 2)
    # The way that is advised for a DataFrame gives numpy arrays in place of lists.
    rows = pd.read_parquet(tmp_path / "chat.parquet").to_dict("records")
    convert_alpaca(rows, tmp_path / "b.jsonl")
    assert [json.loads(line) for line in (tmp_path / "b.jsonl").open()] == [WANTED] * 2


def test_what_stands_in_no_turn_is_left_out_and_counted(tmp_path):
    greeting, question = said("x", "Hello, what can I do?")[1:], said("And then?")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": greeting + said("q", "a") + question}))
    report = convert_alpaca(tmp_path / "a.jsonl", tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"instruction": "q", "input": "", "output": "a"}
    assert sum(report.changes.values()) == 2
    for words in ("1 answers before the first question", "1 questions at the end without an answer"):
        assert words in str(report)


REFUSED = {
    "two questions in turn": said("q", "a")[:1] + said("r", "b"),
    "two answers in turn": said("q", "a") + said("q", "b")[1:],
    "calls tools": [said("q")[0], {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}],
    "'tool'": [*said("q", "a"), {"role": "tool", "content": "5"}],
    "not text": [said("q")[0], {"role": "assistant", "content": [{"type": "image_url", "image_url": "x"}]}],
    "no question with an answer": said("q"),
    "neither messages nor pairs": ["q", "a"],
    "role and content are needed": [{"speaker": "A", "text": "q"}],
    "spells no list": "q and a",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_learnt_is_refused_by_name(tmp_path, words):
    rows = [{"messages": REFUSED[words]}, {"messages": said("q", "a")}]
    file, written = convert(tmp_path, array(rows))
    assert (file.rejected, len(written)) == ({NO_CHAT: 1}, 1)
    assert words in str(file.problems[0])


def test_a_history_that_ends_with_a_question_is_refused(tmp_path):
    file, _ = convert(tmp_path, array([row(1, history=said("q", "a", "r"))]))
    assert (file.rejected, "ends with a question" in str(file.problems[0])) == ({NO_PAIRS: 1}, True)


def test_the_advice_for_a_conversation_under_another_name_works(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"dialogue": said("q", "a")}))
    with pytest.raises(ValueError, match=r"columns=\{'dialogue': \"messages\"\}"):
        convert_alpaca(tmp_path / "a.json", tmp_path / "out.jsonl")
    report = convert_alpaca(tmp_path / "a.json", tmp_path / "out.jsonl", columns={"dialogue": "messages"})
    assert report.rows_valid == 1


def test_messages_that_lie_about_alone_are_told_what_they_need(tmp_path):
    file, _ = convert(tmp_path, array(said("q", "a")))
    assert (file.status, '{"messages": [...]}' in file.message) == ("not_data", True)


PAIRS = [["q", "a"]]
MISSING = {"None": None, "NaN": float("nan"), "pandas' NA": pd.NA, "no time": pd.NaT, "numpy's NaN": np.float64("nan")}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_value_is_none_in_every_library(tmp_path, name):
    lost = MISSING[name]
    rows = [row(1, input=lost, history=lost, system=lost), row(2, output=lost)]
    report = convert_alpaca(rows, tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text()) == row(1)
    assert report.rejected == {"no output": 1}


@pytest.mark.parametrize(
    ("value", "text"),
    [(7, "7"), (np.int64(7), "7"), (np.float32(0.5), "0.5"), (np.str_("x"), "x"), (np.array("x"), "x")],
)
def test_values_of_numpy_are_what_they_stand_for(tmp_path, value, text):
    report = convert_alpaca([row(1, input=value, history=np.array(PAIRS, object))], tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text()) == row(1, input=text, history=PAIRS)
    assert report.changes["numbers written as texts"] == (text != "x")


def test_a_name_that_stands_twice_is_counted(tmp_path):
    file, written = convert(tmp_path, '[{"instruction": "q", "output": "a", "output": "b"}]')
    assert (file.status, sum(file.repairs.values()), written[0]["output"]) == ("repaired", 1, "b")


@pytest.mark.parametrize("orient", ["index", "split", "columns"])
def test_other_layouts_of_pandas_are_told_the_one_that_is_read(tmp_path, orient):
    frame = pd.DataFrame([row(1), row(2)])
    file, _ = convert(tmp_path, frame.to_json(orient=orient, force_ascii=False))
    assert "orient='records'" in file.message
    file, written = convert(tmp_path, frame.to_json(orient="records", force_ascii=False))
    assert len(written) == 2
