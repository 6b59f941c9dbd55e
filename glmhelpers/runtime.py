"""Where am I, what is here, which checkpoint and which devices: the first cell of every notebook.

    preflight()                     choose()                                report_result()
    +--------------------------+    +----------------------------------+    +-----------------------+
    | machine    versions      |    | weights: real | tiny | a folder  |    | RESULT loss=0.31 ...  |
    | GPUs       RAM     disk  | -> | devices: [0, 1] | [0] | ["cpu"]  | -> | outputs/results/      |
    | files                    |    | dtype:   float16 on GPU, else 32 |    |   04_lora_....json    |
    +--------------------------+    +----------------------------------+    +-----------------------+
      each line [OK] or [FAIL]        a Run: one object for all cells          for `make tutorial`

Nothing here imports the model or reads a weight. Environment variables that answer for "auto":
GLM_WEIGHTS (tiny, real or a folder), GLM_DEVICES (cpu, or GPU numbers as in 0,1), GLM_OUTPUT (a folder).
"""

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from glmhelpers.attached import find_adapter, find_real_weights
from glmhelpers.utils import folders
from glmhelpers.utils.environment import (
    SUPPORTED,
    Check,
    InstalledGPU,
    check_gpus,
    check_versions,
    find_project,
    free_ram_bytes,
    list_gpus,
    machine_name,
    output_folder,
    short,
)
from glmhelpers.utils.files import read_json, write_json
from glmhelpers.utils.folders import expanded
from glmhelpers.utils.markdown import markdown_table
from glmhelpers.utils.units import GIB

if TYPE_CHECKING:
    from glmhelpers.devicemap.plan import Plan

__all__ = [
    "SUPPORTED",
    "Check",
    "InstalledGPU",
    "Preflight",
    "Run",
    "check_versions",
    "choose",
    "find_adapter",
    "find_project",
    "find_real_weights",
    "free_ram_bytes",
    "list_gpus",
    "machine_name",
    "markdown_table",
    "output_folder",
    "preflight",
    "report_result",
    "short",
]

REAL_GPU_BYTES = 14 * GIB
"""GPU memory below which "auto" does not try the real model: 12.35 GB of weights and room to work."""


@dataclass(frozen=True)
class Preflight:
    """What `preflight` saw. Sizes in bytes."""

    machine: str
    project: Path
    gpus: list[InstalledGPU]
    ram_free_bytes: int
    disk_free_bytes: int
    checks: list[Check] = field(repr=False)

    @property
    def ok(self) -> bool:
        """True if no line says [FAIL]."""
        return all(check.ok for check in self.checks)


def _check_files(project: Path) -> Check:
    try:
        return _compare_files(project)
    except ValueError as error:
        return Check("files", False, "a weights_manifest.json cannot be read", f"{error}: remove or replace that file")


def _compare_files(project: Path) -> Check:
    from glmhelpers.weights.manifest import MANIFEST_NAME
    from glmhelpers.weights.verify import verify_weights

    real, folder = find_real_weights(project), project / "thuglm"
    if real is not None:
        return Check("files", True, f"real weights complete in {short(real)}")
    if any((folder / name).is_file() for name in ("pytorch_model-00001-of-00008.bin", "ice_text.model")):
        report = verify_weights(folder, checksums=False)
        if report.ok:
            advice = f"download_weights({str(folder)!r}) writes what is missing and fetches nothing"
            return Check("files", False, "real weights in thuglm, without config.json or index", advice)
        count = f"{len(report.problems)} {'file is' if len(report.problems) == 1 else 'files are'} wrong or missing"
        return Check("files", False, f"real weights in thuglm: {count}", str(report.problems[0]))
    tiny_folder = project / "data" / "tiny-chatglm"
    if not (tiny_folder / MANIFEST_NAME).is_file():
        advice = "git checkout -- data/tiny-chatglm, or clone the project again"
        return Check("files", False, f"data/tiny-chatglm/{MANIFEST_NAME} is not there", advice)
    tiny = verify_weights(tiny_folder, checksums=False)
    if not tiny.ok:
        return Check("files", False, "data/tiny-chatglm is not as it should be", str(tiny.problems[0]))
    return Check("files", True, "tiny ChatGLM in data/tiny-chatglm; the real weights are not here (notebook 01)")


def preflight() -> Preflight:
    """Print machine, versions, GPUs, RAM, disk and files, each [OK] or [FAIL] with what to do; return all.

    Takes a few seconds, most of it torch's import; loads nothing.
    """
    project, machine = find_project(), machine_name()
    ram, disk = free_ram_bytes(), shutil.disk_usage(output_folder()).free
    python = Check(
        "machine",
        sys.version_info >= (3, 11),
        f"{machine}, Python {platform.python_version()}, {os.cpu_count()} cores",
        "Python 3.11 or newer is needed: choose a newer image or environment",
    )
    versions = check_versions()
    gpus = list_gpus() if versions.ok else []
    checks = [
        python,
        versions,
        *([check_gpus(gpus, machine)] if versions.ok else []),  # torch is not asked, so nothing is known
        Check(
            "RAM",
            ram >= GIB,
            f"{ram / GIB:.0f} GiB free",
            "restart other kernels on this machine: 1 GiB is needed",
        ),
        Check("disk", disk >= GIB // 4, f"{disk / GIB:.0f} GiB free", "delete old outputs: 256 MiB are needed"),
    ]
    if versions.ok:
        checks.append(_check_files(project))
    for check in checks:
        print(check)
    return Preflight(machine, project, gpus, ram, disk, checks)


@dataclass(frozen=True)
class Run:
    """What the notebooks run on: one checkpoint, some devices, one dtype, one folder for results.

    `wants_download` is True where the GPUs are large enough for the real model, but its weights are not here yet.
    """

    folder: Path
    is_tiny: bool
    devices: list[int | str]
    dtype: Any
    output: Path
    reason: str = ""
    wants_download: bool = False

    def plan(self, config: Any, batch_size: int = 4, seq_length: int = 1024, **settings: Any) -> "Plan | None":
        """The best plan for this run's GPUs, or None on the CPU, where there is nothing to plan.

        Args:
            config: a ChatGLMConfig.
            batch_size: rows in a step.
            seq_length: tokens in the longest row.
            settings: as for `plan_device_map`: objective, lora_rank, base_bits ...

        Raises:
            DoesNotFit: no plan fits; says which single change would help.
        """
        if self.devices == ["cpu"]:
            return None
        from glmhelpers.cost_model.gpus import known_gpu
        from glmhelpers.devicemap.plan import plan_device_map

        here = {gpu.index: known_gpu(gpu.name, gpu.total_bytes) for gpu in list_gpus()}
        indices = sorted(int(index) for index in self.devices)
        settings = {"dtype": str(self.dtype).removeprefix("torch."), **settings}
        cards = [here[index] for index in indices]
        return plan_device_map(config, cards, batch_size, seq_length, devices=indices, **settings)

    def device_map(self, config: Any) -> dict[str, int | str]:
        """Module name -> device for every part of the model, as `from_pretrained(device_map=)` takes it.

        Args:
            config: a ChatGLMConfig; one device needs only its `num_layers`, `plan` reads the rest.
        """
        from glmhelpers.devicemap.check import Placement

        where = self.devices[0] if len(self.devices) == 1 else self.plan(config)
        return Placement.of(where, config.num_layers).map

    def __str__(self) -> str:
        model = "tiny ChatGLM" if self.is_tiny else "ChatGLM-6B"
        devices = ", ".join(f"cuda:{at}" if isinstance(at, int) else at for at in self.devices)
        kind = str(self.dtype).removeprefix("torch.")
        reason = f" ({self.reason})" if self.reason else ""
        return f"{model} from {short(self.folder)} on {devices} in {kind}{reason}"


def choose(
    weights: str | Path = "auto",
    devices: str | list[int | str] = "auto",
    may_fetch: bool = False,
    source: str | Path = "",
) -> Run:
    """Choose checkpoint and devices, fetch the weights if told from where, print the choice, return it.

    Printed are the choice, where real weights came from, and a [NOTE] where GPUs for the real model are here but its
    weights are not.

    Args:
        weights: "tiny", "real", a folder with a checkpoint, or "auto": real where the real weights are
            complete and the GPUs are large enough, else tiny.
        devices: "cpu", a list of GPU numbers such as [0, 1], or "auto": every GPU there is, else the CPU.
        may_fetch: True where the caller can fetch them: then "real" weights that are not here are no error, but the
            run is on the tiny ones and its `wants_download` is True.
        source: where to fetch wanted weights that are not here, as in `download_weights`; "": nowhere. They go to
            thuglm/, on Kaggle to /kaggle/temp: they need not be saved with the notebook a second time.

    Raises:
        FileNotFoundError: the wanted weights are not there.
        DownloadError, OSError: they cannot be fetched.
        ValueError: a GPU was asked for that this machine does not have.
    """
    import torch

    project, gpus = find_project(), list_gpus()
    weights = os.environ.get("GLM_WEIGHTS") or "auto" if weights == "auto" else weights
    devices = _read_devices(os.environ.get("GLM_DEVICES") or "auto" if devices == "auto" else devices, gpus)
    tiny, reason, wants_download = project / "data" / "tiny-chatglm", "", False
    room = sum(gpu.total_bytes for gpu in gpus if gpu.index in devices)
    if weights == "auto":
        enough = room >= REAL_GPU_BYTES
        real = find_real_weights(project, say=print if enough else None)
        folder = real if real is not None and enough else tiny
        wants_download = real is None and enough
        if folder is tiny:
            reason = (
                "the real weights are not here"
                if enough
                else f"the real model wants {REAL_GPU_BYTES // GIB} GiB of GPU"
            )
    elif weights == "real":
        real = find_real_weights(project, say=print)
        if real is None and not may_fetch and not source:
            raise FileNotFoundError(
                "the real weights are neither complete in thuglm/ nor attached: run notebook 01 first, attach its "
                'output, or let choose(source="huggingface") fetch them'
            )
        folder = real or tiny
        if real is None:
            reason, wants_download = "the real weights are not here", True
    else:
        folder = tiny if weights == "tiny" else expanded(weights)
    if not (folder / "config.json").is_file() and not (folder / "ice_text.model").is_file():
        raise FileNotFoundError(f"no checkpoint in {short(folder)}: neither config.json nor ice_text.model is there")
    on_gpu, wanted = devices != ["cpu"], None if wants_download else folder
    if not on_gpu and wanted != tiny and not (check := check_ram(wanted)).ok:
        print(check)
    if wants_download and source:
        return choose(_fetch(project, source), devices)
    run = Run(
        folder=folder,
        is_tiny=folder.resolve() == tiny.resolve(),
        devices=devices,
        dtype=torch.float16 if on_gpu else torch.float32,
        output=output_folder(),
        reason=reason,
        wants_download=wants_download,
    )
    print(run)
    if wants_download and not may_fetch:
        print(
            "[NOTE] These GPUs are large enough for ChatGLM-6B, but its weights are neither in thuglm/ nor attached.\n"
            "       -> all that follows is on tiny ChatGLM: run notebook 01 in this session, attach its output, set "
            "SOURCE, or set GLM_WEIGHTS to their folder"
        )
    return run


def check_ram(folder: Path | None = None) -> Check:
    """Does a checkpoint fit into this machine's free memory in float32, as the CPU computes? None: ChatGLM-6B."""
    from glmhelpers.weights.layout import HEAD, part_bytes, part_of
    from glmhelpers.weights.manifest import read_manifest

    try:
        config = read_json(folder / "config.json") if folder else read_manifest()["config"]
        sizes = part_bytes(SimpleNamespace(**config))
    except (OSError, ValueError, TypeError, AttributeError):
        return Check("RAM", True, "no config.json that tells the size of the model")  # the loader will say why
    need, free = 2 * (sum(sizes.values()) - sizes[part_of(HEAD)]), free_ram_bytes()
    return Check(
        "RAM",
        need <= free,
        f"in float32, as the CPU computes, the model needs {need / 1e9:.1f} GB; {free / 1e9:.1f} GB are free",
        'loading it would fill the memory: take a machine with a GPU, or WEIGHTS = "tiny"',
    )


def _fetch(project: Path, source: str | Path) -> Path:
    from glmhelpers.weights.download import download_weights
    from glmhelpers.weights.hub import DownloadError

    folder = folders.ROOT / "kaggle" / "temp" / "chatglm-6b" if machine_name() == "Kaggle" else project / "thuglm"
    print(f"weights: neither here nor attached, so they are fetched from {source} to {short(folder)}")
    try:
        download_weights(folder, source)
    except DownloadError as error:
        raise DownloadError(
            f"{error}\nNo internet? Kaggle: Settings > Internet > On; or attach the output of notebook 01; or write "
            'WEIGHTS = "tiny"'
        ) from None
    return folder


def _read_devices(devices: str | Sequence[int | str], gpus: list[InstalledGPU]) -> list[int | str]:
    if devices == "auto":
        return [*(gpu.index for gpu in gpus)] or ["cpu"]
    given = devices.split(",") if isinstance(devices, str) else list(devices)
    if given == ["cpu"]:
        return ["cpu"]
    try:
        wanted: list[int | str] = [int(str(device).removeprefix("cuda:")) for device in given]
    except ValueError as error:
        raise ValueError(f"devices {given} cannot be read: use 'auto', 'cpu' or GPU numbers such as [0, 1]") from error
    for index in wanted:
        if index not in [gpu.index for gpu in gpus]:
            raise ValueError(
                f"GPU {index} was asked for, but this machine has {len(gpus)}: use devices='auto' or 'cpu'"
            )
    return wanted


def report_result(notebook: str, **values: Any) -> Path:
    """Print `RESULT key=value ...` and write them to <output>/results/<notebook>.json; return that path.

    Args:
        notebook: name of the notebook without suffix, such as "04_lora_training".
        values: the key figures, of types that JSON has.
    """
    print("RESULT " + " ".join(f"{key}={value}" for key, value in values.items()))
    path = output_folder() / "results" / f"{notebook}.json"
    write_json(path, values)
    return path
