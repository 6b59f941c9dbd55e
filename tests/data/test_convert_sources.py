"""convert_alpaca on many files at once: folders, layouts of the data set, zips, iterables, options."""

import io
import json
import os
import zipfile

import datasets
import matplotlib as mpl
import pandas
import pyarrow as pa
import pyarrow.parquet
import pytest

from glmhelpers.data.convert import convert_alpaca
from glmhelpers.plots import data as plots_data
from glmhelpers.tokens.encode import encode_file
from tests.helpers.alpaca_rows import array, check, convert, row
from tests.helpers.reference import tokenizer

mpl.use("agg")


@pytest.mark.parametrize("root", ["history", "."])
def test_both_layouts_of_the_data_set_and_the_full_file_beside_its_parts(tmp_path, root):
    source = tmp_path / "clone"
    english = [{"instruction": f"Question {i}", "input": "", "output": f"Answer {i}"} for i in range(90)]
    folder = source / root / "原始英文数据"
    folder.mkdir(parents=True)
    for part in range(18):
        (folder / f"alpaca_data-{part}.json").write_text(array(english[part * 5 : part * 5 + 5]))
    # One part is broken: its row must come from the full file.
    path = folder / "alpaca_data-3.json"
    path.write_text(path.read_text().replace("Answer 17", 'Answer "17"'))
    (folder / "alpaca_data.json").write_text(array(english))
    chinese = source / root / "翻译后的中文数据"
    chinese.mkdir()
    (chinese / "a.json").write_text(array([row(i) for i in range(7)]))
    (source / "data").mkdir()
    (source / "data" / "more.json").write_text(array([{"prompt": "p", "response": "r", "history": []}]))
    (source / "README.md").write_text("words")
    (source / ".git").mkdir()
    (source / ".git" / "x.json").write_text("[]")

    output = tmp_path / "train.jsonl"
    assert convert_alpaca(source, output).rows_valid == 2 * 90 - 1 + 7 + 1
    report = convert_alpaca(source, output, dedupe=True)
    check(report, output)
    assert report.rows_valid == 90 + 7 + 1
    written = [json.loads(line)["instruction"] for line in output.read_text("utf-8").splitlines()]
    assert len(set(written)) == 98
    full = next(file for file in report.files if file.path.name == "alpaca_data.json")
    assert (full.rows, full.valid, full.rejected) == (90, 1, {"duplicate": 89})
    assert report.left_alone == ["README.md"]
    assert [file.path for file in report.files] == sorted(file.path for file in report.files)


def test_two_equal_files_are_both_kept_unless_duplicates_are_dropped(tmp_path):
    source = tmp_path / "s"
    source.mkdir()
    for name in ("a.json", "b.json"):
        (source / name).write_text(array([row(1), row(2), row(2)]))
    report = convert_alpaca(source, tmp_path / "a.jsonl")
    assert report.rows_valid == 6
    report = convert_alpaca(source, tmp_path / "a.jsonl", dedupe=True)
    check(report, tmp_path / "a.jsonl")
    assert report.rows_valid == 2
    assert [file.rejected for file in report.files] == [{"duplicate": 1}, {"duplicate": 3}]
    lines = (tmp_path / "a.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [row(1), row(2)]


def test_drop_untranslated(tmp_path):
    english = {"instruction": "Name a colour", "input": "", "output": "Red"}
    sums = {"instruction": "1+1", "input": "", "output": "2"}
    mixed = {"instruction": "把“dog”译成中文", "input": "", "output": "dog"}
    rows = [row(1), row(2), row(3), english, sums, mixed]
    file, written = convert(tmp_path, array(rows), drop_untranslated=True)
    assert file.rejected == {"untranslated": 1}
    assert english not in written
    assert {sums["output"], mixed["output"]} < {each["output"] for each in written}
    # In an English file there is nothing to translate.
    file, written = convert(tmp_path, array([english, english, row(1)]), drop_untranslated=True)
    assert (file.rejected, len(written)) == ({}, 3)


def test_an_english_task_on_a_chinese_text_is_no_untranslated_row(tmp_path):
    translate = {"instruction": "Translate into English", "input": "你好", "output": "Hello"}
    file, written = convert(tmp_path, array([row(1), row(2), translate]), drop_untranslated=True)
    assert file.rejected == {}
    assert translate in written


def test_limits_on_length(tmp_path):
    rows = [row(1), row(2, input="a" * 50), row(3, output="b" * 50)]
    file, _ = convert(tmp_path, array(rows), max_prompt_chars=20, max_answer_chars=30)
    assert file.rejected == {"prompt longer than 20 characters": 1, "answer longer than 30 characters": 1}


def test_zip(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("b/rows.json", array([row(1)]))
        archive.writestr("a/rows.csv", "instruction,output\nx,y\n")
        archive.writestr("__MACOSX/rows.json", array([row(2)]))
        archive.writestr("notes.txt", "words")
        table = io.BytesIO()
        pyarrow.parquet.write_table(pa.table({"prompt": ["p"], "response": ["r"]}), table)
        archive.writestr("c.parquet", table.getvalue())
    report = convert_alpaca(path, tmp_path / "out.jsonl")
    check(report, tmp_path / "out.jsonl")
    assert [file.path.name for file in report.files] == ["rows.csv", "rows.json", "c.parquet"]
    assert report.rows_valid == 3
    assert report.left_alone == ["notes.txt"]


def test_a_zip_member_that_breaks_off_is_refused_whole(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a.json", array([row(1)]))
        archive.writestr("b.jsonl", "".join(json.dumps(row(i)) + "\n" for i in range(20_000)))
    content = bytearray(path.read_bytes())
    # A changed byte near the end of b.jsonl: rows are read before its checksum fails.
    place = content.rindex(b"19999") + 1
    content[place] = ord("8")
    path.write_bytes(content)
    report = convert_alpaca(path, tmp_path / "out.jsonl")
    check(report, tmp_path / "out.jsonl")
    broken = report.files[1]
    assert (broken.status, broken.valid) == ("refused", 0)
    assert broken.rows > 0
    assert report.rows_valid == 1


def test_a_zip_in_a_zip_is_named_and_not_opened(tmp_path):
    inner, path = tmp_path / "inner.zip", tmp_path / "set.zip"
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("a.json", array([row(1)]))
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(inner, "inner.zip")
    with pytest.raises(ValueError, match=r"left alone: inner\.zip\n.*unpack"):
        convert_alpaca(path, tmp_path / "out.jsonl")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("b.json", array([row(2)]))
    report = convert_alpaca(path, tmp_path / "out.jsonl")
    assert (report.rows_valid, report.left_alone) == (1, ["inner.zip"])
    assert "unpack" in str(report)


def test_a_file_that_only_starts_like_a_zip(tmp_path):
    path = tmp_path / "set.zip"
    path.write_bytes(b"PK\x03\x04 and nothing")
    with pytest.raises(ValueError, match=r"set\.zip starts like a zip"):
        convert_alpaca(path, tmp_path / "out.jsonl")


def test_an_iterable_of_rows(tmp_path):
    report = convert_alpaca((row(i) if i != 2 else "text" for i in range(4)), tmp_path / "out.jsonl")
    check(report, tmp_path / "out.jsonl")
    assert report.rows_valid == 3
    assert report.files[0].problems[0].line == 3
    with pytest.raises(TypeError, match="one dict"):
        convert_alpaca(row(1), tmp_path / "out.jsonl")


def test_an_error_inside_the_users_iterable_is_not_swallowed(tmp_path):
    def rows():
        yield row(1)
        raise OSError("the user's own")

    with pytest.raises(OSError, match="the user's own"):
        convert_alpaca(rows(), tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_one_file_whatever_its_name(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text(array([row(1)]))
    assert convert_alpaca(str(path), str(tmp_path / "out.jsonl")).rows_valid == 1


def test_the_source_is_never_written_over(tmp_path):
    own = tmp_path / "train.jsonl"
    text = json.dumps(row(1)) + "\n" + json.dumps({"instruction": "not finished"}) + "\n"
    own.write_text(text)
    link = tmp_path / "link.jsonl"
    link.symlink_to(own)
    # As a file, by another name, and as one of a folder's files.
    for source, output in ((own, own), (own, link), (tmp_path, own)):
        with pytest.raises(FileExistsError, match="another file"):
            convert_alpaca(source, output)
    assert own.read_text() == text


def test_what_earlier_conversions_wrote_into_the_source_is_not_read_again(tmp_path):
    (tmp_path / "a.json").write_text(array([row(1), row(2)]))
    first = convert_alpaca(tmp_path, tmp_path / "first.jsonl")
    encode_file(first.output, tokenizer())
    second = convert_alpaca(tmp_path, tmp_path / "second.jsonl")
    check(second, second.output)
    assert (second.rows, [file.path.name for file in second.files]) == (2, ["a.json"])
    assert {name.rpartition(".")[2] for name in second.left_alone if name.startswith("tokens/")} == {"json", "arrow"}
    assert {"first.jsonl", "first.report.json"} < set(second.left_alone)
    assert not any(name.endswith(".tmp") for name in second.left_alone)
    # Asked for by its name, it is a file as any other.
    assert convert_alpaca(first.output, tmp_path / "third.jsonl").rows_valid == 2


@pytest.mark.parametrize("content", ["words", "[]", '{"output": "a.jsonl"}', "\ud800"])
def test_a_report_of_somebody_else_hides_no_rows(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(json.dumps(row(1)))
    (tmp_path / "a.report.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    assert convert_alpaca(tmp_path, tmp_path / "out" / "t.jsonl").rows_valid == 1


def test_a_link_to_a_folder_is_named(tmp_path):
    source, other = tmp_path / "s", tmp_path / "other"
    source.mkdir()
    other.mkdir()
    (source / "a.json").write_text(array([row(1)]))
    (other / "b.json").write_text(array([row(2)]))
    (source / "more").symlink_to(other)
    report = convert_alpaca(source, tmp_path / "out.jsonl")
    assert (report.rows, report.left_alone) == (1, ["more"])


def test_names_that_are_no_utf8_can_be_printed(tmp_path):
    source = tmp_path / "s"
    source.mkdir()
    (source / os.fsdecode(b"\xd6\xd0.json")).write_text(array([row(1), {"instruction": "a"}]))
    (source / os.fsdecode(b"\xce\xc4.md")).write_text("words")
    report = convert_alpaca(source, tmp_path / "out.jsonl")
    str(report).encode("utf-8")
    assert r"\udcd6\udcd0.json" in str(report)
    plots_data.draw_report(report).figure.canvas.draw()


def test_what_is_no_list_of_rows_is_told(tmp_path):
    output = tmp_path / "out.jsonl"
    with pytest.raises(TypeError, match="to_dict"):
        convert_alpaca(pandas.DataFrame([row(1)]), output)
    with pytest.raises(ValueError, match=r"row 1: .*PosixPath|row 1: .*WindowsPath"):
        convert_alpaca([tmp_path / "a.json"], output)


def test_a_data_set_of_the_hub_is_an_iterable_of_rows(tmp_path):
    rows = datasets.Dataset.from_list([row(1, history=[]), row(2, history=[["a", "b"]])])
    report = convert_alpaca(rows, tmp_path / "out.jsonl")
    assert report.rows_valid == 2
