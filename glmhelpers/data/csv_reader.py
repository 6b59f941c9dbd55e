"""Rows of a CSV file: where the names of its columns stand, and one record after the other.

(blank)                        passed over
sep=;                          Excel: the delimiter from here on
,,                             empty cells: passed over
Export of 5 May                a title or a comment: passed over, and counted
instruction;input;output       the first record that names our columns
Name a fruit.;;Apple.          a row
Name a tree.;;"Oak.            an open quote costs this line only; reading goes on at the next one
"""

import csv
import io
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from glmhelpers.data.cleaning import find_columns, holds_rows, missing_columns
from glmhelpers.data.json_recovery import Found, Notes

LONGEST_FIELD = 2**20
"""Characters of one field; in a longer one, its opening quote counts as broken."""
LONGEST_LINE = 2**24
"""Characters of one line; a longer one is broken, and its rest is not kept."""
MOST_TITLES = 200
"""Lines with something in them that may stand before the names of the columns."""

DELIMITERS = ",\t;|"


class _Lines:
    """Lines for the csv module that can be handed back, and that remembers those of the present record."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.text, self.number = text, 0
        self.back: deque[str] = deque()
        self.record: list[str] = []
        self.cut = False

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self.back.popleft() if self.back else self._next_line()
        self.record.append(line)
        return line

    def _next_line(self) -> str:
        if not (line := self.text.readline(LONGEST_LINE)):
            raise StopIteration
        if len(line) == LONGEST_LINE and not line.endswith(("\n", "\r")):
            self.cut = True
            while (more := self.text.readline(LONGEST_LINE)) and not more.endswith(("\n", "\r")):
                pass
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

    def again(self) -> None:
        """All lines of the present record are read again."""
        self.back.extendleft(reversed(self.record))
        self.record = []


def read_csv(text: io.TextIOWrapper, notes: Notes, columns: Mapping[str, str]) -> Iterator[Found]:
    """Rows of one open file (`newline=""`); arguments as for `read_rows`, lines passed over are counted in `notes`."""
    lines = _Lines(text)
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        names, style = _find_names(lines, notes, columns)
        if names:
            yield from _records(lines, names, style, notes)
    finally:
        csv.field_size_limit(limit)


def _find_names(lines: _Lines, notes: Notes, columns: Mapping[str, str]) -> tuple[list[str], dict[str, Any]]:
    """(names, style for the csv module), and the lines moved behind them; if there are none, `notes` says why."""
    delimiters, first, titles = DELIMITERS, "", 0
    while titles < MOST_TITLES and (line := next(lines, None)) is not None:
        said = line.strip(' "\r\n\ufeff')
        if said[:4].lower() == "sep=" and len(said) == 5:
            delimiters = said[4] + DELIMITERS
        elif line.strip(f'{delimiters}" \r\n\ufeff'):
            lines.again()
            if found := _names_here(lines, delimiters, columns):
                if titles:
                    notes.repairs["line before the names of the columns"] += titles
                return found
            next(lines)
            first, titles = first or line, titles + 1
        lines.done()
    if first:
        notes.not_data = (
            f"{missing_columns(_widest(first, delimiters))}; if its first line is a row already, "
            "write a line with the names above it"
        )
    return [], {}


def _names_here(lines: _Lines, delimiters: str, columns: Mapping[str, str]) -> tuple[list[str], dict[str, Any]] | None:
    """(names, style) if the next record names our columns, with the lines moved behind it; else they stay."""
    styles: list[dict[str, Any]] = [{"delimiter": delimiter} for delimiter in delimiters]
    # "a", "b": the blank is of no field.
    styles += [{**style, "skipinitialspace": True} for style in styles if f'{style["delimiter"]} "' in lines.back[0]]
    for style in styles:
        try:
            names = [name.strip(" \t\r\n\ufeff") for name in next(csv.reader(lines, **style))]
        except csv.Error:
            names = []
        # Some programs write the names as a comment.
        for choice in (names, [name.lstrip("# ") for name in names[:1]] + names[1:]):
            if holds_rows(find_columns(choice, columns)):
                lines.done()
                return choice, style
        lines.again()
    return None


def _widest(line: str, delimiters: str) -> list[str]:
    """The fields of a line that names no column of ours, by the delimiter that gives the most of them."""
    fields = [line.strip().split(delimiter) for delimiter in delimiters]
    return [name.strip(' "\ufeff') for name in max(fields, key=len)]


def _records(lines: _Lines, names: list[str], style: dict[str, Any], notes: Notes) -> Iterator[Found]:
    reader = csv.reader(lines, strict=True, **style)
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Found(lines.only_first(), None, str(error))
            lines.cut = False
            reader = csv.reader(lines, strict=True, **style)
            continue
        line = lines.done()
        if lines.cut:
            lines.cut = False
            yield Found(line, None, f"a line longer than {LONGEST_LINE:,} characters")
        elif any(field.strip() for field in fields[len(names) :]):
            yield Found(line, None, f"{len(fields)} fields under {len(names)} column names")
        elif [field.strip(" \t\r\n\ufeff") for field in fields] == names:  # files that were put together
            notes.repairs["line with the names of the columns once more"] += 1
        elif any(fields):
            # A name may stand above two columns: as in other tables, the first one counts.
            yield Found(line, dict(reversed(list(zip(names, fields, strict=False)))))
