"""What became of every file and every row of a conversion.

file                     status    rows   valid   rejected
broken/quotes.json       repaired    10       9   1 broken
   line 7: expecting ',' delimiter (line 7)
3 more files             ok          90      90
                                    100      99   rows == valid + rejected, in every line and in the sum
"""

import json
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ARCHIVES = (".zip", ".gz", ".bz2", ".xz", ".zst", ".tar", ".tgz", ".7z", ".rar")
PROBLEMS_KEPT, PROBLEMS_SHOWN = 100, 3
"""Problems of one file that are kept with their line, and that are printed; all are counted."""


@dataclass(frozen=True)
class Problem:
    """One row that was rejected: the line it begins on (or its number), the reason, and more words on it."""

    line: int
    reason: str
    detail: str = ""
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.unit} {self.line}: {self.detail or self.reason}"


@dataclass
class FileReport:
    """What became of one file.

    Attributes:
        path: the file; below the zip's path for a file in a zip.
        status: "ok"; "repaired" (something had to be overlooked or mended, see `repairs`); "refused" (it cannot be
            read, see `message`); "empty"; "not_data" (readable, but it holds no rows of this kind).
        rows: rows found; rows == valid + sum of rejected.
        valid: rows written.
        rejected: reason -> rows.
        repairs: what was mended or overlooked -> times.
        problems: the first rejected rows with their lines.
        message: why a file was refused or is no data, or what could be done for more of its rows.
        unit: what the problems count: "line", or "row" where there are no lines.
    """

    path: Path
    status: str = "ok"
    rows: int = 0
    valid: int = 0
    rejected: Counter = field(default_factory=Counter)
    repairs: Counter = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    message: str = ""
    unit: str = "line"

    def reject(self, line: int, reason: str, detail: str = "") -> None:
        """Count one row as rejected."""
        self.rejected[reason] += 1
        if len(self.problems) < PROBLEMS_KEPT:
            self.problems.append(Problem(line, reason, detail, self.unit))


@dataclass
class Report:
    """What became of all files; `print` it for a table.

    Attributes:
        source: where the rows came from.
        output: the JSON Lines file that was written.
        options: the options of the conversion that were set.
        files: one FileReport for each file, in the order of reading.
        left_alone: names of files in the source that were not read: no data by their ending, archives inside the
            source, links to folders, and what an earlier conversion wrote.
        placeholders: inputs such as "No input" that became "".
        changes: what was done to texts and conversations that does not change what they say -> times.
        parts: the parts of a data set (train, test, validation) that the files' names tell of, if all were read.
        columns_unseen: names in the option `columns` that no row has: mostly a slip of the pen.
    """

    source: str
    output: Path
    options: dict[str, Any] = field(default_factory=dict)
    files: list[FileReport] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)
    placeholders: int = 0
    changes: Counter = field(default_factory=Counter)
    parts: list[str] = field(default_factory=list)
    columns_unseen: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows found in all files."""
        return sum(file.rows for file in self.files)

    @property
    def rows_valid(self) -> int:
        """Rows written: the number of lines of the output."""
        return sum(file.valid for file in self.files)

    @property
    def rejected(self) -> Counter:
        """Reason -> rows of all files."""
        return sum((file.rejected for file in self.files), Counter())

    def __str__(self) -> str:
        """The table; files that are simply ok share one line."""
        plain = [file for file in self.files if file.status == "ok" and not file.rejected]
        shown = [file for file in self.files if not (file.status == "ok" and not file.rejected)]
        if len(plain) <= 3:
            shown, plain = self.files, []
        width = max([28, *(_width(self.name_of(file)) for file in shown)])
        lines = [_row("file", "status", "rows", "valid", "rejected", width)]
        for file in shown:
            lines.append(_row(self.name_of(file), file.status, file.rows, file.valid, _counts(file.rejected), width))
            lines += _remarks(file)
        if plain:
            rows = sum(file.rows for file in plain)
            lines.append(_row(f"{len(plain)} {'more ' * bool(shown)}files", "ok", rows, rows, "", width))
        lines.append(_row("all", "", self.rows, self.rows_valid, _counts(self.rejected), width))
        if self.placeholders:
            lines.append(f"inputs that only said that there is none (无输入, No input ...): {self.placeholders:,}")
        if any(self.changes.values()):
            lines.append(f"changed on the way: {_counts(+self.changes)}")
        if self.columns_unseen:
            lines.append(
                f"columns names {', '.join(map(repr, self.columns_unseen))}, which no row has: is it spelled so?"
            )
        if len(self.parts) > 1:
            one = "train" if "train" in self.parts else self.parts[0]
            lines.append(
                f"rows of {' and '.join(self.parts)} stand together in the output; part={one!r} takes these only"
            )
        return "\n".join(lines + self.other_lines())

    def other_lines(self) -> list[str]:
        """About the files that were not read."""
        # Archives come first: there may be rows in them.
        names = sorted(map(printable, self.left_alone), key=lambda name: (not name.lower().endswith(ARCHIVES), name))
        lines = [f"left alone: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")]
        if names and names[0].lower().endswith(ARCHIVES):
            lines.append("   unpack what is packed inside the source, if there are rows in it")
        return lines if names else []

    def save(self, folder: Path) -> None:
        """Write the report as JSON into `folder`, under its name beside the output."""
        values = asdict(self) | {"source": self.source, "output": self.output.name}
        values["changes"] = +self.changes
        values["rows"], values["rows_valid"], values["rejected"] = self.rows, self.rows_valid, self.rejected
        for file, saved in zip(self.files, values["files"], strict=True):
            saved |= {"path": self.name_of(file), "rejected": file.rejected, "repairs": file.repairs}
        text = json.dumps(values, ensure_ascii=False, indent=1)
        (folder / report_path(self.output).name).write_text(text, "utf-8", errors="backslashreplace")

    def name_of(self, file: FileReport) -> str:
        """A file's path below the source, in characters that can be printed."""
        try:
            name = file.path.relative_to(self.source).as_posix() if file.path != Path(self.source) else file.path.name
        except ValueError:
            name = str(file.path)
        return printable(name)


def report_path(output: Path) -> Path:
    """Where the report of a conversion to `output` is saved."""
    return output.with_suffix(".report.json")


def printable(name: str) -> str:
    """A file's name with escapes in place of bytes that are no UTF-8, as in archives packed on other systems."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _remarks(file: FileReport) -> list[str]:
    remarks = [file.message] if file.message else []
    remarks += [f"mended: {_counts(file.repairs)}"] if file.repairs and file.status == "repaired" else []
    remarks += map(str, file.problems[:PROBLEMS_SHOWN])
    if (more := sum(file.rejected.values()) - PROBLEMS_SHOWN) > 0 and file.problems:
        remarks.append(f"... and {more:,} more")
    return [f"   {remark}" for remark in remarks]


def _counts(counter: Counter) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counter.most_common())


def _row(name: str, status: str, rows: Any, valid: Any, rejected: str, width: int) -> str:
    numbers = [f"{value:,}" if isinstance(value, int) else value for value in (rows, valid)]
    line = f"{name}{' ' * (width - _width(name))}  {status:<8} {numbers[0]:>9} {numbers[1]:>9}  {rejected}"
    return line.rstrip()


def _width(text: str) -> int:
    # Chinese characters take two columns of a terminal.
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
