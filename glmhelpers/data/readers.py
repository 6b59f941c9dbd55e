"""Rows out of a file, whatever its format.

    first bytes / first line / name
        PAR1                      -> parquet      batches of rows
        version .. oid sha256:..  -> none         Git LFS left a pointer in place of the file
        name ends in .csv, .tsv   -> csv          first line: names of the columns
        a line that is an object  -> JSON Lines   one row a line
        anything else             -> JSON         an array of rows, or values one after the other

What a file is called matters less than what is in it: many `.json` files hold JSON Lines. A reader never judges a row;
it says on which line it stands and whether it could be parsed. Memory does not grow with the size of the file.
"""

import csv
import io
import json
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet

from glmhelpers.data.cleaning import UNDECODABLE, find_columns, missing_columns
from glmhelpers.data.json_recovery import Found, Notes, read_json

HEAD = 2**16
"""Bytes that are looked at to tell the format."""
LONGEST_FIELD = 2**20
"""Characters of one CSV field; in a longer one, its opening quote counts as broken."""
PARQUET_BATCH = 1000

_BOMS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


def read_rows(
    file: BinaryIO, name: str, notes: Notes, columns: Mapping[str, str], encoding: str | None = None
) -> Iterator[Found]:
    """Rows of one open file.

    Args:
        file: opened for reading bytes; it must be able to seek.
        name: of the file; only its ending is used.
        notes: repairs, and why it holds no rows, are written here.
        columns: name of a column in the file -> the name it has in this course.
        encoding: of the text; None means UTF-8, or what a byte order mark says.

    Raises:
        OSError, ValueError: the file cannot be read to its end.
    """
    head = file.read(HEAD)
    file.seek(0)
    if head.startswith(b"PAR1"):
        yield from _read_parquet(file, notes, columns)
        return
    if head.startswith(b"version ") and b"\noid sha256:" in head:
        yield Found(1, None, "a pointer of Git LFS, the file itself is elsewhere (git lfs pull brings it)")
        return
    if encoding is None:
        encoding = next((known for mark, known in _BOMS.items() if head.startswith(mark)), "utf-8")
    # Bytes that are not in the encoding become lone surrogates, so that one of them costs one row, not the file.
    text = io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="")
    if name.lower().endswith((".csv", ".tsv")):
        yield from _read_csv(text, notes, columns)
    elif _has_object_lines(head.decode(encoding, errors="ignore")):
        text.reconfigure(newline="\n")
        yield from _read_lines(text, notes)
    else:
        yield from read_json(text, notes)


def _has_object_lines(head: str) -> bool:
    lines = head.lstrip("\ufeff").split("\n")
    return not head.lstrip().startswith("[") and any(_is_object(line) for line in lines)


def _is_object(line: str) -> bool:
    try:
        return line.lstrip().startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_lines(text: io.TextIOWrapper, notes: Notes) -> Iterator[Found]:
    for number, line in enumerate(text, 1):
        if not line.strip(" \t\r\n\ufeff"):
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            for found in read_json(io.StringIO(line, newline="\n"), notes):
                found.line = number
                yield found
        else:
            notes.top_level += 1
            yield Found(number, value)


class _Lines:
    """Lines for the csv module that can be handed back, and that remembers those of the present record."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.text, self.number = text, 0
        self.back: deque[str] = deque()
        self.record: list[str] = []

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self.back.popleft() if self.back else next(self.text)
        self.record.append(line)
        return line

    def done(self) -> int:
        """The present record is finished; returns the line it began on."""
        first = self.number + 1
        self.number += len(self.record)
        self.record = []
        return first

    def only_first(self) -> int:
        """The present record is broken: all its lines but the first are read again."""
        self.back.extendleft(reversed(self.record[1:]))
        del self.record[1:]
        return self.done()


def _read_csv(text: io.TextIOWrapper, notes: Notes, columns: Mapping[str, str]) -> Iterator[Found]:
    first = text.readline().lstrip("\ufeff")
    names, delimiter = _csv_columns(first, columns)
    if not _is_table(names, columns):
        notes.not_data = missing_columns(names) if first.strip() else ""
        return
    lines = _Lines(text)
    lines.number = 1
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield from _csv_records(lines, names, delimiter)
    finally:
        csv.field_size_limit(limit)


def _csv_records(lines: _Lines, names: list[str], delimiter: str) -> Iterator[Found]:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Found(lines.only_first(), None, str(error))
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            continue
        line = lines.done()
        if len(fields) > len(names):
            yield Found(line, None, f"{len(fields)} fields under {len(names)} column names")
        elif fields:
            yield Found(line, dict(zip(names, fields, strict=False)))


def _csv_columns(line: str, columns: Mapping[str, str]) -> tuple[list[str], str]:
    """(names, delimiter): the delimiter with which the first line names the most columns that are known."""
    choices = []
    for delimiter in ",\t;":
        try:
            names = [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
        except csv.Error:
            continue
        choices.append((len(find_columns(names, columns)), names, delimiter))
    _, names, delimiter = max(choices, key=lambda choice: choice[0], default=(0, [], ","))
    return names, delimiter


def _is_table(names: list[str], columns: Mapping[str, str]) -> bool:
    return {"instruction", "output"} <= find_columns(names, columns).keys()


def _read_parquet(file: BinaryIO, notes: Notes, columns: Mapping[str, str]) -> Iterator[Found]:
    notes.unit = "row"
    table = pyarrow.parquet.ParquetFile(file)
    if not _is_table(table.schema_arrow.names, columns):
        notes.not_data = missing_columns(table.schema_arrow.names)
        return
    number = 0
    for batch in table.iter_batches(PARQUET_BATCH):
        for row in _batch_rows(batch):
            number += 1
            yield Found(number, row) if row is not None else Found(number, None, UNDECODABLE)


def _batch_rows(batch: pa.RecordBatch) -> list[dict[str, Any] | None]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [_batch_rows(batch.slice(i, 1))[0] for i in range(len(batch))] if len(batch) > 1 else [None]
