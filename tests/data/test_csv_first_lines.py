"""CSV files in which the names of the columns are not the first thing: exports of Excel, of databases, of people."""

import csv
import io
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmhelpers.data import convert_alpaca
from tests.helpers.alpaca_rows import convert

TABLE = "instruction,input,output\n天空是什么颜色？,,蓝色。\n草呢？,,绿色。\n"
ANSWERS = ["蓝色。", "绿色。"]

FIRST = {
    # name: (what stands before the table, delimiter, lines that are passed over and counted)
    "a blank line": ("\n", ",", 0),
    "many blank lines": ("\n" * 50, ",", 0),
    "spaces and a tab": ("   \t\n", ",", 0),
    "empty cells": (",,\n", ",", 0),
    "empty cells in quotes": ('"","",""\n', ",", 0),
    "sep=": ("sep=;\n", ";", 0),
    "SEP= in quotes": ('"SEP=;"\n', ";", 0),
    "sep= that is not true": ("sep=;\n", ",", 0),
    "sep= of a tab": ("sep=\t\n", "\t", 0),
    "sep= of a sign that nobody uses": ("sep=^\n", "^", 0),
    "a comment": ("# exported 2024\n", ",", 1),
    "a title with commas": ("Export, 5 May, all rows\n\n", ",", 1),
    "a title in quotes over two lines": ('"All rows\nof May"\n', ",", 2),
    "an open quote": ('5" disks\n"all of them\n', ",", 2),
    "blank, sep=, comment": ("\n\ufeffsep=;\n# a; b\n;;\n", ";", 1),
    "two byte order marks": ("\ufeff\ufeff", ",", 0),
    "names as a comment": ("# ", ",", 0),
    "another delimiter": ("", "|", 0),
}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", FIRST)
def test_rows_below_other_first_lines(tmp_path, name, end):
    before, delimiter, passed_over = FIRST[name]
    text = (before + TABLE.replace(",", delimiter)).replace("\n", end)
    file, written = convert(tmp_path, text, "a.csv")
    assert [each["output"] for each in written] == ANSWERS
    assert file.repairs == ({"line before the names of the columns": passed_over} if passed_over else {})
    assert file.status == ("repaired" if passed_over else "ok")


def test_lines_are_counted_from_the_top_of_the_file(tmp_path):
    file, _ = convert(tmp_path, "\n# title\n" + TABLE + "no answer,,\n", "a.csv")
    assert [problem.line for problem in file.problems] == [6]


def test_names_over_two_lines(tmp_path):
    file, written = convert(tmp_path, 'instruction,output,"a\nnote"\nq,r,s\nq,,s\n', "a.csv")
    assert ([each["output"] for each in written], file.problems[0].line) == (["r"], 4)


def test_names_that_the_user_gives_are_looked_for_below_a_title(tmp_path):
    _, written = convert(tmp_path, "Export\n#q,a\n1,2\n", "a.csv", columns={"#q": "instruction", "a": "output"})
    assert [(each["instruction"], each["output"]) for each in written] == [("1", "2")]


@pytest.mark.parametrize("text", ["", "\n\n", ",,\n;;\n", "sep=;\n", "\ufeff"])
def test_a_table_without_anything_is_empty(tmp_path, text):
    file, _ = convert(tmp_path, text, "a.csv")
    assert (file.status, file.rows) == ("empty", 0)


def test_rows_without_names_above_them_are_told_what_is_missing(tmp_path):
    file, _ = convert(tmp_path, "\n\n天空是什么颜色？,蓝色。\n草呢？,绿色。\n", "a.csv")
    assert file.status == "not_data"
    assert "'天空是什么颜色？', '蓝色。'" in file.message
    assert "write a line with the names above it" in file.message


def test_a_delimiter_too_many_at_the_end_of_each_row(tmp_path):
    file, written = convert(tmp_path, "instruction,output\nq,r,\ns,t, ,\nu,v,w\n,,\n", "a.csv")
    assert [each["output"] for each in written] == ["r", "t"]
    assert file.rejected == {"broken": 1}


NO_NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20).filter(
    lambda line: not {"instruction", "output"} & set(line.casefold().replace("#", ",").split(",")) and '"' not in line
)
CELLS = st.text(st.characters(exclude_categories=("Cs", "Cc"), include_characters="\n\t"), max_size=12)


@pytest.mark.once
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.lists(NO_NAMES, max_size=8), st.lists(st.tuples(CELLS, CELLS), max_size=5), st.sampled_from(",;\t|"))
def test_what_stands_above_the_names_changes_no_row(above, rows, delimiter):
    table = io.StringIO(newline="")
    csv.writer(table, delimiter=delimiter).writerows([("instruction", "output"), *rows])
    with tempfile.TemporaryDirectory() as plain, tempfile.TemporaryDirectory() as below:
        first, written = convert(Path(plain), table.getvalue(), "a.csv")
        second, again = convert(Path(below), "".join(line + "\r\n" for line in above) + table.getvalue(), "a.csv")
    assert again == written
    assert (second.rows, second.rejected) == (first.rows, first.rejected)


@pytest.mark.parametrize(
    "again", ["instruction,input,output\n", "\ufeffinstruction,input,output\n", '"instruction",input,output\n']
)
def test_files_that_were_put_together_have_their_names_no_row_of_their_own(tmp_path, again):
    file, rows = convert(tmp_path, TABLE + again + TABLE.partition("\n")[2], "a.csv")
    assert [row["output"] for row in rows] == ANSWERS * 2
    assert file.repairs["line with the names of the columns once more"] == 1


def test_blanks_between_quoted_fields_belong_to_none(tmp_path):
    _, rows = convert(tmp_path, '"instruction", "input", "output"\n"a, b", "", "  c"\n', "a.csv")
    assert [(row["instruction"], row["output"]) for row in rows] == [("a, b", "  c")]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_utf_16_without_a_mark_is_seen_by_its_zeros(tmp_path, encoding, name):
    lines = '{"instruction": "天空？", "output": "蓝色。"}\n{"instruction": "草呢？", "output": "绿色。"}\n'
    text = TABLE if name == "a.csv" else lines
    (tmp_path / name).write_bytes(text.encode(encoding))
    report = convert_alpaca(tmp_path / name, tmp_path / "out.jsonl")
    assert report.rows_valid == 2
    assert report.files[0].status == "ok"


def test_one_zero_is_no_encoding(tmp_path):
    (tmp_path / "a.csv").write_bytes((TABLE + "a,b,c\0d\n").encode())
    assert convert_alpaca(tmp_path / "a.csv", tmp_path / "out.jsonl").rows_valid == 3
