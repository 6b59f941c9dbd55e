"""Rows out of a file, whatever its format.

    first bytes / first line / name
        PAR1, ARROW1, ffffffff    -> a table      batches of rows
        version .. oid sha256:..  -> none         Git LFS left a pointer in place of the file
        name ends in .csv, .tsv   -> csv          the first line that names our columns, then rows
        a line that is an object  -> JSON Lines   one row a line
        anything else             -> JSON         an array of rows, or values one after the other

What a file is called matters less than what is in it: many `.json` files hold JSON Lines. A reader never judges a row;
it says on which line it stands and whether it could be parsed. Memory does not grow with the size of the file, nor
with that of a line. Of a table only our columns are read: whatever stands beside them cannot do any harm.

What a parquet file unpacks to is not known by its size: 700 MB of one letter are 20 kB. Its library takes a page (a MB
of one column, mostly) as a whole, so the headers of the pages are read first; they say what is in them.

    a column's part of a row group:   dictionary page | page | page ...
                                      size, values      size, values      too large: refused, nothing is unpacked
                                                                          else as many rows at a time as surely fit
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet

from glmhelpers.data.cleaning import UNDECODABLE, find_columns, holds_rows, missing_columns
from glmhelpers.data.csv_reader import read_csv
from glmhelpers.data.files import LIKELY_RATIO, MOST_UNPACKED
from glmhelpers.data.json_recovery import DECODER, LONGEST_ROW, Found, Notes, read_json
from glmhelpers.utils.packed_sizes import FEATHER, messages, page_header, unpacked_bytes

HEAD = 2**16
"""Bytes that are looked at to tell the format."""

BATCH = 1000
"""Rows that are in memory at one time, if they are of usual size."""
BATCH_BYTES = 2**26
"""Bytes that a batch of longer rows may have."""
PAGE_BYTES = 2**27
"""Bytes of a page of a parquet file, unpacked: no writer makes larger ones, unless one value is that large."""
TABLE_BYTES = 2**28
"""Bytes of a table in a zip, or packed by gzip and the like: it is read out of order, so it is unpacked as a whole.
Also of a packed batch of an Arrow file, and of all its dictionaries, for the same reason."""
ROW_BYTES = 64
"""What a row counts beside its texts, when a table is judged by what came out of it: about what is written of it."""

STREAM = b"\xff\xff\xff\xff"
"""First bytes of Arrow's form without a footer."""

TABLES = {"iterrows": "to_dict('records')", "to_pylist": "to_pylist()", "to_dicts": "to_dicts()"}
"""What tells a table of another library -> how it gives its rows."""

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
    if head.startswith((b"PAR1", FEATHER, STREAM)):
        reader = _read_parquet if head.startswith(b"PAR1") else _read_arrow
        yield from reader(_in_reach(file), notes, columns)
        return
    if head.startswith(b"version ") and b"\noid sha256:" in head:
        yield Found(1, None, "a pointer of Git LFS, the file itself is elsewhere (git lfs pull brings it)")
        return
    if encoding is None:
        encoding = next((known for mark, known in _BOMS.items() if head.startswith(mark)), _by_zeros(head))
    # Bytes that are not in the encoding become lone surrogates, so that one of them costs one row, not the file.
    text = io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="")
    if name.lower().endswith((".csv", ".tsv")):
        yield from read_csv(text, notes, columns)
    elif _has_object_lines(head.decode(encoding, errors="ignore")):
        text.reconfigure(newline="\n")
        yield from _read_lines(text, notes)
    else:
        yield from read_json(text, notes)


def numbered(source: Iterable[Any]) -> Iterator[Found]:
    """The rows of an iterable.

    Raises:
        TypeError: it is a dict, a table of another library, or no iterable at all.
    """
    if isinstance(source, bytes) or not isinstance(source, Iterable):
        raise TypeError(f"source is a {type(source).__name__}; give a list of rows, or the path of a file")
    if isinstance(source, Mapping):
        if source and all(hasattr(each, "column_names") for each in source.values()):
            raise TypeError(f"source is a data set in parts; give one of them: source[{next(iter(source))!r}]")
        raise TypeError("source is one dict; give a list of rows, or the path of a file")
    for sign, way in TABLES.items():
        if hasattr(source, sign):
            raise TypeError(f"source is a {type(source).__name__}; give its rows: source.{way}")
    if hasattr(source, "with_format"):
        source = source.with_format(None)  # a data set that gives arrays or tables otherwise
    # A generator may fill one dict again and again; rows are looked at several at a time.
    return (Found(number, dict(row) if type(row) is dict else row) for number, row in enumerate(source, 1))


def _by_zeros(head: bytes) -> str:
    """The encoding of a text without a mark: letters of ASCII, which every format has, leave zeros in UTF-16."""
    odd, even = head[1::2].count(0), head[::2].count(0)
    if odd + even > len(head) / 8 and not (odd and even):
        return "utf-16-le" if odd else "utf-16-be"
    return "utf-8"


def _has_object_lines(head: str) -> bool:
    lines = head.lstrip("\ufeff").split("\n")
    return not head.lstrip().startswith("[") and any(_is_object(line) for line in lines)


def _is_object(line: str) -> bool:
    try:
        return line.lstrip().startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_lines(text: io.TextIOWrapper, notes: Notes) -> Iterator[Found]:
    number = 0
    while line := text.readline(LONGEST_ROW):
        number += 1
        if len(line) == LONGEST_ROW and not line.endswith("\n"):
            while (more := text.readline(LONGEST_ROW)) and not more.endswith("\n"):
                pass
            yield Found(number, None, f"longer than {LONGEST_ROW:,} characters")
            continue
        if not line.strip(" \t\r\n\ufeff"):
            continue
        try:
            value = DECODER.decode(line)
        except (ValueError, RecursionError):
            for found in read_json(io.StringIO(line, newline="\n"), notes):
                found.line = number
                yield found
        else:
            notes.top_level += 1
            yield Found(number, value)


class _NoValue(Exception):
    """A value that has no form in Python; the message says why."""


def _on_disk(file: BinaryIO) -> bool:
    return isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO)


def _in_reach(file: BinaryIO) -> BinaryIO:
    """A file that can be read out of order: itself, or what is in a packed one."""
    if _on_disk(file):
        return file
    unpacked = file.read(TABLE_BYTES + 1)
    if len(unpacked) > TABLE_BYTES:
        raise ValueError(f"it is a table of more than {TABLE_BYTES:,} bytes, and packed: unpack it first")
    return io.BytesIO(unpacked)


def _read_parquet(file: BinaryIO, notes: Notes, columns: Mapping[str, str]) -> Iterator[Found]:
    """Rows of one open file, as mappings of our columns only; arguments as for `read_rows`."""
    notes.unit = "row"
    table = pyarrow.parquet.ParquetFile(file, buffer_size=2**20)
    names = table.schema_arrow.names
    found = find_columns(names, columns)
    if not holds_rows(found):
        notes.not_data = missing_columns(names)
        return
    wanted = list(dict.fromkeys(found.values()))
    rows = _batch_rows(table.metadata, file, set(wanted))
    yield from _table_rows(table.iter_batches(rows, columns=wanted), wanted, file.seek(0, io.SEEK_END))


def _read_arrow(file: BinaryIO, notes: Notes, columns: Mapping[str, str]) -> Iterator[Found]:
    """As `_read_parquet`, for Arrow's own two formats: of `save_to_disk`, and of Feather."""
    notes.unit = "row"
    # Mapped into memory where that can be: then only what is looked at is read.
    source = pa.memory_map(file.name) if _on_disk(file) else pa.BufferReader(file.read())
    _refuse_large_batches(source)
    source.seek(0)
    if source.read(len(FEATHER)) == FEATHER:
        reader = pa.ipc.open_file(source)
        batches = (reader.get_batch(place) for place in range(reader.num_record_batches))
    else:
        source.seek(0)
        reader = batches = pa.ipc.open_stream(source)
    names = reader.schema.names
    found = find_columns(names, columns)
    if not holds_rows(found):
        notes.not_data = missing_columns(names)
        return
    yield from _table_rows(batches, list(dict.fromkeys(found.values())), source.size(), check=True)


def _refuse_large_batches(source: Any) -> None:
    """Look at each message of an Arrow file, and unpack none.

    Raises:
        ValueError: a batch, or all dictionaries together, unpack to more than `TABLE_BYTES`.
    """
    dictionaries = 0
    for message in messages(source):
        size = unpacked_bytes(message)
        if message.type == "dictionary":
            size = dictionaries = dictionaries + size
        if size > TABLE_BYTES:
            raise ValueError(
                f"it is packed, and a {message.type} in it has {size:,} bytes; at most {TABLE_BYTES:,} are unpacked at "
                "a time: write it with fewer rows a batch, or as parquet"
            )


def _table_rows(
    batches: Iterable[pa.RecordBatch], wanted: list[str], size: int, check: bool = False
) -> Iterator[Found]:
    """Rows of a table whose file has `size` bytes."""
    # Arrow files are taken as they lie there: to read a place that a damaged one points to would end the process.
    number, read, most = 0, 0, max(MOST_UNPACKED, LIKELY_RATIO * size)
    for batch in batches:
        # A name may stand in the file twice: as with our names, the first one counts.
        of_name = {name: batch.column(batch.schema.names.index(name)) for name in wanted}
        for column in of_name.values() if check else ():
            column.validate(full=True)
        long = batch.nbytes > LONGEST_ROW  # only in such a batch can a value be too long
        for place in range(len(batch)):
            number += 1
            try:
                row = {name: _value(column, place, name, long) for name, column in of_name.items()}
                read += ROW_BYTES + sum(len(value) for value in row.values() if isinstance(value, str))
                yield Found(number, row)
            except _NoValue as reason:
                read += ROW_BYTES
                yield Found(number, None, str(reason))
            if read > most:
                raise ValueError(
                    f"its first {number:,} rows are over {most:,} bytes, over {LIKELY_RATIO} times its size, as no "
                    "rows are: it may be made to fill memory or disk"
                )


def _batch_rows(facts: pyarrow.parquet.FileMetaData, file: BinaryIO, wanted: set[str]) -> int:
    """Rows that can be in memory at one time, by what the pages of our columns say of themselves.

    Raises:
        ValueError: a page is too large; names the column.
    """
    most = 1.0  # bytes of a value, at an average over those beside it
    chunks = (
        facts.row_group(group).column(place)
        for group in range(facts.num_row_groups)
        for place in range(facts.num_columns)
    )
    for chunk in chunks:
        name = chunk.path_in_schema.split(".")[0]
        if name not in wanted or not chunk.num_values:
            continue
        at = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
        end = at + chunk.total_compressed_size
        while at < end:
            file.seek(at)
            header, length = page_header(file.read(HEAD))
            size, at = header[2], at + length + max(0, header[3])
            if size > PAGE_BYTES:
                raise ValueError(
                    f"its column {name} holds a value, or a page of values, of {size:,} bytes, unpacked; at most "
                    f"{PAGE_BYTES:,} are read at a time: take that row out, or write the file with smaller pages"
                )
            about = header.get(5) or header.get(8) or {}
            encoding = about.get(2 if 5 in header else 4)
            if encoding in _PLAIN:
                most = max(most, size / max(1, about[1]))
            elif encoding not in _INDICES:  # a dictionary, or values that share a beginning: one may be all of it
                most = max(most, size)
    return max(1, min(BATCH, int(BATCH_BYTES / most)))


_PLAIN, _INDICES = (0, 6), (2, 8)
"""Encodings of a page: values one after the other (PLAIN, DELTA_LENGTH_BYTE_ARRAY); their places in a dictionary."""


def _value(column: pa.Array, place: int, name: str, long: bool) -> Any:
    if long and (size := column.slice(place, 1).nbytes) > LONGEST_ROW:
        raise _NoValue(f"its {name} is longer than {LONGEST_ROW:,} bytes ({size:,})")
    try:
        value = _counted(column[place], [LONGEST_ROW], name) if _may_repeat(column.type) else column[place].as_py()
        return value.decode() if isinstance(value, bytes) else value  # some programs write texts as bytes
    except UnicodeDecodeError:
        raise _NoValue(UNDECODABLE) from None
    except _NoValue:
        raise
    except Exception as error:  # dates beyond the year 9999, zones nobody knows, a name twice: as many errors
        raise _NoValue(f"its {name} cannot be read: {error}") from None


_SHARED = (
    *(pa.types.is_dictionary, pa.types.is_run_end_encoded, pa.types.is_list_view, pa.types.is_large_list_view),
    *(pa.types.is_string_view, pa.types.is_binary_view),
)
"""Types whose values may lie in the file once, and stand in a list a million times."""


def _may_repeat(kind: pa.DataType) -> bool:
    inner = [kind.field(place).type for place in range(kind.num_fields)]
    inner += [kind.value_type] if pa.types.is_dictionary(kind) else []
    return any(is_shared(each) for each in inner for is_shared in _SHARED) or any(map(_may_repeat, inner))


def _counted(value: pa.Scalar, left: list[int], name: str) -> Any:
    """`as_py`, until there is more than `left` letters and values."""
    if not value.is_valid:
        return None
    if isinstance(value, pa.DictionaryScalar | pa.RunEndEncodedScalar):
        return _counted(value.value, left, name)
    if isinstance(value, pa.StructScalar):
        return {key: _counted(each, left, name) for key, each in value.items()}
    if hasattr(value, "values"):
        return [_counted(each, left, name) for each in value.values]
    size = value.as_buffer().size if hasattr(value, "as_buffer") else 0
    left[0] -= 1 + size
    if left[0] < 0:
        raise _NoValue(f"its {name} is longer than {LONGEST_ROW:,} bytes")
    return value.as_py()
