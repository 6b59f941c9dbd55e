"""The files that rows are read from: one file, a folder with all below it, or what is in a zip.

folder/                        -> history/zh/a.json     read
  history/zh/a.json               data/b.csv.gz         read, unpacked on the way
  data/b.csv.gz                   README.md             left alone, but named in the report
  README.md                       inner.zip             left alone, but named in the report
  inner.zip                       train.jsonl           left alone, but named: an earlier conversion wrote it
  train.jsonl                     .git/...              not looked at
  train.report.json
  .git/...

A folder of `save_to_disk` holds .arrow files, and settings that are no rows; one of the hub a train and a test part.
"""

import bz2
import gzip
import io
import lzma
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NoReturn

from glmhelpers.utils.files import read_json

PACKED: dict[bytes, tuple[str, Callable[..., Any]]] = {
    b"\x1f\x8b": (".gz", gzip.open),
    b"BZh": (".bz2", bz2.open),
    b"\xfd7zXZ\x00": (".xz", lzma.open),
}
"""First bytes of a packed file -> the ending of its name, and what unpacks it."""
ARCHIVES = {b"PK\x03\x04": "zip", b"7z\xbc\xaf": "7z", b"Rar!": "rar", b"\x28\xb5\x2f\xfd": "zstd"}
ARCHIVES |= {b"\x04\x22\x4d\x18": "lz4", b"\x1f\x9d": "compress", b"\xff\x06\0\0sN": "snappy", b"\x5d\0\0": "lzma"}
"""First bytes of what is not unpacked here -> its name."""
MOST_UNPACKED, LIKELY_RATIO = 2**28, 200
"""A packed file may unpack to so many bytes, and a larger one to so many times its size: text does to 3 to 20 times."""
PACKED_ENDINGS = tuple(ending for ending, _ in PACKED.values())
FORMATS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
ENDINGS = FORMATS + tuple(ending + packed for ending in FORMATS for packed in PACKED_ENDINGS)
"""Of the files that are read in a folder or a zip. A single file is read whatever its name."""

PARTS = {"test": "test", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}
PARTS |= {"eval": "validation", "train": "train", "training": "train"}
"""First word of a file's or a folder's name -> the part of a data set that it holds."""
_DATASET_FACTS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json"}

SourceFile = tuple[Path, Callable[[], AbstractContextManager[BinaryIO]]]
"""A file to read: where it is, and how to open it for reading bytes."""


@contextmanager
def open_source(source: Path) -> Iterator[tuple[list[SourceFile], list[str]]]:
    """The files of a source in sorted order, and the names of those that are left alone: no data by their names, or
    what an earlier conversion wrote.

    Args:
        source: a file, a folder (all folders below it too) or a zip.

    Raises:
        FileNotFoundError: there is nothing at `source`.
        OSError: it is no file, but a pipe or a device.
        ValueError: it starts like a zip but cannot be read as one.
    """
    if not source.exists():
        what = "a link that leads to nothing" if source.is_symlink() else "no such file or folder"
        raise FileNotFoundError(f"{source}: {what}; rows cannot be read from it")
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
        yield [(source, partial(_open, source))], []


def _in_folder(folder: Path) -> tuple[list[SourceFile], list[str]]:
    files, others = [], []
    closed: list[SourceFile] = []

    # Without onerror, a folder that cannot be listed would be passed over in silence.
    def note(error: OSError) -> None:
        closed.append((Path(error.filename), partial(_fail, error)))

    for here, folders, names in os.walk(folder, onerror=note):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        # os.walk does not follow links to folders, which could lead round in a circle.
        names += [name for name in folders if Path(here, name).is_symlink()]
        own = _own_files(Path(here), names)
        for name in names:
            path = Path(here, name)
            if _is_hidden(name):
                continue
            # What lies here packed and unpacked is read once.
            twice = plain_name(name) != name and plain_name(name) in names
            if name.lower().endswith(ENDINGS) and name not in own and not twice and not path.is_dir():
                files.append(path)
            else:
                others.append(path.relative_to(folder).as_posix())
    ordered = sorted(files, key=lambda path: path.relative_to(folder).as_posix())
    return [(path, partial(_open, path)) for path in ordered] + closed, sorted(others)


def _own_files(folder: Path, names: list[str]) -> set[str]:
    """Those of the names that are no data of the user: outputs of this package with their reports, token files with
    theirs, and what the datasets library writes beside its rows."""
    own = _DATASET_FACTS.intersection(names)
    for name in names:
        if name.endswith(".json") and f"{name[:-5]}.arrow" in names:
            own |= {name, f"{name[:-5]}.arrow"}
    if "state.json" in names and "dataset_info.json" in names:
        listed = _listed(folder / "state.json")
        own |= {"state.json", *(name for name in names if name.endswith(".arrow") and name not in listed)}
    for name in names:
        output = written_by_report(folder / name) if name.endswith(".report.json") else None
        own |= {name, output} if output else set()
    return own


def _listed(state: Path) -> set[str]:
    """The files of rows that a folder of `save_to_disk` names; what else lies there are results of its `map`."""
    try:
        return {file["filename"] for file in read_json(state)["_data_files"]}
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def parts_of(names: Iterable[str]) -> dict[str, str]:
    """File (path below the source) -> "train", "test" or "validation", for those whose name or folder says so."""
    found = {}
    for name in names:
        words = [re.match(r"[a-z]*", part.lower()) for part in PurePosixPath(name).parts]
        said = [PARTS[word[0]] for word in words if word and word[0] in PARTS]
        if said:
            found[name] = said[-1]
    return found


def plain_name(name: str) -> str:
    """A file's name without the ending that only says how it is packed."""
    stem, ending = os.path.splitext(name)
    return stem if ending.lower() in PACKED_ENDINGS else name


def _fail(error: OSError) -> NoReturn:
    raise error


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked.

    Raises:
        OSError: it is none: to open a pipe would wait for ever, and a device may have no end.
        ValueError: see `_unpacked`.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        raise OSError(f"it is {kinds.get(stat.S_IFMT(mode), 'a device')}; write what it gives into a file first")
    with open(path, "rb") as file, _unpacked(file, os.fstat(file.fileno()).st_size) as opened:
        yield opened


@contextmanager
def _open_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[BinaryIO]:
    size = member.compress_size
    with archive.open(member) as file, _bounded(file, size) as bounded, _unpacked(bounded, size) as opened:
        yield opened


class _Bounded(io.RawIOBase):
    """What comes out of a packed file, until it is more than any file of rows would be."""

    def __init__(self, file: Any, most: int) -> None:
        self.file, self.most = file, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(len(buffer))
        if self.file.tell() > self.most:
            raise ValueError(
                f"it unpacks to more than {self.most:,} bytes, over {LIKELY_RATIO} times its size, as no rows do: it "
                "may be made to fill memory or disk. If you know what it is, unpack it yourself, and give that"
            )
        buffer[: len(data)] = data
        return len(data)

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()


def _bounded(file: Any, size: int) -> io.BufferedReader:
    return io.BufferedReader(_Bounded(file, max(MOST_UNPACKED, LIKELY_RATIO * size)))


def _unpacked(file: Any, size: int) -> Any:
    """What is in a packed file of so many bytes, or the file itself if it is not packed.

    Raises:
        ValueError: it is an archive that is not unpacked here, or packed twice (there are files that hold themselves).
    """
    if (unpack := _unpacker(file)) is None:
        return file
    inner = unpack(file)
    if _unpacker(inner):
        raise ValueError("it is packed twice: unpack it once, and give that")
    return _bounded(inner, size)


def _unpacker(file: Any) -> Callable[..., Any] | None:
    head = file.read(512)
    file.seek(0)
    name = next((name for start, name in ARCHIVES.items() if head.startswith(start)), "")
    if name or head[257:262] == b"ustar":
        raise ValueError(f"it is packed ({name or 'tar'}): unpack it into a folder, and give that")
    return next((unpack for start, (_, unpack) in PACKED.items() if head.startswith(start)), None)


def written_by_report(path: Path) -> str | None:
    """The name of the output that a report file stands beside; None if it is no report of this package."""
    try:
        report = read_json(path)
    except (OSError, ValueError):
        return None
    is_ours = isinstance(report, dict) and {"output", "rows", "rows_valid", "files"} <= report.keys()
    return report["output"] if is_ours and isinstance(report["output"], str) else None


def _in_zip(source: Path, archive: zipfile.ZipFile) -> tuple[list[SourceFile], list[str]]:
    files: list[SourceFile] = []
    others = []
    for member in sorted(archive.infolist(), key=lambda member: member.filename):
        if member.filename.endswith("/") or any(_is_hidden(part) for part in Path(member.filename).parts):
            continue
        if member.filename.lower().endswith(ENDINGS):
            files.append((source / member.filename, partial(_open_member, archive, member)))
        else:
            others.append(member.filename or "a file without a name")
    return files, others


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _starts_like_zip(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
