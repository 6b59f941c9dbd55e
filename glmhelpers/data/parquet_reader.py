"""Rows of a parquet file: only our columns are read, whatever else stands beside them.

instruction  output   created             meta {x, x}
-----------  ------   ------------------  -----------
read         read     year 292277         a name twice       <- nobody asked for these: they cannot do any harm
"""

from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet

from glmhelpers.data.cleaning import UNDECODABLE, find_columns, holds_rows, missing_columns
from glmhelpers.data.json_recovery import Found, Notes

BATCH = 1000
"""Rows that are in memory at one time, if they are of usual size."""
BATCH_BYTES = 2**26
"""Bytes that a batch of longer rows may have."""


class _Unreadable(Exception):
    """A value that has no form in Python; the message says why."""


def read_parquet(file: BinaryIO, notes: Notes, columns: Mapping[str, str]) -> Iterator[Found]:
    """Rows of one open file, as mappings of our columns only; arguments as for `read_rows`."""
    notes.unit = "row"
    table = pyarrow.parquet.ParquetFile(file)
    names = table.schema_arrow.names
    found = find_columns(names, columns)
    if not holds_rows(found):
        notes.not_data = missing_columns(names)
        return
    wanted, number = list(dict.fromkeys(found.values())), 0
    for batch in table.iter_batches(_batch_rows(table), columns=wanted):
        # A name may stand in the file twice: as with our names, the first one counts.
        of_name = {name: batch.column(batch.schema.names.index(name)) for name in wanted}
        for place in range(len(batch)):
            number += 1
            try:
                yield Found(number, {name: _value(column[place], name) for name, column in of_name.items()})
            except _Unreadable as reason:
                yield Found(number, None, str(reason))


def _batch_rows(table: pyarrow.parquet.ParquetFile) -> int:
    facts = table.metadata
    groups = [facts.row_group(place) for place in range(facts.num_row_groups)]
    each = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=0)
    return max(1, min(BATCH, int(BATCH_BYTES / max(1, each))))


def _value(scalar: pa.Scalar, name: str) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        raise _Unreadable(UNDECODABLE) from None
    except Exception as error:  # dates beyond the year 9999, zones nobody knows, a name twice: as many errors
        raise _Unreadable(f"its {name} cannot be read: {error}") from None
