"""3,000 damaged files of every format in folders of twenty: each is judged, and none stops or changes the others.

Not hypothesis: its inputs grow from nothing, these begin as good files and lose, double, swap and change bytes.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import zipfile

import pandas as pd
import pyarrow as pa
import pytest

from glmhelpers.data.convert import convert_alpaca
from tests.helpers.alpaca_rows import array, check, row

FOLDERS, FILES = 150, 20
HISTORY = [["q", "a"], ["r", "b"]]
ROWS = [
    row(1),
    row(2, history=HISTORY, system="Be kind."),
    row(3, input="无输入", output='say "so"\r\n  x'),
    row(4, input=7),
]
SAID = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
CHATS = [{"messages": SAID}, {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]


def lines(rows: list) -> str:
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows)


def table(delimiter: str) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["instruction", "input", "output", "history", "system"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue()


def parquet(rows: list) -> bytes:
    file = io.BytesIO()
    pd.DataFrame(rows).astype({"input": str} if "input" in rows[0] else {}).to_parquet(file)
    return file.getvalue()


def arrow() -> bytes:
    file, rows = io.BytesIO(), pa.Table.from_pylist([each | {"input": ""} for each in ROWS])
    with pa.ipc.new_stream(file, rows.schema) as stream:
        stream.write_table(rows)
    return file.getvalue()


def zipped(method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("x.jsonl", lines(ROWS))
    return file.getvalue()


GOOD: dict[str, list[bytes]] = {
    ".json": [text.encode() for text in (array(ROWS), array(ROWS, indent=None), lines(ROWS), array(CHATS[0]))],
    ".jsonl": [text.encode(code) for text in (lines(ROWS), lines(CHATS)) for code in ("utf-8", "utf-16", "gb18030")],
    ".csv": [table(",").encode(), ("sep=;\n" + table(";")).encode(), ("\ufeff\n# x\n" + table(",")).encode()],
    ".tsv": [table("\t").encode("utf-16"), table("\t").encode()],
    ".parquet": [parquet(ROWS), parquet([CHATS[0]])],
    ".arrow": [arrow()],
    ".json.gz": [gzip.compress(array(ROWS).encode()), gzip.compress(gzip.compress(b"[]"))],
    ".csv.bz2": [bz2.compress(table(",").encode())],
    ".jsonl.xz": [lzma.compress(lines(ROWS).encode())],
}
ZIPS = [zipped(method) for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)]
# What makes trouble wherever it stands in a text.
SPICE = [
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\n",
    b"\r",
    b"\x00",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\x1a",
    b"null",
]
SPICE += [
    b"\\ud800",
    b"1e999",
    b"-",
    b'{"instruction": "a", "output": ',
    b"[[[[[[[[",
    b"PK\x03\x04",
    b"\x1f\x8b",
    b"PAR1",
    b"'",
]


def spoilt(content: bytes, dice: random.Random) -> bytes:
    """A copy in which some of the bytes are gone, doubled, swapped, changed, or joined by others."""
    for _ in range(dice.choice((1, 1, 2, 5, 20))):
        start = dice.randrange(len(content) + 1)
        end = min(len(content), start + dice.choice((1, 1, 4, 30, 10**6)))
        piece = content[start:end]
        content = content[:start] + dice.choice(
            (b"", piece * 2, piece[::-1], bytes(dice.randrange(256) for _ in piece[:9]), dice.choice(SPICE) + piece)
        ) + content[end:]  # fmt: skip
    return content


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.once) for part in range(1, 5))])
def test_damaged_files_are_judged_one_by_one(tmp_path, part):
    dice, signs = random.Random(part), set()
    for number in range(part, FOLDERS, 5):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "good.json").write_text(array([row(0)]))
        for place in range(FILES):
            ending = dice.choice(list(GOOD))
            (folder / f"{place}{ending}").write_bytes(spoilt(dice.choice(GOOD[ending]), dice))
        report = convert_alpaca(folder, tmp_path / "out.jsonl")
        check(report, tmp_path / "out.jsonl")
        files = {report.name_of(file): file for file in report.files}
        assert len(files) == FILES + 1
        assert (files["good.json"].status, files["good.json"].valid) == ("ok", 1)
        for file in report.files:
            assert file.status in ("ok", "repaired") or (file.message or file.status == "empty"), file
            signs.add(file.status)
        for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines():
            written = json.loads(line)
            assert written["instruction"].strip()
            assert written["output"].strip()
            assert all(len(turn) == 2 for turn in written.get("history", []))
        str(report)
    assert signs >= {"ok", "repaired", "refused", "not_data"}


def test_damaged_zips_alone(tmp_path):
    dice, read = random.Random(0), 0
    for _ in range(200):
        (tmp_path / "a.zip").write_bytes(spoilt(dice.choice(ZIPS), dice))
        said = ""
        try:
            read += convert_alpaca(tmp_path / "a.zip", tmp_path / "out.jsonl").rows_valid > 0
        except ValueError as error:
            said = str(error)
        assert not said or "a.zip" in said
    assert 0 < read < 200
