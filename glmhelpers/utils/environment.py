"""Facts of the machine: where the project and its output lie, versions, GPUs, free memory.

    find_project()   the folder with glmhelpers/ in it: upwards from the working folder, else where this file lies
    output_folder()  GLM_OUTPUT, else /kaggle/working/outputs, else <project>/outputs
    check_*()        one Check each: subject, ok, what was found, what to do

`glmhelpers.runtime` joins these into the pre-flight and hands them on under its own name.
"""

import functools
import importlib.metadata
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
from packaging.version import Version

from glmhelpers.utils import folders
from glmhelpers.utils.files import make_writable
from glmhelpers.utils.folders import cloud_tops, expanded, find_folders
from glmhelpers.utils.units import GIB

SUPPORTED = {
    "torch": ("2.11", None),
    "transformers": ("5.15", "5.24"),
    "peft": ("0.20", None),
    "accelerate": ("1.14", None),
    "huggingface_hub": ("1.0", None),
    "ipywidgets": ("7.7.1", "8.1"),
}
"""Package -> (oldest version that works, newest version tested or None)."""


PROJECT_MARKER = "glmhelpers/runtime.py"
OWN_PLACE = Path(__file__).resolve().parents[2]


def find_project(start: Path | None = None, root: Path | None = None) -> Path:
    """The project's folder: the nearest upwards from `start`, else the one this file lies in, else a cloud's nearest.

    Args:
        start: where to begin; the working folder if None.
        root: where a cloud's folders lie, see `glmhelpers.utils.folders`.

    Raises:
        FileNotFoundError: no folder with `glmhelpers/runtime.py` in it was found.
    """
    here = Path(start or Path.cwd()).resolve()
    for folder in [here, *here.parents]:
        if (folder / PROJECT_MARKER).is_file():
            return folder
    if (OWN_PLACE / "pyproject.toml").is_file():  # else the package was installed without the project around it
        return OWN_PLACE
    if found := _projects_on_clouds(root):
        return found[0]
    raise FileNotFoundError(f"no project folder at or above {here}: clone the project and start the notebook in it")


@functools.cache
def _projects_on_clouds(root: Path | None) -> list[Path]:
    return find_folders(PROJECT_MARKER, cloud_tops(root))


def machine_name() -> str:
    """ "Kaggle", "Colab" or "local", from what those services set in the environment."""
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE"):
        return "Kaggle"
    if os.environ.get("COLAB_RELEASE_TAG") or "google.colab" in sys.modules:
        return "Colab"
    return "local"


def output_folder() -> Path:
    """Writable folder for what the notebooks make: GLM_OUTPUT, Kaggle's, or <project>/outputs; created.

    Raises:
        OSError: it cannot be written; says how to choose another.
    """
    if wanted := os.environ.get("GLM_OUTPUT"):
        folder = expanded(wanted)
    elif machine_name() == "Kaggle":
        folder = folders.ROOT / "kaggle" / "working" / "outputs"
    else:
        folder = find_project() / "outputs"
    advice = "%env GLM_OUTPUT=/a/folder in a cell above the first"
    make_writable(folder, f": choose a folder for what the notebooks make, {advice}")
    return folder


def short(path: Path) -> str:
    """`path` as a reader should see it: relative to the project where it lies inside."""
    path = Path(path)
    try:
        return path.resolve().relative_to(find_project()).as_posix()
    except ValueError:
        return path.as_posix()


@dataclass(frozen=True)
class InstalledGPU:
    """One GPU as torch numbers it; sizes in bytes."""

    index: int
    name: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Check:
    """One line of the pre-flight: a subject, whether it is fine, what was found, what to do if it is not."""

    subject: str
    ok: bool
    found: str
    advice: str = ""

    def __str__(self) -> str:
        line = f"[{'OK' if self.ok else 'FAIL'}] {self.subject}: {self.found}"
        return line if self.ok or not self.advice else f"{line}\n       -> {self.advice}"


def free_ram_bytes() -> int:
    """Bytes of host memory that can still be used: the machine's, or the container's if that is less."""
    free = psutil.virtual_memory().available
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, int(limit) - used)


def list_gpus() -> list[InstalledGPU]:
    """The CUDA devices torch can use, with free and total bytes; empty without CUDA."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(InstalledGPU(index, torch.cuda.get_device_name(index), free, total))
    return gpus


def check_versions(installed: dict[str, str] | None = None) -> Check:
    """Compare installed package versions with SUPPORTED, without importing the packages.

    Args:
        installed: package -> version, to ask about another machine; read from this one if None.
    """
    if installed is None:
        installed = {}
        for name in SUPPORTED:
            try:
                installed[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
    found, wrong = [], []
    for name, (oldest, newest) in SUPPORTED.items():
        if name not in installed:
            wrong.append(name)
            found.append(f"{name} missing")
            continue
        version = Version(installed[name])
        note = ""
        if version < Version(oldest):
            wrong.append(name)
            note = f" (older than {oldest})"
        elif newest and version.release[:2] > Version(newest).release[:2]:
            note = f" (newer than the {newest} tested here)"
        found.append(f"{name} {version}{note}")
    advice = ""
    if wrong:
        others = [f"'{name}>={SUPPORTED[name][0]}'" for name in wrong if name != "torch"]
        advice = f"pip install {' '.join(others)}, then restart the kernel. " if others else ""
        if "torch" in wrong:
            advice += "torch: use a newer image of your service, or a fresh environment; never upgrade it in place."
    return Check("versions", not wrong, ", ".join(found), advice.strip())


def check_gpus(gpus: list[InstalledGPU], machine: str) -> Check:
    """Say which GPUs torch can use; a GPU that only the driver sees is a failure, none at all is not."""
    if gpus:
        found = "; ".join(
            f"{gpu.index} {gpu.name}, {gpu.free_bytes / GIB:.1f} of {gpu.total_bytes / GIB:.1f} GiB free"
            for gpu in gpus
        )
        return Check("GPUs", True, found)
    if _driver_sees_gpu() and os.environ.get("CUDA_VISIBLE_DEVICES") is None:
        return Check(
            "GPUs",
            False,
            "the driver shows a GPU, but torch cannot use it",
            "this torch is built for the CPU or for a newer driver: use a CUDA image or a fresh environment",
        )
    how = {
        "Kaggle": " (Settings > Accelerator > GPU T4 x2 gives two)",
        "Colab": " (Runtime > Change runtime type > T4 GPU gives one)",
    }
    return Check("GPUs", True, f"none, the tiny model runs on the CPU{how.get(machine, '')}")


def _driver_sees_gpu() -> bool:
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    try:
        answer = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and "GPU 0" in answer.stdout
