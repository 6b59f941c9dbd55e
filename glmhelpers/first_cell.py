"""What the first cell of a notebook runs, once the project is on this machine.

    the cell (ten lines)             start("04", FORK)
    find the project, or    --->     which copy runs: path, commit, date; our own clone is updated
    clone FORK                       torch?  missing or too old: stop, it is never installed
                                     packages of pyproject.toml that this notebook needs: install what is missing
                                     runtime.preflight()

What cannot go on ends in `Stop`: one sentence that says what to click or type, and a cell that has failed. Until the
packages are there, nothing but the standard library may be imported here. The cell itself: `scripts/first_cell.py`.
"""

import importlib
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]

OLDEST_PYTHON = (3, 11)

SCORES = {"nltk", "rouge_chinese", "jieba"}
NOT_NEEDED = {
    "01": SCORES | {"datasets"},
    "02": SCORES,
    "03": SCORES | {"datasets"},
    "04": SCORES,
    "06": SCORES,
    "solutions": SCORES,
    **dict.fromkeys("ABCD", SCORES),
}
"""Notebook -> packages of pyproject.toml that it does without; one that is not named here gets them all."""

NO_NETWORK = re.compile("resolve|resolution|connection|unreachable|timed out|no matching distribution", re.IGNORECASE)
SWITCH_ON = (
    "switch the internet on (Kaggle: Settings > Internet > On) or name a mirror (%env PIP_INDEX_URL=https://...)"
)


class Stop(Exception):
    """The notebook cannot go on; Jupyter shows the sentence alone, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"Stop: {self}"]


def start(notebook: str, fork: str = "") -> tuple[Path, ModuleType, Any]:
    """Say which project runs, install what `notebook` needs and lacks, look at the machine.

    Args:
        notebook: its number, or its name if it has none: decides what is installed.
        fork: the address the project was cloned from; a clone of it is updated.

    Returns:
        the project's folder, the module `glmhelpers.runtime`, and what its pre-flight saw.

    Raises:
        Stop: something is missing that only the user can mend.
    """
    if sys.version_info < OLDEST_PYTHON:
        raise Stop(f"this is Python {sys.version.split()[0]}, 3.11 or newer is needed: choose a newer image or kernel")
    loaded = getattr(sys.modules.get("glmhelpers"), "__file__", None)
    if loaded and Path(loaded).resolve().parents[1] != PROJECT:
        raise Stop(
            f"this kernel already runs the copy in {Path(loaded).parents[1]}: restart the kernel, run this again"
        )
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # "Loading weights", once a shard; we print our own
    sys.path[:] = [str(PROJECT), *(place for place in sys.path if place != str(PROJECT))]
    updated = _update(fork) if not loaded else ""
    print(f"project: {PROJECT}{_commit()}{updated}{_other_copies()}")
    _install(notebook, _torch_version())
    runtime = importlib.import_module("glmhelpers.runtime")
    try:
        return PROJECT, runtime, runtime.preflight()
    except OSError as error:  # the folder of outputs cannot be written, the disk cannot be asked
        raise Stop(f"{error.strerror or error}") from None


def _git(*arguments: str, seconds: float = 20) -> subprocess.CompletedProcess:
    # An attached copy may belong to another user, which git would refuse to read.
    command = ["git", "-c", f"safe.directory={PROJECT}", "-C", str(PROJECT), *arguments]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _commit() -> str:
    if not (PROJECT / ".git").exists():
        return ", a copy without git's history"
    found = _git("log", "-1", "--format=commit %h of %cs")
    changed = ", with changes of your own" if found.stdout and _git("diff", "--quiet", "HEAD").returncode else ""
    return f", {found.stdout.strip() or 'commit unknown (git cannot read it)'}{changed}"


def _update(fork: str) -> str:
    """Bring a clone of `fork` up to date; what became of it, or nothing where the copy is not such a clone."""
    if not fork or PROJECT.parent != Path.cwd().resolve() or not (PROJECT / ".git").exists():
        return ""
    # Neither address is printed: one may hold a password.
    if _plain(_git("remote", "get-url", "origin").stdout) != _plain(fork):
        raise Stop(f"{PROJECT} is a clone of another address than FORK: rename that folder, then run this again")
    done = _git("pull", "--quiet", "--ff-only", seconds=60)
    return "" if done.returncode == 0 else f" (not updated: {_last_line(done.stderr)})"


def _plain(address: str) -> str:
    return address.strip().rstrip("/").removesuffix(".git")


def _other_copies() -> str:
    """Where else the project lies, if this copy was attached: there may be a newer one."""
    from glmhelpers.utils.folders import cloud_tops, find_folders

    inputs = [top for top in cloud_tops() if PROJECT.is_relative_to(top) and top.name == "input"]
    others = [str(place) for place in find_folders("glmhelpers/first_cell.py", inputs) if place.resolve() != PROJECT]
    return f"; not taken: {', '.join(others[:3])}" if others else ""


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason was given"


def _torch_version() -> str:
    """The installed torch, which no installation may change."""
    how = "use a newer image of your service, or install the build for this machine as pytorch.org says"
    try:
        found = metadata.version("torch")
    except metadata.PackageNotFoundError:
        raise Stop(f"torch is not installed: {how}") from None
    oldest = next(need.split(">=")[1] for need in _needs() if need.startswith("torch>="))
    if _order(found) < _order(oldest):
        raise Stop(f"torch {found} is too old, {oldest} is needed: {how}")
    return found


def _needs() -> list[str]:
    import tomllib

    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {})
    return [*project["dependencies"], *extras.get("notebooks", ()), *extras.get("scores", ())]


def _order(version: str) -> tuple[list[int], bool]:
    """A key to compare versions by, without `packaging`: numbers, then whether it is no pre-release."""
    numbers = version[: len(version) - len(version.lstrip("0123456789."))]
    rest = version[len(numbers) :]
    parts = [int(part) for part in numbers.split(".") if part]
    while parts and parts[-1] == 0:
        parts.pop()
    return parts, not re.match(r"a|b|rc|dev", rest)


def _install(notebook: str, torch: str) -> None:
    """Install what this notebook needs and what is missing here or too old, in a version that passed; never torch."""
    pinned = (PROJECT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins, lacking = {line.split("==")[0].replace("-", "_"): line for line in pinned}, []
    for need in _needs():
        name, oldest = need.split(",")[0].split(">=")
        if name in {"torch", "jupyterlab"} | NOT_NEEDED.get(notebook, set()):
            continue
        found = next(iter(metadata.distributions(name=name)), None)
        if found is None or _order(found.version) < _order(oldest):
            lacking.append((name, pins.get(name, need)))
    if not lacking:
        return
    names = ", ".join(name for name, _ in lacking)
    print(f"installing {names} ...", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", f"torch=={torch}", *(need for _, need in lacking)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        way = SWITCH_ON if NO_NETWORK.search(done.stderr) else f"type !pip install {names.replace(',', '')} to see why"
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = _last_line("\n".join(errors) or done.stderr).removeprefix("ERROR: ")
        raise Stop(f"{names} could not be installed ({reason}): {way}, then run this again")
    importlib.invalidate_caches()
    if any(name in sys.modules for name, _ in lacking):
        raise Stop("new packages were installed: restart the kernel, then run this again")
