"""All notebooks at full size, as a reader with T4s meets them: nothing in them is changed.

    tiny checkpoint --> grown to 13.4 GB --> a server on loopback, in the place of the hub
                                                 |  notebook 01 downloads from it
    for each road                                v
      2 GPUs, each looks like a T4      a copy of the project, thuglm/ without weights --> 01 .. 06 --> table
      1 GPU  and 12.7 GB of host memory

    python benchmarks/rehearsal.py                          # both roads, one after the other
    python benchmarks/rehearsal.py --together               # both at once: road 1 shares the last GPU with road 2
    python benchmarks/rehearsal.py --roads 1                # one of them
    python benchmarks/rehearsal.py --notebooks 1=01,05 06   # road 1: these two; every other road: 06
    python benchmarks/rehearsal.py --small                  # on the CPU, 512 wide: only to see that it runs

The host's memory is limited by a control group where one can be made; where not, the table says so. Exit status 1 if a
cell failed. After each notebook, what it showed and its row of the table are in --out, and all of that in --zip: a run
that is cut off loses the notebook at hand only. The weights, 13.4 GB, and the copies are removed at the end.

A notebook that hangs is ended after --limit seconds; NN_name.stacks.txt beside it says where its threads were. The road
goes on with the next one, unless it was 01, and begins none when --seconds are over: one hang never costs a whole call.
"""

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "scripts"), str(PROJECT / "benchmarks")]

import as_t4  # noqa: E402
import nbformat  # noqa: E402
import psutil  # noqa: E402
import run_tutorial  # noqa: E402
from clean_notebook import clean  # noqa: E402
from grow_checkpoint import TINY, grow  # noqa: E402

from glmhelpers.utils.markdown import markdown_table  # noqa: E402

COPIED = ("thuglm", "glmhelpers", "notebooks", "data", "benchmarks", "pyproject.toml", "constraints.txt")
FOUND = (str(PROJECT / "benchmarks" / "ranks_as_t4"), str(PROJECT / "benchmarks"))  # by kernels, and by their ranks
PLACE = {"repo_id": "rehearsal/chatglm-6b", "revision": "0" * 40}
TRAINING = ("03", "04")  # notebooks that train, and predict it for the machine at hand
HOST_GB = 12.7  # what a free Colab session has
LEAST_SECONDS = 30  # with fewer left, no notebook is begun
SMALL = {"hidden_size": 512, "heads": 8, "layers": 12, "inner_hidden_size": 512, "vocab_size": 2528}


class Hub(SimpleHTTPRequestHandler):
    """Serves the files of one folder, whatever repository and revision they are asked of."""

    def translate_path(self, path: str) -> str:
        """The file of that name in the folder."""
        return str(Path(self.directory) / Path(super().translate_path(path)).name)

    def copyfile(self, source: Any, outputfile: Any) -> None:
        """Send by the kernel, or two downloads at once would wait for one Python."""
        self.connection.sendfile(source)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


def serve(folder: Path) -> ThreadingHTTPServer:
    """A server on loopback, running; `server_port` is its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def copy_project(weights: Path, project: Path) -> None:
    """The project without weights, and in thuglm/ the list of what the hub has."""
    for name in COPIED:
        if (PROJECT / name).is_dir():
            leave = shutil.ignore_patterns("*.bin", "__pycache__") if name == "thuglm" else None
            shutil.copytree(PROJECT / name, project / name, ignore=leave)
        else:
            shutil.copy(PROJECT / name, project / name)
    manifest = json.loads((weights / "weights_manifest.json").read_text(encoding="utf-8"))
    (project / "thuglm" / "weights_manifest.json").write_text(json.dumps(manifest | {"huggingface": PLACE}))


def control_group(process: int) -> tuple[Path, str]:
    """Where the control group for a process would be, and the name of its file for the limit."""
    unified = Path("/sys/fs/cgroup/cgroup.controllers").is_file()
    root = Path("/sys/fs/cgroup") if unified else Path("/sys/fs/cgroup/memory")
    return root / f"rehearsal-{process}", "memory.max" if unified else "memory.limit_in_bytes"


def limit_host(limit: int) -> str:
    """Put this process and its children into a control group of `limit` bytes; returns what became of it."""
    group, name = control_group(os.getpid())
    with contextlib.suppress(OSError):
        (group.parent / "cgroup.subtree_control").write_text("+memory")
    try:
        group.mkdir()
        (group / name).write_text(str(limit))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        return f"not limited: no control group can be made here ({error.strerror})"
    return f"limited to {limit / 1e9:.1f} GB"


def chosen(words: Sequence[str], gpus: int) -> set[str]:
    """Numbers of the notebooks that a road runs: of "2=01,04" for that road, else of "01,04"; empty: all of them.

    Raises:
        ValueError: a word is neither.
    """
    found = {}
    for word in words:
        if not re.fullmatch(r"(\d=)?\d\d(,\d\d)*", word):
            raise ValueError(f"--notebooks {word}: write 01,04 for all roads, or 2=01,04 for the road with 2 GPUs")
        road, _, numbers = word.rpartition("=")
        found[road] = set(numbers.split(","))
    return found.get(str(gpus), found.get("", set()))


@contextlib.contextmanager
def kept(out: Path, archive: Path) -> Iterator[None]:
    """What is written to `out` meanwhile is packed, with all that is there; two roads do so one after the other."""
    with (out / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        about = json.loads((out / "machine.json").read_text(encoding="utf-8"))
        (out / "table.md").write_text(table(read_rows(out)) + f"\n\n{about['seconds']}\n", encoding="utf-8")
        draft = archive.with_suffix(".part")
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as packed:
            for path in sorted(out.rglob("*.*")):
                with contextlib.suppress(FileNotFoundError):  # the other road's kernel has ended: no stacks
                    packed.write(path, path.relative_to(out))
        draft.replace(archive)


def read_rows(out: Path) -> list[dict[str, Any]]:
    """The rows of all roads so far."""
    paths = sorted(out.glob("[0-9]_gpus.json"), reverse=True)
    return [row for path in paths for row in json.loads(path.read_text(encoding="utf-8"))]


def walk(project: Path, gpus: int, hub: str, options: argparse.Namespace) -> None:
    """Run the notebooks of a copied project; one row for each that was run, the last one may have failed."""
    host = limit_host(int(HOST_GB * 1e9)) if gpus == 1 else "not limited"
    print(f"{gpus} GPUs, host memory {host}", flush=True)
    out = options.out / f"{gpus}_gpus"
    out.mkdir(exist_ok=True)
    for answer in ("GLM_WEIGHTS", "GLM_DEVICES", "HF_HUB_OFFLINE"):  # the notebooks find out for themselves
        os.environ.pop(answer, None)
    os.environ.update(
        GLM_OUTPUT=str(project / "outputs"),
        HF_ENDPOINT=hub,
        HF_DATASETS_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        # As on Kaggle. Threads that spin while they wait for one another keep those of the other road from working:
        # with two kernels on two cores, a step of the tiny model took 22 s instead of 0.13.
        OMP_NUM_THREADS="4",
        OMP_WAIT_POLICY="passive",
        PYTHONPATH=os.pathsep.join(filter(None, (*FOUND, os.environ.get("PYTHONPATH")))),
    )
    rows: list[dict[str, Any]] = []
    numbers = chosen(options.notebooks, gpus)
    for path in sorted((project / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        if numbers and path.stem[:2] not in numbers:
            continue
        if options.small:  # fewer bytes than real weights have are not found without being named
            os.environ["GLM_WEIGHTS"] = "real" if path.stem[:2] == "01" else str(project / "thuglm")
        row = {"gpus": gpus, "notebook": path.stem, "host": host, "seconds": 0.0, "ok": False}
        left = min(options.limit, options.until - time.monotonic())
        if left < LEAST_SECONDS:
            rows.append(row | {"why": "no time was left"})
        else:
            rows.append(row | run_one(path, out, project, left))
        with kept(options.out, options.zip):
            (options.out / f"{gpus}_gpus.json").write_text(json.dumps(rows), encoding="utf-8")
        print(json.dumps(rows[-1]), flush=True)
        if path.stem[:2] == "01" and not rows[-1]["ok"]:
            break


def run_one(path: Path, out: Path, project: Path, seconds: float) -> dict[str, Any]:
    """Run one notebook, at most so many seconds; it goes to `out` as far as it came. Returns its part of the row."""
    peaks = out / f"{path.stem}.peaks.json"
    os.environ |= {as_t4.FILE_VARIABLE: str(peaks), as_t4.LIMIT_VARIABLE: f"{seconds:.0f}"}
    notebook, started, found = nbformat.read(path, as_version=4), time.perf_counter(), {"ok": True}
    try:
        run_tutorial.execute(notebook, path.stem, path.parent, round(seconds + 30), as_t4.EXTENSION)
    except (run_tutorial.CellFailedError, RuntimeError) as failure:  # RuntimeError: the kernel did not start
        found = {"ok": False}
        print(failure, file=sys.stderr, flush=True)
    end_leftovers(peaks)
    stacks = as_t4.stacks_file(peaks)
    if stacks.is_file() and stacks.stat().st_size:
        found["why"] = f"stopped after {seconds:.0f} s, its stacks are kept"
    else:
        stacks.unlink(missing_ok=True)
    clean(notebook, project, project / "outputs")
    nbformat.write(notebook, out / path.name)
    found |= json.loads(peaks.read_text()) if peaks.is_file() else {}
    if path.stem[:2] not in TRAINING:  # their plans are for machines that are only talked about
        found["predicted_peak_bytes"] = []
    return found | {"seconds": round(time.perf_counter() - started, 1)}


def end_leftovers(place: Path) -> None:
    """End the kernel of a notebook, or of a road (by the place of its peaks), and all that it has left behind, such as
    ranks that hold a GPU: they have its variables."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(as_t4.FILE_VARIABLE, "").startswith(str(place)):
                process.kill()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""

    def gib(sizes: Sequence[int]) -> str:
        return ", ".join(f"{size / 2**30:.2f}" for size in sizes) or "-"

    return markdown_table(
        [
            {
                "GPUs": str(row["gpus"]),
                "notebook": row["notebook"],
                "seconds": f"{row['seconds']:.0f}",
                "peak predicted, GiB": gib(row.get("predicted_peak_bytes", [])),
                "measured, GiB": gib(row.get("peak_bytes", [])),
                "host peak, GB": f"{row.get('host_bytes', 0) / 1e9:.1f}, {row['host']}",
                "result": "passed" if row["ok"] else "FAILED" + (f": {row['why']}" if "why" in row else ""),
            }
            for row in rows
        ]
    )


def machine_text() -> str:
    """What the rehearsal ran on, in words; asked before the GPUs are disguised."""
    import torch
    import transformers

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cards = (
        f"{len(names)} x {names[0]}, made to look like T4s (14.75 GiB each, their attention kernel)"
        if names
        else "no GPU"
    )
    return f"{cards}, torch {torch.__version__}, transformers {transformers.__version__}, {time.strftime('%-d %B %Y')}"


def road(options: argparse.Namespace, work: Path, hub: str, gpus: int) -> None:
    """One road in a process of its own, since a control group is left by ending only."""
    project = work / f"{gpus}_gpus"
    project.mkdir()
    copy_project(work / "weights", project)
    numbers = chosen(options.notebooks, gpus)
    if numbers and "01" not in numbers:  # as notebook 01 leaves them
        for path in (work / "weights").iterdir():
            copy = project / "thuglm" / path.name
            if copy.name == "weights_manifest.json":
                continue
            copy.unlink(missing_ok=True)
            os.link(path, copy)
    until = options.until + (0 if options.together else options.seconds * options.roads.index(gpus))
    first = max(options.roads) - gpus if options.together else 0
    settings = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(first, first + gpus)))}
    if options.together:
        settings[as_t4.SHARED_VARIABLE] = "1"
    inner = ["--walk", str(project), "--hub", hub, "--roads", str(gpus), "--until", str(until)]
    process = subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], *inner],
        env={**os.environ, **settings},
    )
    try:
        killed = process.wait(max(1.0, until + 20 - time.monotonic())) != 0
    except subprocess.TimeoutExpired:
        process.kill()
        killed = bool(process.wait())
        end_leftovers(options.out / f"{gpus}_gpus")
    with contextlib.suppress(OSError):  # the group that it may have made, empty now
        control_group(process.pid)[0].rmdir()
    shutil.rmtree(project, ignore_errors=True)  # --work is emptied at the end
    if killed:
        row = {"gpus": gpus, "notebook": "the rest", "seconds": 0.0, "host": "not known", "ok": False}
        row["why"] = "its process was killed"
        with kept(options.out, options.zip):
            rows = [row for row in read_rows(options.out) if row["gpus"] == gpus]
            (options.out / f"{gpus}_gpus.json").write_text(json.dumps([*rows, row]), encoding="utf-8")


def main() -> None:
    """Grow, serve, walk the roads, print the table; exit status 1 if a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--roads", type=int, nargs="+", default=[2, 1], help="numbers of GPUs")
    parser.add_argument("--together", action="store_true", help="all roads at once")
    parser.add_argument("--notebooks", nargs="+", default=[], metavar="[ROAD=]01,04", help="default: all of them")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--limit", type=float, default=160, help="seconds for a notebook")
    parser.add_argument("--seconds", type=float, default=500, help="for all roads at once, or for each road")
    parser.add_argument("--out", type=Path, default=PROJECT / "build" / "rehearsal")
    parser.add_argument("--zip", type=Path, help="default: beside --out")
    parser.add_argument("--work", type=Path, default=PROJECT / "build", help="where 45 GB are free for a while")
    for inner in ("--walk", "--hub"):
        parser.add_argument(inner, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.until = options.until or time.monotonic() + options.seconds
    options.out, options.zip = options.out.resolve(), (options.zip or options.out.with_suffix(".zip")).resolve()
    if options.walk:
        walk(Path(options.walk), options.roads[0], options.hub, options)
        return
    try:
        for gpus in options.roads:
            chosen(options.notebooks, gpus)
    except ValueError as error:
        parser.error(str(error))
    import torch

    if not options.small and max(options.roads) > torch.cuda.device_count():
        sys.exit(f"--roads {max(options.roads)}: this machine has {torch.cuda.device_count()} GPUs; --roads 1, or 0")
    for folder in (options.out, options.work, options.zip.parent):
        folder.mkdir(parents=True, exist_ok=True)
    for old in options.out.glob("[0-9]_gpus.json"):
        old.unlink()
    seconds = "The roads ran beside each other: their seconds are not to be compared." if options.together else ""
    (options.out / "machine.json").write_text(json.dumps({"text": machine_text(), "seconds": seconds}))
    with tempfile.TemporaryDirectory(dir=options.work, ignore_cleanup_errors=True) as work:
        started = time.perf_counter()
        weights = grow(TINY, Path(work) / "weights", **(SMALL if options.small else {}))
        print(f"grown in {time.perf_counter() - started:.1f} s", flush=True)
        server = serve(weights)
        with ThreadPoolExecutor(len(options.roads) if options.together else 1) as pool:
            hub = f"http://127.0.0.1:{server.server_port}"
            list(pool.map(partial(road, options, Path(work), hub), options.roads))
        server.shutdown()
    with kept(options.out, options.zip):
        pass
    rows = read_rows(options.out)
    print((options.out / "table.md").read_text(encoding="utf-8"))
    print(f"{time.perf_counter() - started:.0f} s from growing to the last cell; {options.zip} holds all of it")
    sys.exit(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    main()
