"""One search for what somebody put on a cloud: the project, the weights, an adapter.

    Kaggle 2026    /kaggle/input/datasets/<owner>/<slug>   /kaggle/input/notebooks/<owner>/<slug>
                   /kaggle/input/models/<owner>/<model>/<framework>/<variation>/<version>
    Kaggle before  /kaggle/input/<slug>
    both           /kaggle/working   /kaggle/temp
    Colab          /content   /content/drive/MyDrive (mounted by its user)

    level 0   working  temp  input            looked into first: the folders with few others beside them and beside
    level 1   course   x     datasets  ...    those above them, level by level; so no data set of a million folders
    level 2   ...            owner     ...    can hide what lies next to it. Named first: what lies nearest

How deep something lies is not limited; the number of folders and the seconds are. Needs the standard library only.
"""

import heapq
import os
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path("/")
"""Below it lie kaggle/ and content/. Tests put a tree of their own here."""

TOPS = ("kaggle/working", "kaggle/temp", "content", "content/drive/MyDrive", "kaggle/input")
MAX_FOLDERS = 20_000
MAX_SECONDS = 15.0


def expanded(path: str | Path) -> Path:
    """`path` with ~ and ~user written out, as a shell would; a name that only begins with ~ stays what it is.

    Raises:
        TypeError: it is no path.
        ValueError: it is empty, which would mean the folder one happens to be in; or no file system knows such names.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{path!r} is a {type(path).__name__}: expected the path of a file or folder")
    if path == "":
        raise ValueError("the path is empty: name a file or folder; '.' is the folder that you are in")
    try:
        named = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        named = False
    if not named:
        raise ValueError(f"{str(path)!r} is no path: there is a character in it that no file's name can have")
    return Path(os.path.expanduser(path))


def user_cache() -> Path:
    """Where this package keeps what it has measured: a folder in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "glmhelpers"


def cloud_tops(root: Path | None = None) -> list[Path]:
    """The folders of Kaggle and Colab that are here, the session's own before what was attached.

    Args:
        root: the folder in which `kaggle` and `content` lie; ROOT if None.
    """
    # Unlike is_dir, this raises nothing where a mount is broken: Drive's, when its session has ended.
    return [folder for top in TOPS if os.path.isdir(folder := (root or ROOT) / top)]


def find_folders(
    marker: str, tops: Iterable[Path], max_folders: int = MAX_FOLDERS, max_seconds: float = MAX_SECONDS
) -> list[Path]:
    """All folders in which the file `marker` lies, those with the fewest levels below their top first.

    Prints a [NOTE] if it had to stop before everything was looked at. Folders that cannot be read, hidden ones and
    links that lead back are left out.

    Args:
        marker: a file's name, or a path below the folder, such as "glmhelpers/runtime.py".
        tops: where to begin; equally near folders come in this order, then by name.
        max_folders: so many folders are looked into at most.
        max_seconds: wall-clock time after which no further entry is read.
    """
    end, tops = time.monotonic() + max_seconds, [Path(top) for top in tops]
    found: list[tuple[int, int, Path]] = []
    seen: set[tuple[int, int]] = set()
    queue = [(0, 0, number, top) for number, top in enumerate(tops)]  # digits of the widest above, level, top, folder
    while queue:
        width, level, number, folder = heapq.heappop(queue)
        if len(seen) >= max_folders or time.monotonic() > end:
            where = ", ".join(map(str, tops))
            print(f"[NOTE] stopped looking for {marker} below {where} after {len(seen)} folders: give its folder")
            break
        try:
            facts = folder.stat()
            if (facts.st_dev, facts.st_ino) in seen:
                continue
            seen.add((facts.st_dev, facts.st_ino))
            if (folder / marker).is_file():
                found.append((level, number, folder))
            inside = _folders_in(folder, end)
        except OSError:
            continue
        width = max(width, len(str(len(inside))))
        for path in inside:
            # A mounted Drive lies in /content and is slow: it is a top of its own.
            if not any(top.is_relative_to(path) for top in tops):
                heapq.heappush(queue, (width, level + 1, number, path))
    return [folder for *_, folder in sorted(found)]


def _folders_in(folder: Path, end: float) -> list[Path]:
    inside = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if time.monotonic() > end:
                break
            if not entry.name.startswith(".") and entry.is_dir():
                inside.append(folder / entry.name)
    return inside
