"""What convert_alpaca says where rows are refused: enough to know what to do."""

import json

import pytest

from glmhelpers.data.convert import convert_alpaca
from tests.helpers.alpaca_rows import QUOTES, array, convert, row


@pytest.mark.parametrize(
    ("columns", "word"),
    [
        ({"instruction": "question"}, "turn it round: {'question': 'instruction'}"),
        ({"q": "instruktion"}, "instruktion"),
    ],
)
def test_columns_that_name_none_of_ours(tmp_path, columns, word):
    (tmp_path / "a.json").write_text(array([row(1)]))
    with pytest.raises(ValueError) as caught:
        convert_alpaca(tmp_path / "a.json", tmp_path / "out.jsonl", columns=columns)
    assert word in str(caught.value)


LAYOUTS = {
    # name: (content, status, words of the message)
    "other names": ([{"question": "a", "answer": "b"}] * 2, "not_data", ("'question', 'answer'", "columns=")),
    "rows in an object": ({"version": 1, "data": [row(1), row(2)]}, "not_data", ("'version'", "2 objects", "'data'")),
    "columns as lists": ({"instruction": ["a", "b"], "output": ["c", "d"]}, "refused", ("orient='records'",)),
    "columns as objects": ({"instruction": {"0": "a"}, "output": {"0": "c"}}, "refused", ("orient='records'",)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_in_another_layout_are_not_passed_over_without_a_word(tmp_path, name):
    content, status, words = LAYOUTS[name]
    file, _ = convert(tmp_path, array(content))
    assert file.status == status
    for word in words:
        assert word in file.message


NO_TEXTS = [
    ({"output": ["b", "c"]}, "output is a list of 2: write one text, or a row for each"),
    ({"output": []}, "output is a list of 0: write one text"),
    ({"output": {"text": "b"}}, "output is a dict: write it as a text"),
    ({"output": 5}, "output is 5 and no text: put it in quotes"),
    ({"instruction": ["a"]}, "instruction is a list of 1: write one text"),
    ({"input": ["x"]}, "input is a list of 1: write one text"),
    ({"instruction": ["a"], "output": ["b", "c"]}, "messages: neither messages nor pairs"),
]


@pytest.mark.parametrize(("changes", "words"), NO_TEXTS, ids=[str(changes) for changes, _ in NO_TEXTS])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_row_with_something_else_than_text_is_no_table(tmp_path, changes, words, rows):
    """One row alone, too, is told what is wrong with it; all columns of a table are lists of one length."""
    content = {"instruction": "a", "input": "", "output": "b", "category": "x"} | changes
    report = convert_alpaca([row(1)] + [content] * rows, tmp_path / "of_rows.jsonl")
    assert f"row {1 + rows}: {words}" in str(report)
    file, _ = convert(tmp_path, json.dumps(content if rows == 1 else [content] * rows))
    assert "table" not in file.message
    assert words in str(file)


def test_a_table_of_one_column_that_is_ours_is_still_told_as_one(tmp_path):
    file, _ = convert(tmp_path, json.dumps({"frage": ["a", "b"], "output": ["c", "d"]}))
    assert "orient='records'" in file.message
    file, _ = convert(tmp_path, json.dumps({"version": 1, "instruction": ["a", "b"], "output": ["c", "d"]}))
    assert "orient='records'" in file.message


def test_rows_in_another_encoding_are_told_how_to_be_read(tmp_path):
    file, _ = convert(tmp_path, "instruction,output\na,b\n你,好\n".encode("gb18030"), "t.csv")
    assert (file.status, file.rejected) == ("repaired", {"text that is not UTF-8": 1})
    assert "encoding=" in file.message
    file, _ = convert(tmp_path, "问题,回答\n你,好\n".encode("gb18030"), "t.csv")
    assert file.status == "not_data"
    assert "encoding=" in file.message


def test_a_table_under_another_name_is_told_how_it_was_read(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("instruction,output\na,b\n")
    with pytest.raises(ValueError, match=r"read as JSON.*\.csv"):
        convert_alpaca(path, tmp_path / "out.jsonl")


def test_another_encoding(tmp_path):
    content = "instruction,output\n你是谁？,我是模型。\n".encode("gb18030")
    file, _ = convert(tmp_path, content, "t.csv")
    assert file.status == "refused"
    assert "gb18030" in file.message
    # Asked for by name, since other files may well look right in the wrong encoding.
    output = tmp_path / "out" / "b.jsonl"
    convert_alpaca(tmp_path / "t.csv", output, encoding="gb18030")
    assert "我是模型。" in output.read_text("utf-8")
    with pytest.raises(LookupError):
        convert_alpaca(tmp_path / "t.csv", output, encoding="klingon")


def test_a_pointer_of_git_lfs_is_told_from_a_broken_file(tmp_path):
    file, _ = convert(tmp_path, "version 1\noid sha256:4d7a21\nsize 1024\n")
    assert (file.status, file.rows, file.rejected) == ("refused", 1, {"broken": 1})
    assert "git lfs pull" in str(file.problems[0])


def test_nothing_valid_names_the_files_and_leaves_an_older_output(tmp_path):
    source = tmp_path / "s"
    source.mkdir()
    (source / "bad.json").write_text(array([{"instruction": "x"}]))
    (source / "empty.json").write_text("")
    output = tmp_path / "out.jsonl"
    output.write_text("older\n")
    with pytest.raises(ValueError) as caught:
        convert_alpaca(source, output)
    for word in ("bad.json", "no output", "empty.json"):
        assert word in str(caught.value)
    assert output.read_text() == "older\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "s"]


def test_wrong_places(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert_alpaca(tmp_path / "nowhere", tmp_path / "out.jsonl")
    with pytest.raises(IsADirectoryError, match=r"train\.jsonl"):
        convert_alpaca(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="holds no"):
        convert_alpaca(tmp_path, tmp_path / "out.jsonl")


def test_the_table_names_every_file_that_lost_something(tmp_path):
    source = tmp_path / "s"
    source.mkdir()
    for number in range(6):
        (source / f"good-{number}.json").write_text(array([row(number)]))
    (source / "quotes.json").write_text(QUOTES)
    text = str(convert_alpaca(source, tmp_path / "out.jsonl"))
    assert "quotes.json" in text
    assert "line 12" in text
    assert "6 more files" in text
    assert "good-1" not in text


def test_of_many_problems_the_first_are_kept_and_all_are_counted(tmp_path):
    file, _ = convert(tmp_path, array([row(1), *[{"instruction": "a"}] * 150], indent=None), "a.json")
    assert (file.rejected, len(file.problems)) == ({"no output": 150}, 100)


def test_the_table_names_files_without_a_loss_if_they_are_few(tmp_path):
    source = tmp_path / "s"
    source.mkdir()
    for number in range(3):
        (source / f"good-{number}.json").write_text(array([row(number)]))
    text = str(convert_alpaca(source, tmp_path / "out.jsonl"))
    assert all(f"good-{number}.json" in text for number in range(3))
    assert "more files" not in text


WRONG_SETTINGS = [
    ({"max_answer_chars": "5"}, ValueError, "max_answer_chars is '5'; a whole number from 1 on"),
    ({"max_prompt_chars": 0}, ValueError, "max_prompt_chars is 0; a whole number from 1 on"),
    ({"max_prompt_chars": -1}, ValueError, "max_prompt_chars is -1"),
    ({"columns": "output"}, TypeError, 'columns is \'output\'; write it as {"their name": "instruction"'),
    ({"columns": ["output"]}, TypeError, r"columns is \['output'\]"),
]


@pytest.mark.parametrize(
    ("settings", "kind", "message"), WRONG_SETTINGS, ids=[str(each) for each, *_ in WRONG_SETTINGS]
)
def test_a_setting_that_is_none_is_named_before_anything_is_read(tmp_path, settings, kind, message):
    with pytest.raises(kind, match=message):
        convert_alpaca([row(1)], tmp_path / "out.jsonl", **settings)
    assert not list(tmp_path.iterdir())


def test_a_system_that_is_no_text_says_what_it_is(tmp_path):
    file, _ = convert(tmp_path, array([row(1) | {"system": 5}, row(2)]))
    assert "system is 5 and no text: put it in quotes" in str(file)


def test_a_column_that_no_row_has_is_told(tmp_path):
    """Misspelled, it would be passed over, and another column be read in its place."""
    rows = [row(1) | {"better": "b"}, row(2) | {"better": "c"}]
    report = convert_alpaca(rows, tmp_path / "out.jsonl", columns={"beter": "output", "instruction": "instruction"})
    assert report.columns_unseen == ["beter"]
    assert "columns names 'beter', which no row has: is it spelled so?" in str(report)
    report = convert_alpaca(rows, tmp_path / "out.jsonl", columns={"better": "output"})
    assert report.columns_unseen == []
    assert "which no row has" not in str(report)
