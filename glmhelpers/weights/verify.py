"""Are these the published files? First the quick questions, then the slow one.

    for each file of the manifest                                      answer
      is it there?            -- no ----------------------------->     missing
      is it a git-lfs pointer (some 135 bytes of text)? -- yes -->     lfs_pointer
      has it the right size?  -- shorter ------------------------>     truncated
           |                  -- a whole file, but another ------>     version
      is config.json the manifest's? do the files belong
      together? (consistency.py)            -- no -------------->     version
      sha256 as published?    -- no ----------------------------->     checksum

Everything above the last line takes well under a second. The sha256 of 13.4 GB takes as long as reading them.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmhelpers.utils.environment import short
from glmhelpers.utils.files import read_json
from glmhelpers.utils.folders import expanded
from glmhelpers.weights.consistency import EMBEDDING, Problem, check_consistency, read_pieces
from glmhelpers.weights.manifest import checksums, mending_command, read_manifest, total_bytes
from glmhelpers.weights.shards import ShardError, read_entries, snapshot_hint
from thuglm.configuration_chatglm import ChatGLMConfig, is_v1_0

LFS_HEADER = b"version https://git-lfs"


@dataclass
class Report:
    """What `verify_weights` found.

    Attributes:
        folder: the checkpoint's folder.
        problems: one for each fault, in the manifest's order.
        files: number of files in the manifest.
        bytes: what they should sum to.
        seconds_quick, seconds_checksums: how long the two parts took.
        bytes_read: bytes whose sha256 was computed now; the others were remembered.
    """

    folder: Path
    problems: list[Problem] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    seconds_quick: float = 0.0
    seconds_checksums: float = 0.0
    bytes_read: int = 0
    checksums_done: bool = False

    @property
    def ok(self) -> bool:
        """True if there is no problem."""
        return not self.problems

    def __str__(self) -> str:
        what = "size and sha256" if self.checksums_done else "size"
        if self.ok:
            return f"[OK] {short(self.folder)}: {self.files} files, {self.bytes:,} bytes, {what} as in the manifest"
        title = f"[FAIL] {short(self.folder)}: {len(self.problems)} problem{'s' * (len(self.problems) > 1)}"
        return "\n".join([title, *(f"  {problem}" for problem in self.problems)])


def verify_weights(
    folder: str | Path,
    manifest: dict[str, Any] | str | Path | None = None,
    checksums: bool = True,
    workers: int | None = None,
    progress: bool | Callable[[int], None] = False,
) -> Report:
    """Compare a checkpoint folder with its manifest.

    Args:
        folder: where the files lie.
        manifest: a manifest or its path; None: the folder's own `weights_manifest.json`, else that of ChatGLM-6B v1.1.
        checksums: False leaves out sha256: under a second, and finds everything but changed bytes.
        workers: files read at a time for the sha256; None: one a core, at most 8.
        progress: True prints one line of text while the sha256 take longer than a moment; or a function that is called
            with a number of bytes after each block read.

    Returns:
        a report: `.ok`, `.problems` (each with `.file`, `.kind`, `.message`), and times in seconds.

    Raises:
        ValueError, FileNotFoundError: the manifest is not one. Faults of the files themselves raise nothing.
    """
    folder, started = expanded(folder), time.perf_counter()
    facts = read_manifest(manifest, folder)
    report = Report(folder, files=len(facts["files"]), bytes=total_bytes(facts))
    problems = {name: check_size(folder, name, wanted) for name, wanted in facts["files"].items()}
    problems |= {name: check_readable(folder, name) for name, problem in problems.items() if not problem}
    found = {name: problem for name, problem in problems.items() if problem}
    if folder.is_dir():
        for problem in [*check_consistency(folder), *check_config(folder, facts)]:
            found.setdefault(problem.file, problem)
    report.seconds_quick = time.perf_counter() - started
    if checksums:
        _compare_checksums(report, facts, found, workers, progress)
    for name, problem in found.items():
        # A message may end in dots.
        text = f"{problem.message.removesuffix('.')}. Mend: {mending_command(facts, folder, name)}"
        report.problems.append(Problem(name, problem.kind, text))
    return report


def check_size(folder: Path, name: str, wanted: dict[str, Any]) -> Problem | None:
    """The problem that name and size of one file show, or None; `wanted`: its "size" in bytes and its "sha256"."""
    path = folder / name
    if path.is_dir():
        return Problem(name, "missing", f"{name} is a folder in {short(folder)}, which must be removed first")
    if not path.is_file():
        link = " (a link to a file that is gone)" if path.is_symlink() else snapshot_hint(folder)
        return Problem(name, "missing", f"{name} is not in {short(folder)}{link}")
    size = path.stat().st_size
    if size < 1024 and (pointer := read_lfs_pointer(path)) is not None:
        text = f"{name} is a git-lfs pointer, {size} bytes of text that stand for {wanted['size']:,} bytes"
        if pointer != wanted["sha256"]:
            text += ", and for another version than this manifest's"
        return Problem(name, "lfs_pointer", f"{text}: it was cloned without git-lfs")
    if size == wanted["size"]:
        return None
    if release := _whole_file_of_other_release(path):
        text = f"{name} is whole, but {release}: {size:,} bytes instead of {wanted['size']:,}"
        return Problem(name, "version", text)
    if size < wanted["size"]:
        return Problem(name, "truncated", f"{name} is cut off: have {size:,} of {wanted['size']:,} bytes")
    text = f"{name} has {size:,} bytes, {wanted['size']:,} were published: it is another file"
    return Problem(name, "checksum", text)


def check_readable(folder: Path, name: str) -> Problem | None:
    """The problem of a file of the right size that cannot be opened, or is not of its kind; reads a few kilobytes."""
    path = folder / name
    try:
        with path.open("rb") as file:
            file.read(1)
        if path.suffix in (".bin", ".safetensors"):
            read_entries(path)
        elif path.name == "ice_text.model" and read_pieces(path) is None:
            raise ValueError("it is no SentencePiece model")
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0].removeprefix(f"{path} ")[:200]
        return Problem(name, "checksum", f"{name} has the right size, but cannot be read: {reason}")
    return None


def check_config(folder: Path, facts: dict[str, Any]) -> list[Problem]:
    """Problems of config.json against the "config" of a manifest: it is small, but decides how all files are read.

    What the manifest does not say is no problem; for what config.json leaves out the model's default counts.
    """
    path, wanted = folder / "config.json", facts.get("config") or {}
    try:
        found = read_json(path)
    except FileNotFoundError:
        if not wanted:
            return []
        return [Problem(path.name, "missing", f"{path.name} is not in {short(folder)}")]
    except OSError as error:
        return [Problem(path.name, "missing", f"{path.name} cannot be read ({error.strerror})")]
    except ValueError as error:
        return [Problem(path.name, "truncated", f"{path.name} is not whole JSON ({error})")]
    if not isinstance(found, dict):
        return [Problem(path.name, "version", f"{path.name} holds {str(found)[:40]!r} and no settings")]
    for key, value in wanted.items():
        says = found.get(key, vars(ChatGLMConfig).get(key, value))
        if says != value:
            what = f"says {key} {says}" if key in found else f"leaves out {key}, which means {says}"
            text = f"{path.name} {what}, the manifest says {value}: it is of another model"
            return [Problem(path.name, "version", text)]
    return []


def read_lfs_pointer(path: Path) -> str | None:
    """The sha256 that a git-lfs pointer file stands for ("" if it names none), or None if it is no pointer."""
    with path.open("rb") as file:
        head = file.read(1024)
    if not head.startswith(LFS_HEADER):
        return None
    match = re.search(rb"oid sha256:([0-9a-f]{64})", head)
    return match[1].decode() if match else ""


def _whole_file_of_other_release(path: Path) -> str:
    """Says which release a file of the wrong size is from, if it is whole; "" if it cannot be read."""
    if path.suffix in (".bin", ".safetensors"):
        try:
            entries = read_entries(path)
        except (ShardError, OSError):
            return ""
        rows = entries[EMBEDDING].shape[0] if EMBEDDING in entries else 0
        return "of v1.0" if is_v1_0(rows) else "of another version or model"
    if path.name == "ice_text.model":
        if (pieces := read_pieces(path)) is None:
            return ""
        return "of v1.0" if pieces.piece_to_id("[gMASK]") == pieces.unk_id() else "of another version or model"
    return ""


def _compare_checksums(
    report: Report, facts: dict, found: dict[str, Problem], workers: int | None, progress: bool | Callable[[int], None]
) -> None:
    """Add to `found` the files whose sha256 is not the manifest's; those with a problem are not read."""
    started, names = time.perf_counter(), [name for name in facts["files"] if name not in found]
    unreadable: dict[str, OSError] = {}
    sha256, report.bytes_read = checksums(report.folder, names, workers, progress, unreadable=unreadable)
    for name, error in unreadable.items():
        found[name] = Problem(name, "checksum", f"{name} has the right size, but cannot be read ({error.strerror})")
    for name in sha256:
        if sha256[name] != (wanted := facts["files"][name]["sha256"]):
            text = f"sha256 {sha256[name][:12]}... instead of {wanted[:12]}..."
            found[name] = Problem(name, "checksum", f"{name} has the right size but wrong bytes: {text}")
    report.checksums_done = True
    report.seconds_checksums = time.perf_counter() - started
