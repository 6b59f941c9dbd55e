"""Alpaca rows, and one call of convert_alpaca on a file of them."""

import json
from pathlib import Path

from glmhelpers.data.convert import convert_alpaca
from glmhelpers.data.report import report_path


def row(number: int, **more) -> dict:
    return {"instruction": f"问题 {number}", "input": "", "output": f"回答 {number}", **more}


def array(rows: list, **how) -> str:
    return json.dumps(rows, ensure_ascii=False, **({"indent": 2} | how))


def convert(tmp_path: Path, content: str | bytes, name: str = "rows.json", **options):
    """(report of the one file, rows written); no row if nothing is valid."""
    source = tmp_path / name
    source.write_bytes(content.encode() if isinstance(content, str) else content)
    # A good file beside it, so that there is something to write whatever becomes of the first.
    good = tmp_path / "zz-good.json"
    good.write_text(array([row(999)]))
    return convert_folder(tmp_path, name, **options)


def convert_folder(folder: Path, name: str, **options):
    output = folder / "out" / "train.jsonl"
    report = convert_alpaca(folder, output, **options)
    check(report, output)
    written = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    by_name = {file.path.name: file for file in report.files}
    return by_name[name], [each for each in written if each["instruction"] != "问题 999"]


def check(report, output: Path) -> None:
    for file in report.files:
        assert file.rows == file.valid + sum(file.rejected.values()), file
    assert report.rows == report.rows_valid + sum(report.rejected.values())
    assert report.rows_valid == len(output.read_text("utf-8").splitlines())
    saved = json.loads(report_path(output).read_text("utf-8"))
    assert (saved["rows"], saved["rows_valid"]) == (report.rows, report.rows_valid)


QUOTES = array([row(i) for i in range(5)]).replace("回答 2", '他说"你好"，就走了')
