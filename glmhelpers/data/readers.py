"""Rows out of a file, whatever its format.

    first bytes / first line / name
        PAR1                      -> parquet      batches of rows
        version .. oid sha256:..  -> none         Git LFS left a pointer in place of the file
        name ends in .csv, .tsv   -> csv          the first line that names our columns, then rows
        a line that is an object  -> JSON Lines   one row a line
        anything else             -> JSON         an array of rows, or values one after the other

What a file is called matters less than what is in it: many `.json` files hold JSON Lines. A reader never judges a row;
it says on which line it stands and whether it could be parsed. Memory does not grow with the size of the file.
"""

import io
import json
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from glmhelpers.data.csv_reader import read_csv
from glmhelpers.data.json_recovery import Found, Notes, read_json
from glmhelpers.data.parquet_reader import read_parquet

HEAD = 2**16
"""Bytes that are looked at to tell the format."""

_BOMS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


def read_rows(
    file: BinaryIO, name: str, notes: Notes, columns: Mapping[str, str], encoding: str | None
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
        yield from read_parquet(file, notes, columns)
        return
    if head.startswith(b"version ") and b"\noid sha256:" in head:
        yield Found(1, None, "a pointer of Git LFS, the file itself is elsewhere (git lfs pull brings it)")
        return
    if encoding is None:
        encoding = next((known for mark, known in _BOMS.items() if head.startswith(mark)), "utf-8")
    # Bytes that are not in the encoding become lone surrogates, so that one of them costs one row, not the file.
    text = io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="")
    if name.lower().endswith((".csv", ".tsv")):
        yield from read_csv(text, notes, columns)
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
