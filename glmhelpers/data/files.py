"""The files that rows are read from: one file, a folder with all below it, or what is in a zip.

folder/                        -> history/zh/a.json     read
  history/zh/a.json               data/b.csv            read
  data/b.csv                      README.md             left alone, but named in the report
  README.md                       inner.zip             left alone, but named in the report
  inner.zip                       train.jsonl           left alone, but named: an earlier conversion wrote it
  train.jsonl                     .git/...              not looked at
  train.report.json
  .git/...
"""

import json
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
"""Of the files that are read in a folder or a zip. A single file is read whatever its name."""


SourceFile = tuple[Path, Callable[[], Any]]
"""A file to read: where it is, and how to open it for reading bytes."""


@contextmanager
def open_source(source: Path) -> Iterator[tuple[list[SourceFile], list[str]]]:
    """The files of a source in sorted order, and the names of those that are left alone: no data by their names, or
    what an earlier conversion wrote.

    Args:
        source: a file, a folder (all folders below it too) or a zip.

    Raises:
        FileNotFoundError: there is nothing at `source`.
        ValueError: it starts like a zip but cannot be read as one.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder to read rows from")
    if source.is_dir():
        yield _in_folder(source)
    elif _starts_like_zip(source):
        try:
            archive = zipfile.ZipFile(source)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
            raise ValueError(f"{source} starts like a zip, but cannot be read as one: {error}") from error
        with archive:
            yield _in_zip(source, archive)
    else:
        yield [(source, partial(source.open, "rb"))], []


def _in_folder(folder: Path) -> tuple[list[SourceFile], list[str]]:
    def stop(error: OSError) -> None:
        raise error

    files, others = [], []
    # Without onerror, a folder that cannot be listed would be passed over in silence.
    for here, folders, names in os.walk(folder, onerror=stop):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        # os.walk does not follow links to folders, which could lead round in a circle.
        names += [name for name in folders if Path(here, name).is_symlink()]
        own = _own_files(Path(here), names)
        for name in names:
            path = Path(here, name)
            if _is_hidden(name):
                continue
            if name.lower().endswith(ENDINGS) and name not in own and not path.is_dir():
                files.append(path)
            else:
                others.append(path.relative_to(folder).as_posix())
    ordered = sorted(files, key=lambda path: path.relative_to(folder).as_posix())
    return [(path, partial(path.open, "rb")) for path in ordered], sorted(others)


def _own_files(folder: Path, names: list[str]) -> set[str]:
    """Those of the names that this package wrote: outputs with their reports, and the reports beside token files."""
    own = {name for name in names if name.endswith(".json") and f"{name[:-5]}.arrow" in names}
    for name in names:
        output = written_by_report(folder / name) if name.endswith(".report.json") else None
        own |= {name, output} if output else set()
    return own


def written_by_report(path: Path) -> str | None:
    """The name of the output that a report file stands beside; None if it is no report of this package."""
    try:
        report = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_ours = isinstance(report, dict) and {"output", "rows", "rows_valid", "files"} <= report.keys()
    return report["output"] if is_ours and isinstance(report["output"], str) else None


def _in_zip(source: Path, archive: zipfile.ZipFile) -> tuple[list[SourceFile], list[str]]:
    files: list[SourceFile] = []
    others = []
    for member in sorted(archive.infolist(), key=lambda member: member.filename):
        if member.is_dir() or any(_is_hidden(part) for part in Path(member.filename).parts):
            continue
        if member.filename.lower().endswith(ENDINGS):
            files.append((source / member.filename, partial(archive.open, member)))
        else:
            others.append(member.filename)
    return files, others


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _starts_like_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
