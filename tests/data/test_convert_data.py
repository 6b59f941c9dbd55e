"""convert_alpaca on small files, good and broken: what is kept, what is said about the rest."""

import csv
import io
import json
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from glmhelpers.data.broken_examples import write_broken_files
from glmhelpers.data.convert import convert_alpaca
from tests.helpers.alpaca_rows import QUOTES, array, check, convert, convert_folder, row

FILES = {
    # name: (content, status, rows, valid rows)
    "array": (array([row(1), row(2)]), "ok", 2, 2),
    "lines": ("".join(json.dumps(row(i)) + "\n" for i in range(3)), "ok", 3, 3),
    "lines, no end": (json.dumps(row(1)) + "\n" + json.dumps(row(2)), "ok", 2, 2),
    "comma before ]": (array([row(1), row(2)])[:-2] + ",\n]", "repaired", 2, 2),
    "comma missing": (array([row(1), row(2)]).replace("},", "}"), "repaired", 2, 2),
    "comma twice": (array([row(1), row(2)]).replace("},", "},,"), "repaired", 2, 2),
    "unescaped quotes": (QUOTES, "repaired", 5, 4),
    "quotes, one line": (json.dumps([row(0), row(1)]).replace('""', '"a"b"', 1), "repaired", 2, 1),
    "0 bytes": ("", "empty", 0, 0),
    "white space": (" \n\n", "empty", 0, 0),
    "empty array": ("[]", "empty", 0, 0),
    "CRLF": (array([row(1), row(2)]).replace("\n", "\r\n"), "ok", 2, 2),
    "CRLF lines": ("".join(json.dumps(row(i)) + "\r\n" for i in range(3)), "ok", 3, 3),
    "BOM": (b"\xef\xbb\xbf" + array([row(1)]).encode(), "ok", 1, 1),
    "BOM lines": (b"\xef\xbb\xbf" + "".join(json.dumps(row(i)) + "\n" for i in range(2)).encode(), "ok", 2, 2),
    "UTF-16": (array([row(1)]).encode("utf-16"), "ok", 1, 1),
    "nulls": (array([row(1), {"instruction": None, "output": "a"}, {"instruction": "a", "output": None}]), "ok", 3, 1),
    "missing keys": (array([row(1), {"instruction": "a"}, {"output": "b"}, {}]), "ok", 4, 1),
    "extra keys": (array([row(1, id=7, topic=["x", {"y": 1}])]), "ok", 1, 1),
    "blank texts": (array([row(1), row(2, output=" \n\t"), row(3, instruction="")]), "ok", 3, 1),
    "other types": (
        array([row(1), row(2, output=5), row(3, instruction=["a"]), 7, "text", None, [row(4)]]),
        "ok",
        7,
        1,
    ),
    "N/A is text": (array([{"instruction": "N/A", "input": "NULL", "output": "None"}]), "ok", 1, 1),
    "settings": (array({"learning_rate": 1e-4, "steps": [1, 2]}), "not_data", 0, 0),
    "settings, one line": ('{"learning_rate": 0.1}', "not_data", 0, 0),
    "null": ("null", "not_data", 0, 0),
    "numbers": ("[1, 2, 3]", "not_data", 3, 0),
    "other rows": (array([{"title": "a"}, {"title": "b"}]), "not_data", 2, 0),
    "one row alone": (array(row(1)), "ok", 1, 1),
    "control characters": (array([row(1)]).replace("回答", "回\x07答"), "repaired", 1, 1),
    "raw newline in a string": (array([row(1), row(2)]).replace("回答 1", "回答\n1"), "repaired", 2, 2),
    "lone surrogate": ('[{"instruction": "a", "output": "\\ud83d b"}]', "repaired", 1, 1),
    "cut off": (array([row(1), row(2), row(3)])[:-30], "repaired", 3, 2),
    "no [": (array([row(1), row(2)])[1:], "repaired", 2, 2),
    "two arrays": (array([row(1)]) + array([row(2)]), "ok", 2, 2),
    "a bad line": (json.dumps(row(1)) + "\nnot json\n" + json.dumps(row(2)) + "\n", "repaired", 3, 2),
    "lines with commas": (json.dumps(row(1)) + "\n" + json.dumps(row(2)) + ",\n", "repaired", 2, 2),
    "a byte that is no UTF-8": (array([row(1), row(2)]).encode().replace("回".encode(), b"\xff", 1), "repaired", 2, 1),
    "words": ("version https://git-lfs\noid sha256:12", "refused", 1, 0),
    "bytes": (bytes(range(256)), "refused", 1, 0),
    "nested too deeply": ("[" * 100_000, "refused", 1, 0),
    "a number too long": ('[{"instruction": "a", "output": "b", "n": ' + "9" * 5000 + "}]", "refused", 1, 0),
}


@pytest.mark.parametrize("name", FILES)
def test_one_file(tmp_path, name):
    content, status, rows, valid = FILES[name]
    file, written = convert(tmp_path, content)
    assert (file.status, file.rows, file.valid) == (status, rows, valid)
    assert len(written) == valid


def test_the_rows_around_a_broken_one_stay_as_they_are(tmp_path):
    file, written = convert(tmp_path, QUOTES)
    assert written == [row(i) for i in (0, 1, 3, 4)]
    # Each row takes five lines behind the "[": the third row begins on line 12, its output stands on line 15.
    assert [problem.line for problem in file.problems] == [12]
    assert "line 15" in str(file.problems[0])
    assert file.rejected == {"broken": 1}


def test_quotes_that_hold_whole_rows_of_other_keys(tmp_path):
    text = array([row(1), row(2), row(3)]).replace("回答 2", 'json: [{"a": "b"}, {"c": "d"}]')
    file, written = convert(tmp_path, text)
    assert written == [row(1), row(3)]
    assert file.rejected == {"broken": 1}


def test_rows_inside_a_broken_text_are_none(tmp_path):
    text = array([row(1), row(2), row(3)]).replace("回答 2", 'write {"instruction": "x", "output": "y"} like that')
    file, written = convert(tmp_path, text)
    assert written == [row(1), row(3)]
    assert (file.rejected, file.repairs) == ({"broken": 1}, {})


def test_objects_inside_a_broken_row_are_no_rows_if_rows_start_otherwise(tmp_path):
    rows = [{"id": i, **row(i)} for i in range(1, 4)]
    broken = '{id: 2, "parts": [{"a": 1}, {"b": 2}], "output": "x"}'
    texts = [json.dumps(rows[0]), broken, json.dumps(rows[2])]
    file, written = convert(tmp_path, f"[{', '.join(texts)}]")
    assert (file.rows, file.valid, written) == (3, 2, [row(1), row(3)])


@pytest.mark.parametrize("broken", ['{"id": 0, "output": "say "hi""}', '{id: 0, "output": "b"}', "words"])
def test_rows_that_start_with_another_name_are_found_behind_a_broken_first_one(tmp_path, broken):
    rows = [{"id": i, **row(i)} for i in range(1, 4)]
    file, written = convert(tmp_path, f"[{broken},\n" + array(rows)[1:])
    assert (file.rows, file.valid, len(written)) == (4, 3, 3)


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize("place", [0, 1])
def test_names_in_other_scripts_are_found_behind_a_broken_row(tmp_path, place, ascii_only):
    texts = [json.dumps({"问题": f"q{i}", "回答": "a"}, ensure_ascii=ascii_only) for i in range(4)]
    texts[place] = texts[place].replace('"a"', '"say "a""')
    file, written = convert(tmp_path, f"[{', '.join(texts)}]", columns={"问题": "instruction", "回答": "output"})
    assert (file.rows, file.valid, len(written)) == (4, 3, 3)


def test_line_numbers_of_json_lines(tmp_path):
    lines = [json.dumps(row(1)), "", "{broken", json.dumps({"instruction": "x"}), json.dumps(row(2))]
    file, _ = convert(tmp_path, "\n".join(lines), "a.jsonl")
    assert [(problem.line, problem.reason) for problem in file.problems] == [(3, "broken"), (4, "no output")]


def test_texts_are_stripped_and_characters_that_cannot_be_written_are_replaced(tmp_path):
    odd = {"instruction": "  a\r\nb\rc ", "input": None, "output": "x\x07y\x0bz\ud800"}
    file, written = convert(tmp_path, json.dumps([odd]))
    assert written == [{"instruction": "a\nb\nc", "input": "", "output": "x\ufffdy z\ufffd"}]
    assert file.repairs == {"control character": 1, "lone surrogate": 1}


def test_unusual_line_ends_do_not_split_a_line_of_the_output(tmp_path):
    texts = [row(i, output=f"a{character}b") for i, character in enumerate("\x85\u2028\u2029")]
    _, written = convert(tmp_path, array(texts))
    assert [each["output"] for each in written] == ["a\x85b", "a\u2028b", "a\u2029b"]


@pytest.mark.parametrize(
    "text",
    ["无输入", " 没有输入。", "No input", "no  INPUT.", "noinput", "<noinput>", "（无输入）", "No input needed."],
)
def test_inputs_that_say_there_is_none(tmp_path, text):
    _, written = convert(tmp_path, array([row(1, input=text)]))
    assert written[0]["input"] == ""


def test_inputs_that_say_there_is_none_are_counted(tmp_path):
    texts = ["无输入", "No input", "", "a", None]
    report = convert_alpaca([row(i, input=text) for i, text in enumerate(texts)], tmp_path / "out.jsonl")
    assert report.placeholders == 2
    assert "No input ...): 2" in str(report)


@pytest.mark.parametrize("text", ["N/A", "None", "null", "nan", "没有输入法的键盘", "no input device", "0"])
def test_inputs_that_are_text(tmp_path, text):
    _, written = convert(tmp_path, array([row(1, input=text)]))
    assert written[0]["input"] == text


PAIRS = [["你好", "你好！"], ["再见", "再见！"]]


@pytest.mark.parametrize(
    ("history", "expected"),
    [(PAIRS, PAIRS), ([], None), ("", None), (None, None), (json.dumps(PAIRS), PAIRS), ("[]", None), ("null", None)],
)
def test_history(tmp_path, history, expected):
    rows = [{"prompt": "a", "response": "b", "history": history}]
    _, written = convert(tmp_path, array(rows))
    assert written[0].get("history") == expected
    assert (written[0]["instruction"], written[0]["output"]) == ("a", "b")


def test_history_of_tuples(tmp_path):
    convert_alpaca([row(1, history=(("你好", "你好！"), ("再见", "再见！")))], tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text("utf-8"))["history"] == PAIRS


@pytest.mark.parametrize("history", ["words", 5, [["only one"]], [["a", None]], {"a": "b"}, [5]])
def test_a_history_that_cannot_be_read_rejects_the_row(tmp_path, history):
    file, _ = convert(tmp_path, array([row(1), row(2, history=history)]))
    assert file.rejected == {"history is not pairs of texts": 1}


def test_system_is_kept(tmp_path):
    _, written = convert(tmp_path, array([row(1, system="Be brief."), row(2, system="")]))
    assert [each.get("system") for each in written] == ["Be brief.", None]


def test_csv(tmp_path):
    texts = io.StringIO(newline="")
    table = csv.DictWriter(texts, ["", "instruction", "input", "output", "history"], lineterminator="\r\n")
    table.writeheader()
    table.writerow({"instruction": "a,b", "input": "无输入", "output": 'he said "x"\r\nand left', "history": ""})
    table.writerow({"instruction": "N/A", "input": "N/A", "output": "nan", "history": json.dumps(PAIRS)})
    table.writerow({"instruction": "c", "output": ""})
    file, written = convert(tmp_path, "\ufeff" + texts.getvalue(), "t.csv")
    assert written == [
        {"instruction": "a,b", "input": "", "output": 'he said "x"\nand left'},
        {"instruction": "N/A", "input": "N/A", "output": "nan", "history": PAIRS},
    ]
    # The second row's record starts on line 4: the first one takes lines 2 and 3.
    assert [(problem.line, problem.reason) for problem in file.problems] == [(5, "no output")]
    assert file.status == "ok"


def test_an_open_quote_costs_one_csv_row(tmp_path):
    text = "instruction,output\n" + 'a,b\n"open,b\n' + "".join(f"q{i},r{i}\n" for i in range(50))
    file, written = convert(tmp_path, text, "t.csv")
    assert (file.rows, file.valid, file.status) == (52, 51, "repaired")
    assert written[-1]["output"] == "r49"
    assert file.problems[0].line == 3


def test_a_quote_that_swallows_a_thousand_csv_rows_costs_one(tmp_path):
    lines = [f"q{i},{'r' * 1000}" for i in range(1100)]
    file, written = convert(tmp_path, "\n".join(["instruction,output", '"open,b', *lines, 'end",z', "a,b"]), "t.csv")
    # 1.1 million characters until the next quote: too long for one text.
    assert (file.rows, file.rejected) == (1103, {"broken": 1})
    assert [each["instruction"] for each in written[-2:]] == ['end"', "a"]


def test_empty_lines_of_a_table_are_no_rows(tmp_path):
    file, written = convert(tmp_path, "instruction,output\n\na,b\n\n\nc,d\n\n", "t.csv")
    assert (file.rows, file.status, len(written)) == (2, "ok", 2)


@pytest.mark.parametrize(("name", "separator"), [("t.tsv", "\t"), ("t.csv", ";"), ("t.csv", "\t")])
def test_other_separators(tmp_path, name, separator):
    _, written = convert(tmp_path, f"Prompt{separator}Response\na, b{separator}c\n", name)
    assert written == [{"instruction": "a, b", "input": "", "output": "c"}]


def test_csv_with_too_many_fields_or_no_columns(tmp_path):
    file, _ = convert(tmp_path, "instruction,output\na,b,c\nd,e\n", "t.csv")
    assert (file.rejected, file.valid) == ({"broken": 1}, 1)
    file, _ = convert(tmp_path, "name,age\nx,5\n", "t.csv")
    assert file.status == "not_data"
    assert "'name', 'age'" in file.message
    assert "columns=" in file.message


def test_parquet(tmp_path):
    texts = {"instruction": ["a", None, "c"], "output": ["x", "y", "N/A"], "history": [[], None, PAIRS]}
    pyarrow.parquet.write_table(pa.table(texts), tmp_path / "t.parquet")
    (tmp_path / "zz-good.json").write_text(array([row(999)]))
    file, written = convert_folder(tmp_path, "t.parquet")
    assert [(each["instruction"], each["output"]) for each in written] == [("a", "x"), ("c", "N/A")]
    assert written[1]["history"] == PAIRS
    assert [str(problem) for problem in file.problems] == ["row 2: no instruction"]


def test_a_parquet_file_that_is_cut_off_is_refused(tmp_path):
    pyarrow.parquet.write_table(pa.table({"instruction": ["a"], "output": ["b"]}), tmp_path / "t.parquet")
    content = (tmp_path / "t.parquet").read_bytes()
    file, _ = convert(tmp_path, content[:-20], "t.parquet")
    assert (file.status, file.rows) == ("refused", 0)


def test_the_forms_that_the_readme_shows(tmp_path):
    readme = (Path(__file__).parents[2] / "data" / "README.md").read_text("utf-8")
    shown = [line.split("     .") for line in readme.splitlines() if line.startswith(("    [{", "    {"))]
    assert [ending.split(",")[0] for _, ending in shown] == ["json", "jsonl"]
    for content, ending in shown:
        file, written = convert(tmp_path, content, f"rows.{ending.split(',')[0]}")
        assert (file.status, file.valid) == ("ok", 1)
        assert "input" in written[0] or "history" in written[0]


def test_columns_with_other_names(tmp_path):
    rows = [{"question": "a", "answer": "b", "instruction": "not this"}]
    _, written = convert(tmp_path, array(rows), columns={"question": "instruction", "answer": "output"})
    assert written == [{"instruction": "a", "input": "", "output": "b"}]


def test_an_earlier_output_in_the_source_folder_is_not_read(tmp_path):
    (tmp_path / "a.json").write_text(array([row(1)]))
    for _ in range(2):
        assert convert_alpaca(tmp_path, tmp_path / "train.jsonl").rows == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_refused(tmp_path):
    (tmp_path / "rows.json").touch(mode=0)
    (tmp_path / "good.json").write_text(array([row(1)]))
    report = convert_alpaca(tmp_path, tmp_path / "out" / "t.jsonl")
    assert {file.status for file in report.files} == {"ok", "refused"}


def test_a_link_to_nowhere_is_refused(tmp_path):
    (tmp_path / "rows.json").symlink_to(tmp_path / "gone.json")
    (tmp_path / "good.json").write_text(array([row(1)]))
    report = convert_alpaca(tmp_path, tmp_path / "out" / "t.jsonl")
    assert [file.status for file in report.files] == ["ok", "refused"]


def test_the_same_source_gives_the_same_bytes(tmp_path):
    content = array([row(i) for i in range(20)])
    convert(tmp_path, content)
    first = (tmp_path / "out" / "train.jsonl").read_bytes()
    convert(tmp_path, content)
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == first


def test_a_row_longer_than_the_window(tmp_path):
    long = row(1, output="长" * 3_000_000, history=[["instruction", '{"instruction": "x"}']])
    file, written = convert(tmp_path, array([row(0), long, row(2)]))
    assert file.status == "ok"
    assert written == [row(0), long, row(2)]


@pytest.mark.once
@pytest.mark.parametrize("form", ["array", "lines", "csv"])
def test_memory_stays_flat(tmp_path, form):
    def peak(rows: int) -> int:
        path = tmp_path / {"array": "a.json", "lines": "a.jsonl", "csv": "a.csv"}[form]
        each = [row(i, output="x" * 1000) for i in range(rows)]
        if form == "csv":
            path.write_text("instruction,output\n" + "".join(f"{r['instruction']},{r['output']}\n" for r in each))
        else:
            path.write_text(array(each) if form == "array" else "".join(json.dumps(r) + "\n" for r in each))
        del each
        tracemalloc.start()
        convert_alpaca(path, tmp_path / "out.jsonl")
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    # 8,000 rows are 8 MB more of text; what is remembered of them is 9 bytes each.
    assert peak(12_000) - peak(4_000) < 1_000_000


def test_the_broken_files_of_the_notebook_hold_as_many_good_rows_as_they_say(tmp_path):
    good = write_broken_files(tmp_path / "s")
    report = convert_alpaca(tmp_path / "s", tmp_path / "out.jsonl")
    check(report, tmp_path / "out.jsonl")
    assert {file.path.name: file.valid for file in report.files} == good
    assert {file.status for file in report.files} == {"ok", "repaired", "refused", "empty", "not_data"}
