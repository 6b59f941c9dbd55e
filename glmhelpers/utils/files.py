"""Files appear whole or not at all, one or several, whoever else writes at the same time.

whole_file(path)             .NAME.HOST.PID.xx.tmp    written here, then renamed; an error leaves NAME as it was

whole_folder(folder)         .NAME.HOST.PID.xx.draft/ the same for a folder that is new

whole_files(folder, key)     .KEY.HOST.PID.xx.draft/  written here
                             .KEY.next/              renamed in one go: from here on the new files are the files
                             NAME, NAME, ...         moved to their places one by one; a move that was cut off is
                                                     finished by whoever comes next (`finish`, `current`)

Only files of the names that were written are replaced. Whatever else lies in the folder stays, and a folder that is a
link or a mount point is one like any other. Leftovers of dead processes are cleared by the next call.
"""

import errno
import getpass
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from glmhelpers.utils.units import file_size


def make_writable(folder: Path, advice: str) -> None:
    """Create `folder` and try to write there.

    Raises:
        OSError: of the kind that the system gave, with advice.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, f"{folder} cannot be written ({error.strerror}){advice}") from error


def need_disk(folder: Path, need: int, what: str, advice: str) -> None:
    """Refuse with errno ENOSPC if fewer than `need` bytes are free in `folder`; `what` says what they are for."""
    free = shutil.disk_usage(folder).free
    if free < need:
        text = f"{file_size(need)} are needed in {folder}{what}, {file_size(free)} are free{advice}"
        raise OSError(errno.ENOSPC, text)


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """For a file or folder that torch or safetensors write: if the disk is full, they have strange words for it.

    Raises:
        OSError: errno ENOSPC; what had been written of `path` is gone, so that there is room again.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not full and not re.search("os error 28|No space left|writing file|iostream error", str(error)):
            raise
        free = file_size(shutil.disk_usage(path.parent).free)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        text = f"the disk is full: {path} could not be written ({free} were free). Make room, then do it again"
        raise OSError(errno.ENOSPC, text) from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, and renames it to `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path.parent, "", ".tmp")
    unfinished = _draft(path.parent, path.name, ".tmp")
    try:
        unfinished.touch()
        mode = _mode(unfinished)
        yield unfinished
        unfinished.chmod(mode)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or nested deeper than Python can follow.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("brackets in brackets without end") from None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Gives a draft folder beside `folder`, and renames it to `folder` when the block ends without an error.

    Raises:
        OSError: `folder` came into being meanwhile, and is not empty.
    """
    clear_leftovers(folder.parent, folder.name, ".draft")
    draft = _draft(folder.parent, folder.name, ".draft")
    draft.mkdir(parents=True)
    try:
        yield draft
        _settle(draft)
        os.rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def whole_files(folder: Path, key: str) -> Iterator[Path]:
    """Gives a draft folder; when the block ends without an error, all files in it take their places in `folder`.

    Args:
        folder: where the files belong; made if it is not there.
        key: a name for this set of files: who writes the same set waits for his turn.

    Raises:
        NotADirectoryError: `folder` is a file, or a link to nothing.
        IsADirectoryError: a folder stands where one of the files belongs; nothing has been replaced.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        what = "a file" if folder.exists() else "a link to something that is gone"
        raise NotADirectoryError(f"{folder} is {what}, not a folder: give another one, or take it away") from None
    with alone(folder / key):
        finish(folder, key)
        clear_leftovers(folder, key, ".draft")
        draft = _draft(folder, key, ".draft")
        draft.mkdir()
        try:
            yield draft
            for path in draft.iterdir():
                if (folder / path.name).is_dir():
                    raise IsADirectoryError(f"{folder / path.name} is a folder, a file belongs there: rename it")
            _settle(draft)
            os.replace(draft, _next(folder, key))
            finish(folder, key)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def finish(folder: Path, key: str) -> None:
    """Move to their places the files of a set whose writer was stopped while he did so; call it with `alone`."""
    waiting = _next(folder, key)
    if waiting.is_dir():
        for path in sorted(waiting.iterdir()):
            os.replace(path, folder / path.name)
        waiting.rmdir()


def current(folder: Path, key: str, name: str) -> Path:
    """Where a file of a set is now, also in a folder where an unfinished move cannot be finished (read-only)."""
    waiting = _next(folder, key) / name
    return waiting if waiting.is_file() else folder / name


@contextmanager
def alone(path: Path, wait: bool = True, doing: str = "writing to", lock: Path | None = None) -> Iterator[None]:
    """One process and thread of this machine at a time for this path.

    Args:
        path: what is worked on; need not be there. The lock itself lies in the machine's folder for temporary files.
        wait: False refuses at once if somebody else is at work.
        doing: for messages: "another process is <doing> <path>".
        lock: another place for the lock, such as one that other machines see too.

    Raises:
        OSError: errno EBUSY, somebody else is at work.
    """
    held = FileLock(lock or _lock_file(path))
    try:
        held.acquire(timeout=2 if wait else 0)
    except Timeout:
        busy = f"another process is {doing} {path}: wait for it, or stop it"
        if not wait:
            raise OSError(errno.EBUSY, busy) from None
        print(f"waiting: {busy}")
        held.acquire()
    except (OSError, NotImplementedError) as error:
        # Some file systems and sandboxes have no locks: better without than not at all.
        warnings.warn(f"no lock can be had ({error}): let nobody else be {doing} {path} now", stacklevel=4)
    try:
        yield
    finally:
        held.release()


def _lock_file(path: Path) -> Path:
    """In the machine's folder for temporary files, one folder a user, who need not have a name."""
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    place = Path(tempfile.gettempdir()) / f"glmhelpers-{user}"
    with suppress(OSError):  # said when the lock is asked for
        place.mkdir(exist_ok=True)
    return place / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]}.lock"


def clear_leftovers(folder: Path, key: str, suffix: str) -> None:
    """Remove what processes of this machine that are gone have left of their drafts; what belongs to others stays.

    Args:
        folder: where they lie.
        key: the name they were to get; "" for any.
        suffix: of drafts of this kind.
    """
    name = rf"\.{re.escape(key) or '.+'}\.{re.escape(_HERE)}\.(\d+)\.\w+{re.escape(suffix)}"
    for path in folder.iterdir() if folder.is_dir() else ():
        match = re.fullmatch(name, path.name)
        if match and not psutil.pid_exists(int(match[1])):
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


_HERE = re.sub(r"\W", "_", platform.node()) or "machine"


def _draft(folder: Path, key: str, suffix: str) -> Path:
    return folder / f".{key}.{_HERE}.{os.getpid()}.{uuid.uuid4().hex[:8]}{suffix}"


def _next(folder: Path, key: str) -> Path:
    return folder / f".{key}.next"


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _settle(draft: Path) -> None:
    """Bring the files of a draft to the disk, with the permissions of any new file: some libraries take them away."""
    for path in draft.iterdir():
        if path.is_file() and not path.is_symlink():
            path.chmod(_mode(draft) & 0o666)
            with path.open("rb") as file:
                os.fsync(file.fileno())
