"""Fetch the weights so that nothing can go wrong.

    download_weights("thuglm")
       what is missing or wrong?  --> enough disk?  --> fetch to NAME.part --> sha256 --> rename to NAME
              |                            |  before anything           |                     |
              |                            |  is written                |  cut? next call     |  wrong? NAME.part
              +-- nothing: done            +-- no: says what to do      |  goes on here       |  is thrown away

A file has its final name only after its sha256 was right. So whoever sees the name may trust the bytes, also after
a power cut.
"""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glmhelpers.utils.environment import short
from glmhelpers.utils.files import alone, make_writable, need_disk, read_json, write_json
from glmhelpers.utils.folders import expanded, find_folders
from glmhelpers.utils.progress import TextProgress
from glmhelpers.weights.hub import DownloadError, Remote
from glmhelpers.weights.manifest import checksums, facts_of, read_manifest, remember, sha256_of, total_bytes
from glmhelpers.weights.shards import make_index
from glmhelpers.weights.verify import Report, check_size, verify_weights

INDEX_NAME = "pytorch_model.bin.index.json"
SPARE_BYTES = 100 * 2**20
"""Disk that must stay free beside the weights: index, notebooks, adapters."""


def download_weights(
    folder: str | Path,
    source: str | Path = "huggingface",
    manifest: dict[str, Any] | str | Path | None = None,
    endpoint: str | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> Report:
    """Bring every file of the manifest into `folder`; fetch only what is missing or wrong; go on after a break.

    Args:
        folder: where the weights shall lie (created).
        source: "huggingface", "modelscope", a base URL below which the files lie, or a folder that has them already:
            its files are linked, not copied.
        manifest: what to bring, see `weights/manifest.py`; None: what the folder's own `weights_manifest.json` lists,
            as in `verify_weights`; ChatGLM-6B v1.1 if it has none.
        endpoint: a mirror of the Hugging Face hub; None: the environment variable HF_ENDPOINT, else the hub itself.
        revision: another revision of the repository than the manifest's.
        progress: print one line of text for what is fetched, and for what must be read to be checked.

    Returns:
        the report of `verify_weights`, without problems.

    Raises:
        DownloadError: a file could not be fetched or came with wrong bytes; what is good stays, call again.
        SettingError: a setting of the environment (HF_ENDPOINT, HF_TOKEN, a proxy ...) makes it impossible.
        OSError: the disk is too small (errno ENOSPC), the folder cannot be written (EROFS, EACCES, ...), or another
            process is downloading to it (EBUSY).
        FileNotFoundError: the source folder lacks a file.
        ValueError: the source or the manifest is none.
    """
    folder = expanded(folder)
    facts = read_manifest(manifest, folder)
    origin = expanded(source) if expanded(source).is_dir() else Remote(facts, str(source), endpoint, revision)
    say: Callable[[str], None] = print if progress else lambda _: None
    try:
        kaggle = "on Kaggle download_weights('/kaggle/temp/chatglm-6b')"
        make_writable(folder, f", nothing was fetched: choose another folder, {kaggle}")
    except OSError:
        # A Kaggle input folder cannot be written, and need not be if all is there.
        if not verify_weights(folder, facts, checksums=False).ok:
            raise
        report = verify_weights(folder, facts, progress=progress)
        if not report.ok:
            raise
        say(str(report))
        return report
    with alone(folder, wait=False, doing="downloading to", lock=folder / ".weights.lock"):
        _refuse_folders(folder, facts)
        wanted = wrong_or_missing(folder, facts, progress)
        if not wanted:
            say(f"{short(folder)}: all {len(facts['files'])} files are here already")
        elif isinstance(origin, Remote):
            origin.check_settings()
            check_disk(folder, facts, wanted)
            _fetch_all(folder, origin, wanted, progress, say)
        else:
            copied = _link_all(folder, origin, facts, wanted, progress)
            how = (
                f"copied from {short(origin)}: no links here"
                if copied
                else f"linked to {short(origin)}, nothing copied"
            )
            say(f"{short(folder)}: {len(wanted)} files {how}")
        _write_small_files(folder, facts, say)
        shutil.rmtree(folder / ".modelscope", ignore_errors=True)
        report = verify_weights(folder, facts)
    if not report.ok:
        raise DownloadError(f"after the download something is still wrong:\n{report}")
    say(str(report))
    return report


def _refuse_folders(folder: Path, facts: dict[str, Any]) -> None:
    """No folder may stand where a file belongs; to delete one with all that is in it is not for us."""
    for name in facts["files"]:
        for path in _both(folder, name):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{path} is a folder, a file belongs there: remove or rename it")


def wrong_or_missing(folder: Path, facts: dict[str, Any], progress: bool = False) -> dict[str, str]:
    """Name -> kind of fault, of the files that must be fetched."""
    files = facts["files"]
    faults = {name: check_size(folder, name, wanted) for name, wanted in files.items()}
    whole = [name for name, fault in faults.items() if fault is None]
    found, _ = checksums(folder, whole, progress=progress, unreadable={})
    return {
        name: fault.kind if fault else "checksum"
        for name, fault in faults.items()
        if fault is not None or found.get(name) != files[name]["sha256"]
    }


def check_disk(folder: Path, facts: dict[str, Any], names: dict[str, str] | list[str]) -> int:
    """Bytes that still have to be written for `names`; complains before anything is touched if they do not fit.

    Raises:
        OSError: with errno ENOSPC; says how much is needed, how much is there, and where there is more.
    """
    need = 0
    for name in names:
        # The wrong file makes room when it goes, unless it is only a link.
        there = [path.stat().st_size for path in _both(folder, name) if path.is_file() and not path.is_symlink()]
        need += max(facts["files"][name]["size"] - sum(there), 0)
    advice = (
        ". Kaggle: /kaggle/working holds 20 GB, one copy and no second one; "
        "/kaggle/temp holds more; an input data set costs nothing (source='/kaggle/input/...'). "
        "Colab: choose a folder under /content, not the mounted drive, or delete what you do not need"
    )
    need_disk(folder, need + SPARE_BYTES, f" (all weights: {total_bytes(facts):,} bytes)", advice)
    return need


def _both(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / name, folder / f"{name}.part"


def _fetch_all(
    folder: Path, origin: Remote, wanted: dict[str, str], progress: bool, say: Callable[[str], None]
) -> None:
    files, there = origin.facts["files"], {}
    for name, kind in wanted.items():
        if kind != "missing":
            say(f"{name} is fetched again: {kind}")
        _take_away(folder, name, kind)
        part = folder / f"{name}.part"
        # A link would be written through, to a file that is not ours.
        if part.is_symlink() or (part.is_file() and part.stat().st_size > files[name]["size"]):
            part.unlink()
        there[name] = part.stat().st_size if part.is_file() else 0
    total = total_bytes(origin.facts)
    bar = TextProgress(total, total - sum(files[name]["size"] - there[name] for name in wanted), show=progress)
    try:
        for name in wanted:
            bar.start(name, files[name]["size"], there[name])
            _fetch_one(folder, origin, name, bar)
            bar.finish()
    finally:
        bar.close()


def _take_away(folder: Path, name: str, kind: str) -> None:
    """No wrong file keeps its final name; one that is only cut off is the beginning of the new one."""
    path, part = _both(folder, name)
    if kind == "truncated" and not part.exists() and not path.is_symlink():
        os.replace(path, part)
    else:
        path.unlink(missing_ok=True)


def _fetch_one(folder: Path, origin: Remote, name: str, bar: TextProgress) -> None:
    path, part = _both(folder, name)
    wanted = origin.facts["files"][name]
    for last_try in (False, True):
        resumed = part.is_file() and part.stat().st_size > 0
        origin.fetch(name, part, wanted["size"], bar.add)
        sha256 = sha256_of(part)
        if sha256 == wanted["sha256"]:
            os.replace(part, path)
            remember(folder, {name: facts_of(path, sha256)})
            return
        part.unlink()
        bar.add(-bar.in_file)
        # The beginning may have been damaged long ago: one fresh try before the source is blamed.
        if last_try or not resumed:
            raise DownloadError(
                f"{name} came with wrong bytes from {origin.where(name)} (sha256 {sha256[:12]}... instead of "
                f"{wanted['sha256'][:12]}...) and was thrown away: call download_weights again, "
                "from another source if it happens twice"
            )


def _link_all(folder: Path, origin: Path, facts: dict[str, Any], wanted: dict[str, str], progress: bool) -> bool:
    """Links to the files of `origin`, after they have been checked there; `origin` itself is never written.

    True: they were copied, because this file system (FAT, some network drives) has no links.
    """
    files, again = facts["files"], "choose another source, such as source='huggingface'"
    faults = [fault for name in wanted if (fault := check_size(origin, name, files[name]))]
    if faults:
        deeper = [place for place in find_folders(faults[0].file, [origin]) if place != origin]
        hint = f" (there is one in {deeper[0]}: give that as source)" if deeper else ""
        text = "; ".join(f"{fault}. Mend: {again}" for fault in faults)
        raise FileNotFoundError(f"the source folder {origin} is not complete{hint}: {text}")
    found, _ = checksums(origin, wanted, progress=progress, keep=False)
    for name in wanted:
        if found[name] != files[name]["sha256"]:
            raise FileNotFoundError(f"the source folder {origin} has wrong bytes in {name}: {again}")
    copied = False
    for name in wanted:
        path, part = _both(folder, name)
        part.unlink(missing_ok=True)
        try:
            part.symlink_to((origin / name).resolve())
        except (OSError, NotImplementedError):
            if not copied:
                check_disk(folder, facts, wanted)
            copied = True
            shutil.copyfile(origin / name, part)
            if sha256_of(part) != found[name]:
                raise DownloadError(f"{name} was copied with wrong bytes: is the disk healthy? Call it again") from None
        os.replace(part, path)
    remember(folder, {name: facts_of(folder / name, found[name]) for name in wanted})
    return copied


def _write_small_files(folder: Path, facts: dict[str, Any], say: Callable) -> None:
    """config.json, tokenizer_config.json and the index, where they are missing or do not fit the weights."""
    for name, key in (("config.json", "config"), ("tokenizer_config.json", "tokenizer_config")):
        if name in facts["files"] or key not in facts:
            continue
        _write_json(folder / name, facts[key], say)
    shards = [folder / name for name in facts["files"] if name.endswith(".bin")]
    if shards and INDEX_NAME not in facts["files"]:
        _write_json(folder / INDEX_NAME, make_index(shards), say)


def _write_json(path: Path, content: dict[str, Any], say: Callable) -> None:
    if path.is_file():
        try:
            found = read_json(path)
        except ValueError:
            found = {}
        if isinstance(found, dict) and all(found.get(key) == value for key, value in content.items()):
            return
        say(f"{path.name} does not fit the weights and is written anew")
    write_json(path, content)
