"""The manifest of a checkpoint (name, size and sha256 of every file), and the checksums of the files that are here.

    weights_manifest.json
      "model"        what it is
      "huggingface"  {"repo_id", "revision"}      where it is published, if it is
      "modelscope"   {"model_id"}
      "files"        name -> {"size", "sha256"}
      "config", "tokenizer_config"                written beside the weights, so that the folder loads
      "mend"         what to do about a wrong file, if it is published nowhere

That of ChatGLM-6B v1.1 ships with the package. A folder that brings its own `weights_manifest.json` is checked
against that one.

sha256 of large files are read side by side, and never twice for a file that has not changed:

    .weights_checked.json      name -> size, times of last change, device, inode, sha256
         +- all as now: the remembered sha256, at once (in a copied folder they are others, whatever time it shows)
         +- else: read the file; several at a time, since hashlib lets other threads run

A folder that cannot be written, such as a Kaggle input data set, is remembered in the user's cache folder instead.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from glmhelpers.utils.files import read_json, write_json
from glmhelpers.utils.folders import expanded, user_cache
from glmhelpers.utils.progress import reading

MANIFEST_NAME = "weights_manifest.json"
PUBLISHED = Path(__file__).resolve().parents[2] / "thuglm" / "published" / MANIFEST_NAME


def read_manifest(manifest: dict[str, Any] | str | Path | None = None, folder: Path | None = None) -> dict[str, Any]:
    """The manifest to check `folder` against.

    Args:
        manifest: the manifest itself, or the path of one; None: the folder's own if it has one, else the published.
        folder: the checkpoint's folder.

    Raises:
        FileNotFoundError: no manifest at that path.
        ValueError: it is not a manifest, or it names a file outside its folder.
    """
    if isinstance(manifest, dict):
        found, where = manifest, "the manifest"
    else:
        own = expanded(folder) / MANIFEST_NAME if folder is not None else None
        path = expanded(manifest) if manifest is not None else own if own and own.is_file() else PUBLISHED
        where = str(path)
        try:
            found = read_json(path)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON ({error})") from error
    files = found.get("files") if isinstance(found, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError(f'{where} has no "files": it should map each file name to its size and sha256')
    for name, facts in files.items():
        # A name such as ../x would make the download write outside its folder.
        if not name or Path(name).name != name or name.startswith("."):
            raise ValueError(f"{where} names {name!r}: only plain file names are allowed")
        size, sha256 = (facts.get("size"), facts.get("sha256")) if isinstance(facts, dict) else (None, None)
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ValueError(f"{where}: the size of {name} is {size!r}, not a number of bytes")
        if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise ValueError(f"{where}: the sha256 of {name} is {sha256!r}, not 64 hexadecimal digits")
    return found


def total_bytes(manifest: dict[str, Any]) -> int:
    """Bytes of all files together. The `total_size` of a published index is not used: it is wrong."""
    return sum(facts["size"] for facts in manifest["files"].values())


def mending_command(manifest: dict[str, Any], folder: Path, name: str) -> str:
    """The one command that puts a file right: the manifest's own, or a download where it is published, else git."""
    if "mend" in manifest:
        return manifest["mend"]
    if "huggingface" in manifest or "modelscope" in manifest:
        return f"download_weights({str(folder)!r})"
    return f"git checkout -- {(Path(folder) / name).as_posix()}"


MEMORY_NAME = ".weights_checked.json"
BLOCK = 8 * 2**20


def sha256_of(path: Path, progress: Callable[[int], None] = lambda count: None) -> str:
    """sha256 of a file in hexadecimal; calls `progress(bytes)` after every block."""
    digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            progress(count)
    return digest.hexdigest()


def memory_places(folder: Path) -> list[Path]:
    """Where the sha256 of a folder's files are remembered: beside them, or in the user's cache folder."""
    known_as = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return [folder / MEMORY_NAME, user_cache() / f"{known_as}.json"]


def remembered(folder: Path) -> dict[str, list]:
    """File name -> `facts_of` it, of the files that are still those of the last reading."""
    found: dict[str, list] = {}
    for place in reversed(memory_places(folder)):
        try:
            memory = read_json(place)
            found |= {name: facts for name, facts in memory.items() if _is_now(folder / name, facts)}
        except (OSError, ValueError, AttributeError):
            continue  # no memory, or a damaged one: the files are read again
    return found


def remember(folder: Path, facts: dict[str, list]) -> None:
    """Keep name -> `facts_of` for later, where it can be written; nowhere is no error, only slow."""
    if not facts:
        return
    known = remembered(folder) | facts
    for place in memory_places(folder):
        with suppress(OSError):
            return write_json(place, known)


def facts_of(path: Path, sha256: str) -> list:
    """What tells this file, unchanged, from any other, and its sha256. A renamed file has a new time of change."""
    now = path.stat()
    return [now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_dev, now.st_ino, sha256]


def read_facts(path: Path, progress: Callable[[int], None] = lambda count: None) -> list:
    """`facts_of` a file that is read now; times from before the reading, so that a change meanwhile shows."""
    return [*facts_of(path, "")[:-1], sha256_of(path, progress)]


def _is_now(path: Path, facts: Any) -> bool:
    """Whether remembered facts have the right form, and are still the file's."""
    if not isinstance(facts, list) or not facts or not isinstance(facts[-1], str) or not path.is_file():
        return False
    return facts == facts_of(path, facts[-1])


def checksums(
    folder: Path,
    names: Iterable[str],
    workers: int | None = None,
    progress: bool | Callable[[int], None] = False,
    keep: bool = True,
    unreadable: dict[str, OSError] | None = None,
) -> tuple[dict[str, str], int]:
    """sha256 of files in `folder`, without reading those that are remembered.

    Args:
        folder: where the files lie.
        names: which files.
        workers: how many files are read at a time; None: as many as there are cores, at most 8.
        progress: True prints one line of text while it takes longer than a moment; a function is called with the number
            of bytes after every block, from any thread.
        keep: False writes no memory: the folder is somebody else's.
        unreadable: gets the files that cannot be read, which the answer then lacks; None: the first of them raises.

    Returns:
        name -> sha256, and the number of bytes that were really read.
    """
    names, known = list(names), remembered(folder)
    sizes = {name: (folder / name).stat().st_size for name in names if name not in known}
    # The longest first: otherwise the last thread works alone on a long one at the end.
    to_read = sorted(sizes, key=lambda name: -sizes[name])
    pool = ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1))
    with pool, reading(f"sha256 of {len(names)} files", sum(sizes.values()), show=progress is True) as count:
        say = progress if callable(progress) else count
        jobs = {name: pool.submit(read_facts, folder / name, say) for name in to_read}
    faults = {name: error for name, job in jobs.items() if isinstance(error := job.exception(), OSError)}
    if unreadable is None and faults:
        raise next(iter(faults.values()))
    (unreadable if unreadable is not None else {}).update(faults)
    fresh = {name: job.result() for name, job in jobs.items() if name not in faults}
    known |= fresh
    if keep:
        remember(folder, fresh)
    return {name: known[name][-1] for name in names if name in known}, sum(facts[0] for facts in fresh.values())
