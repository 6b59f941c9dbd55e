"""From any Alpaca-like files to one JSON Lines file, with no row lost silently.

    files ──► readers ──► clean_row ─────► unfinished file ──► which rows go out again? ──► train.jsonl
               |               |               (all valid rows)     duplicates                   train.report.json
               v               v                                    |
            broken rows     no output, ...                          v
            └──────────────── counted in the report ────────────────┘

Rows stream through, those that are clean as they are in runs. Where a decision is asked for that needs all rows, eight
bytes of each are remembered: a hash. The output gets its name when everything is done; until then an older output stays
as it was.
"""

import codecs
import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from glmhelpers.data.chats import GREETING, UNANSWERED
from glmhelpers.data.cleaning import (
    ENCODING_HINT,
    NUMBER,
    PLACEHOLDER,
    UNDECODABLE,
    Refused,
    check_columns,
    clean_as_they_are,
    clean_row,
    find_columns,
    is_untranslated,
    layout_hint,
    missing_columns,
)
from glmhelpers.data.dedupe import repeated
from glmhelpers.data.files import ENDINGS, FORMATS, SourceFile, open_source, parts_of, plain_name, written_by_report
from glmhelpers.data.json_recovery import Found, Notes, Twice
from glmhelpers.data.readers import numbered, read_rows
from glmhelpers.data.report import FileReport, Report, report_path
from glmhelpers.tokens.prompts import with_input
from glmhelpers.tokens.texts import AROUND, LINE_END
from glmhelpers.utils.files import whole_file, whole_files
from glmhelpers.utils.folders import expanded

ROWS_SOURCE = "rows"
RUN = 2**17
"""Characters after which a run of rows is written."""
QUIET = (AROUND, LINE_END, NUMBER, GREETING, UNANSWERED)
"""Changes that are counted, but make no file "repaired"."""
# Everything that str.splitlines takes for the end of a line: a line of the output is one for every reader.
_LINE_ENDS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_to_json = json.JSONEncoder(ensure_ascii=False).encode
_quoted = json.encoder.encode_basestring


class _Unreadable(Exception):
    """A file cannot be read to its end, for whatever reason: files are other people's, and so are their readers."""


@dataclass
class _Kept:
    """What is remembered of one file's valid rows."""

    report: FileReport
    written: int = 0
    hashes: array = field(default_factory=lambda: array("Q"))
    """Of each row, if asked for; as is the next."""
    untranslated: bytearray = field(default_factory=bytearray)
    out: np.ndarray | None = None
    """Which of the rows go out again, one bool for each; None for none of them."""

    def gone(self) -> np.ndarray:
        """Which rows are out, one bool for each."""
        return np.zeros(self.written, bool) if self.out is None else self.out

    def leave_out(self, reason: str, rows: np.ndarray) -> None:
        """Move rows that are still in from valid to rejected."""
        new = rows & ~self.gone()
        if count := int(new.sum()):
            self.report.valid -= count
            self.report.rejected[reason] += count
            self.out = self.gone() | new


def convert_alpaca(
    source: str | Path | Iterable[Mapping[str, Any]],
    output: str | Path,
    *,
    dedupe: bool = False,
    drop_untranslated: bool = False,
    max_prompt_chars: int | None = None,
    max_answer_chars: int | None = None,
    columns: Mapping[str, str] | None = None,
    encoding: str | None = None,
    part: str | None = None,
) -> Report:
    """Write all valid rows of a source as JSON Lines, and a report beside it.

    Args:
        source: a file, a folder (with all folders below it) or a zip of JSON, JSON Lines, CSV, parquet or Arrow files,
            each of them maybe packed by gzip, bzip2 or xz; or an iterable of dicts.
        output: the file to write. Each line has `instruction`, `input`, `output` and, where a row has them, `history`
            ([[question, answer], ...]) and `system`.
        dedupe: of equal rows only the first is kept.
        drop_untranslated: rows without one Chinese character are left out of files whose rows are mostly Chinese.
        max_prompt_chars: most characters of instruction and input together.
        max_answer_chars: most characters of the output.
        columns: a name in the files -> the name here, as in {"question": "instruction", "answer": "output"}.
        encoding: of text files, such as "gb18030"; by default UTF-8, or what a byte order mark says.
        part: "train", "test" or "validation": of a source whose files or folders are named so, this part only; the
            other files are left alone. By default all of them, with a remark in the report.

    A row is a question and an answer, or a conversation in one of the formats of `glmhelpers.data.chats`.

    Returns:
        The report: `rows_valid` (lines written), `files`, `rejected`. It is saved as `<output>.report.json`.

    Raises:
        FileNotFoundError: the source is not there.
        FileExistsError: the output is a file that would have to be read: it must not be written over.
        IsADirectoryError: the output is a folder.
        LookupError: Python knows no such encoding.
        TypeError: the source is a dict, a table of another library, or neither path nor rows.
        ValueError: not one row is valid, and the message names each file and why; `columns` names no column of ours; or
            the source has no such part.

    Where one file holds the rows of others (a full file beside its parts), `dedupe` keeps each row once.
    """
    output = expanded(output)
    source = expanded(source) if isinstance(source, str | Path) else source
    check_columns(columns or {})
    for name, limit in (("max_prompt_chars", max_prompt_chars), ("max_answer_chars", max_answer_chars)):
        if limit is not None and not (isinstance(limit, int) and limit > 0):
            raise ValueError(f"{name} is {limit!r}; a whole number from 1 on, or None for no limit")
    limits = {"prompt longer than": max_prompt_chars, "answer longer than": max_answer_chars}
    if encoding is not None:
        codecs.lookup(encoding)
    options = {"dedupe": dedupe, "drop untranslated": drop_untranslated, "columns": columns, "encoding": encoding}
    options["part"] = part
    name = str(source) if isinstance(source, str | Path) else ROWS_SOURCE
    report = Report(name, output, {option: value for option, value in (options | limits).items() if value})
    writer = _Writer(report, options, limits)
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder; name the file to write, such as {output / 'train.jsonl'}")
    # Output and report take their places together; the check comes when nobody else is writing them.
    with whole_files(output.parent, output.name) as draft:
        _check_output(source, output)
        unfinished = draft / output.name
        with open(unfinished, "wb") as file:
            writer.write_all(source, file)
        _choose(writer.kept, dedupe, drop_untranslated)
        if not report.rows_valid:
            raise ValueError(f"no valid row in {report.source}: nothing was written\n{report}")
        if any(kept.out is not None for kept in writer.kept):
            _rewrite(unfinished, writer.kept)
        report.save(draft)
    return report


def _check_output(source: Any, output: Path) -> None:
    """Whether the output can be written without a loss of somebody's rows."""
    if not (isinstance(source, str | Path) and output.exists()):
        return
    folder, place = Path(os.path.realpath(source)), Path(os.path.realpath(output))
    if place == folder:
        raise FileExistsError(f"{output} is the source itself, with rows that may be refused; write to another file")
    if folder in place.parents and written_by_report(report_path(output)) != output.name:
        raise FileExistsError(
            f"{output} lies in the source, and no report beside it says that convert_alpaca wrote it: "
            "it may hold rows of yours. Write to another file, or take it away first"
        )


class _Writer:
    """Reads, cleans and writes; one file after the other."""

    def __init__(self, report: Report, options: Mapping[str, Any], limits: dict[str, int | None]) -> None:
        self.report, self.limits = report, limits
        self.columns, self.encoding, self.part = options["columns"] or {}, options["encoding"], options["part"] or None
        self.dedupe, self.drop_untranslated = options["dedupe"], options["drop untranslated"]
        self.has_limits = any(limit is not None for limit in limits.values())
        self.kept: list[_Kept] = []
        self.report.columns_unseen = list(self.columns)
        self.find_columns = lru_cache(256)(self._find_columns)  # the rows of a file mostly have the same keys

    def write_all(self, source: Any, file: BinaryIO) -> None:
        if not isinstance(source, str | Path):
            self._write_rows(Path(ROWS_SOURCE), numbered(source), Notes(unit="row"), file)
            return
        source = Path(source)
        with open_source(source) as (files, self.report.left_alone):
            for path, open_file in self._of_part(source, files):
                notes = Notes()
                self._write_rows(path, self._rows(path, open_file, notes), notes, file)

    def _find_columns(self, names: tuple) -> dict[str, str]:
        self.report.columns_unseen = [name for name in self.report.columns_unseen if name not in names]
        return find_columns(names, self.columns)

    def _of_part(self, source: Path, files: list[SourceFile]) -> list[SourceFile]:
        """The files to read, of the part of the data set that is wanted."""
        if not files:
            lines = [f"{source} holds no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"]
            raise ValueError("\n".join(lines + self.report.other_lines()))
        below = {path: self.report.name_of(FileReport(path)) for path, _ in files}
        parts = parts_of(below.values())
        if self.part is None:
            self.report.parts = sorted(set(parts.values()))
            return files
        wanted = [each for each in files if parts.get(below[each[0]]) == self.part]
        if not wanted:
            named = ", ".join(sorted(set(parts.values()))) or "none of train, test and validation"
            raise ValueError(f"{source} has no part {self.part!r}; the names of its files and folders say: {named}")
        self.report.left_alone += [name for name in below.values() if parts.get(name) != self.part]
        return wanted

    def _rows(
        self, path: Path, open_file: Callable[[], AbstractContextManager[BinaryIO]], notes: Notes
    ) -> Iterator[Found]:
        try:
            with open_file() as opened:
                yield from read_rows(opened, plain_name(path.name), notes, self.columns, self.encoding)
        except Exception as error:
            raise _Unreadable(str(error) or type(error).__name__) from error

    def _write_rows(self, path: Path, rows: Iterable[Found], notes: Notes, file: BinaryIO) -> None:
        kept = _Kept(FileReport(path))
        self.kept.append(kept)
        self.report.files.append(kept.report)
        seen: Counter[str] = Counter()
        try:
            for run in _runs(rows):
                self._write_run(run, kept, notes, seen, file)
        except _Unreadable as error:
            # What was read until here may be half of the file: all of it goes out again.
            kept.report.message = f"cannot be read: {error}"
            kept.leave_out("file cannot be read to its end", np.ones(kept.written, bool))
        self.report.placeholders += seen.pop(PLACEHOLDER, 0)
        self.report.changes += {change: seen.pop(change, 0) for change in QUIET}
        _finish(kept.report, notes, seen)

    def _write_run(self, run: list[Found], kept: _Kept, notes: Notes, seen: Counter, file: BinaryIO) -> None:
        """Write rows of `_runs`: those between two that are not clean as they are, at once."""
        report = kept.report
        report.unit = notes.unit
        rows: list[dict[str, str] | None] = [None] * len(run)
        if len(run) > 1 and not self.has_limits:
            rows = clean_as_they_are([found.value for found in run], self.find_columns(tuple(run[0].value)))
        for is_clean, some in groupby(zip(run, rows, strict=True), lambda pair: pair[1] is not None):
            if is_clean:
                clean = [row for _, row in some if row]
                report.rows += len(clean)
                seen["with our columns"] += len(clean)
                self._write_clean(clean, kept, file)
            else:
                for found, _ in some:
                    self._write_row(found, kept, notes, seen, file)

    def _write_row(self, found: Found, kept: _Kept, notes: Notes, seen: Counter, file: BinaryIO) -> None:
        report = kept.report
        report.rows += 1
        if found.broken:
            report.reject(found.line, "broken", found.broken)
            return
        if not isinstance(found.value, Mapping):
            report.reject(found.line, "not an object", f"not an object with names, but {type(found.value).__name__}")
            return
        seen["name that stands twice in a row, the last one counts"] += isinstance(found.value, Twice)
        names = self.find_columns(tuple(found.value))
        seen["with our columns"] += bool(names)
        if not names and not notes.foreign:
            notes.foreign = missing_columns(list(found.value))
        if report.rows == notes.top_level == 1:
            notes.hint = layout_hint(found.value, names)
        try:
            row = clean_row(found.value, names, seen)
            self._check_limits(row)
        except Refused as reason:
            report.reject(found.line, str(reason), reason.detail)
            return
        self._write_clean([row], kept, file)

    def _write_clean(self, rows: list[dict[str, Any]], kept: _Kept, file: BinaryIO) -> None:
        lines = "\n".join(map(_line, rows))
        for character, escape in _LINE_ENDS.items():
            if character in lines:
                lines = lines.replace(character, escape)
        written = lines.encode()
        if self.dedupe:
            hashes = (hashlib.blake2b(line, digest_size=8).digest() for line in written.split(b"\n"))
            kept.hashes.extend(int.from_bytes(each, "little") for each in hashes)
        if self.drop_untranslated:
            kept.untranslated.extend(map(is_untranslated, rows))
        kept.report.valid += len(rows)
        kept.written += len(rows)
        file.write(written + b"\n")

    def _check_limits(self, row: dict[str, Any]) -> None:
        if not self.has_limits:
            return
        texts = with_input(row["instruction"], row["input"]), row["output"]
        for (name, limit), text in zip(self.limits.items(), texts, strict=True):
            if limit is not None and len(text) > limit:
                raise Refused(f"{name} {limit} characters")


def _line(row: dict[str, Any]) -> str:
    """The row as `json.dumps` would write it; an encoder for any object takes twice as long as these few texts need."""
    question, about, answer = map(_quoted, (row["instruction"], row["input"], row["output"]))
    rest = ""
    if len(row) > 3:
        rest = "".join(f', "{name}": {_to_json(row[name])}' for name in ("history", "system") if name in row)
    return f'{{"instruction": {question}, "input": {about}, "output": {answer}{rest}}}'


def _runs(rows: Iterable[Found]) -> Iterator[list[Found]]:
    """Rows in runs: of one run all have the same names, and nothing but texts. Any other row is a run by itself."""
    run: list[Found] = []
    names: tuple = ()
    held, failure = 0, None
    try:
        for found in rows:
            value = found.value
            texts = value.values() if type(value) is dict else ()
            plain = {*map(type, texts)} == {str}
            if run and not (plain and held < RUN and tuple(value) == names):
                yield run
                run, held = [], 0
            if plain:
                run.append(found)
                names, held = tuple(value), held + sum(map(len, texts))
            else:
                yield [found]
    except _Unreadable as error:
        failure = error
    if run:
        yield run
    if failure:
        raise failure


def _finish(report: FileReport, notes: Notes, seen: Counter) -> None:
    """Decide on the status of a file that has been read."""
    known, foreign = seen.pop("with our columns", 0), report.rejected[UNDECODABLE]
    broken = report.rejected["broken"] + foreign
    report.repairs = notes.repairs + seen
    is_one_object = report.rows == notes.top_level == 1
    if report.message:
        report.status = "refused"
    elif notes.not_data:
        report.status, report.message = "not_data", notes.not_data
    elif not report.rows:
        report.status = "empty"
    elif broken == report.rows:
        hint = f"; {ENCODING_HINT}" if foreign else ""
        if not report.path.name.lower().endswith(ENDINGS):
            hint = "; it was read as JSON, since its name does not end in .csv or .tsv"
        report.status, report.message = "refused", f"no row of it can be read{hint}"
    elif not known and not broken:
        report.status = "not_data"
        report.message = "; ".join(filter(None, (notes.foreign, notes.hint if is_one_object else "")))
        report.message = report.message or "nothing in it has an instruction or an output"
        if is_one_object:
            # One object or value that is no row is a settings file, not a file with one bad row.
            report.rows, report.rejected, report.problems = 0, Counter(), []
    elif is_one_object and notes.hint and not report.valid:
        report.status, report.message = "refused", notes.hint
    elif broken or report.repairs:
        report.status, report.message = "repaired", ENCODING_HINT if foreign else ""


def _choose(files: list[_Kept], dedupe: bool, drop_untranslated: bool) -> None:
    """Decide which written rows go out again, and move them from valid to rejected."""
    for kept in files if drop_untranslated else ():
        latin = np.frombuffer(bytes(kept.untranslated), dtype=bool)
        if latin.any() and latin.mean() < 0.5:
            kept.leave_out("untranslated", latin)
    if dedupe:
        hashes = [np.frombuffer(kept.hashes.tobytes(), dtype=np.uint64) for kept in files]
        for kept, rows in zip(files, repeated(hashes, [kept.gone() for kept in files]), strict=True):
            kept.leave_out("duplicate", rows)


def _rewrite(path: Path, files: list[_Kept]) -> None:
    """Leave the chosen rows out of a written file."""
    gone = np.concatenate([kept.gone() for kept in files])
    with open(path, "rb") as old, whole_file(path) as shorter, open(shorter, "wb") as new:
        for line, is_gone in zip(old, gone, strict=True):
            if not is_gone:
                new.write(line)
