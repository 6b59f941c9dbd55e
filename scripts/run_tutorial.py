"""Run the course: every notebook in order, each in a fresh kernel, on the tiny checkpoint and the CPU.

    notebooks/01_*.ipynb ... 06_*.ipynb       solutions.ipynb, appendix/*.ipynb
              |  one after the other              |  beside them, if there is a second core: they need nothing of
              |                                   |  each other, and each has a folder of its own below outputs/
              |  nbclient, working folder notebooks/, results below build/tutorial/outputs/
              |  then, in the same kernel and in no reader's way, the checks in tests/notebooks/NN_name.py
              v
    build/tutorial/NN_name.ipynb, NN_name.html         --write: also back into notebooks/, cleaned
    and a table: notebook, seconds, key result

The first failing cell ends the run with exit status 1; nothing is written back then. With --write one notebook runs at
a time: what they measure is printed.

--weights FOLDER gives the notebooks another checkpoint, which they take for the real one (scripts/grow_checkpoint.py
makes one that answers as the tiny one does), and ends with a list of the branches of their cells that did not run.
"""

import argparse
import json
import logging
import multiprocessing
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cell_coverage
import nbformat
from clean_notebook import clean, keep_committed
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert import HTMLExporter
from nbformat import NotebookNode

PROJECT = Path(__file__).resolve().parents[1]
CELL_SECONDS = 600
WIDTH = 110

SETTINGS = {
    "GLM_WEIGHTS": "tiny",
    "GLM_DEVICES": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # The tiny model's products are too small to share: on a busy machine two threads wait for each other for minutes.
    "OMP_NUM_THREADS": "1",
    # Progress bars and hash order would make two runs differ.
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONHASHSEED": "0",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}


class CellFailedError(Exception):
    """A cell failed, timed out or took the kernel down; the message is ready to print."""


@dataclass(frozen=True)
class Outcome:
    """One executed notebook: name without suffix, wall time in seconds, what `report_result` wrote, and its cells."""

    name: str
    seconds: float
    result: dict[str, Any]
    notebook: NotebookNode = field(repr=False)


def find_notebooks(folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """The numbered notebooks in order, the solutions, the appendices; or those of the given names.

    Raises:
        FileNotFoundError: a named notebook, or any notebook at all, is not there.
    """
    if names:
        stems = [name.removesuffix(".ipynb") for name in names]
        appendix = folder / "appendix"
        paths = [(appendix if (appendix / f"{stem}.ipynb").is_file() else folder) / f"{stem}.ipynb" for stem in stems]
    else:
        paths = [*sorted(folder.glob("[0-9][0-9]_*.ipynb")), *folder.glob("solutions.ipynb")]
        paths += sorted(folder.glob("appendix/*.ipynb"))
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        raise FileNotFoundError(f"no {' and no '.join(missing) or 'notebook'} in {folder}")
    return paths


def execute(
    notebook: NotebookNode,
    name: str,
    folder: Path,
    cell_seconds: int = CELL_SECONDS,
    extension: str = "",
    checks: str = "",
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run all cells in a fresh kernel with working folder `folder`; outputs go into `notebook`, in place.

    Args:
        notebook: what to run.
        name: for messages.
        folder: where it runs.
        cell_seconds: a cell that takes longer has failed.
        extension: an IPython extension to load before the first cell.
        checks: code to run after the last cell; it is not kept in `notebook`.
        environment: of the kernel; default: this process's.

    Raises:
        CellFailedError: names notebook, cell, its first lines, and the error.
    """
    started = [0]
    if checks:
        notebook.cells.append(nbformat.v4.new_code_cell(checks))
    client = NotebookClient(
        notebook,
        timeout=cell_seconds,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR", *([f"--IPKernelApp.extra_extensions={extension}"] if extension else [])],
        on_cell_start=lambda cell, cell_index: started.append(cell_index),
    )
    try:
        client.execute(env=dict(os.environ if environment is None else environment))
    except CellExecutionError as error:
        raise CellFailedError(_describe(notebook, name, started[-1], f"{error.ename}: {error.evalue}")) from error
    except CellTimeoutError as error:
        reason = f"still running after {cell_seconds} seconds"
        raise CellFailedError(_describe(notebook, name, started[-1], reason)) from error
    except DeadKernelError as error:
        reason = "the kernel died: a crash in a library, or the machine ran out of memory"
        raise CellFailedError(_describe(notebook, name, started[-1], reason)) from error
    finally:
        if checks:
            notebook.cells.pop()


def _describe(notebook: NotebookNode, name: str, index: int, reason: str) -> str:
    code_cells = sum(cell.cell_type == "code" for cell in notebook.cells[: index + 1])
    lines = notebook.cells[index].source.splitlines()
    shown = [*lines[:5], "..."] if len(lines) > 5 else lines
    reason = re.sub(r"\x1b\[[0-9;]*m", "", reason)
    return "\n".join(
        [
            f"FAILED: {name}, cell {index + 1} of {len(notebook.cells)} (code cell {code_cells})",
            *(f"    | {line}" for line in shown),
            *(f"    {line}" for line in reason.splitlines()),
        ]
    )


def run(
    paths: Sequence[Path],
    build: Path,
    project: Path,
    write: bool = False,
    fresh: bool = False,
    weights: Path | None = None,
    jobs: int = 1,
) -> list[Outcome]:
    """Execute notebooks; write .ipynb and .html to `build`, and back to `paths` if `write`.

    With `weights`, the checkpoint in that folder takes the tiny one's place, and `build` gets NAME.jsonl, the branches
    of the cells of each notebook, see `cell_coverage`.

    Numbered notebooks run in order. With `jobs` > 1 the others run beside them.

    Unless `fresh`, outputs in `paths` that differ from the new ones in durations only are left as they are.

    Raises:
        CellFailedError: from the first cell that fails; that notebook is in `build` as far as it came.
    """
    output = build / "outputs"
    shutil.rmtree(output, ignore_errors=True)  # a training run must not resume from an earlier tutorial
    output.mkdir(parents=True)
    environment = {**os.environ, **SETTINGS}
    if weights is not None:
        environment["GLM_WEIGHTS"] = str(weights)
    extension = cell_coverage.EXTENSION if weights else "chinese_figures" if write else ""
    if extension:
        environment["PYTHONPATH"] = os.pathsep.join([str(PROJECT / "scripts"), str(PROJECT)])

    run_one = partial(_run_one, build=build, project=project, extension=extension, environment=environment)
    done = {path: run_one(path) for path in paths} if jobs == 1 else _run_beside(run_one, paths, jobs)
    outcomes = [done[path] for path in paths]
    if write:
        import chinese_edition  # with Babel, which only those need who write

        chinese = {}
        for path, outcome in zip(paths, outcomes, strict=True):
            chinese[path] = chinese_edition.take_pictures(outcome.notebook)
            _write_text(build / path.name, _as_text(outcome.notebook))
            if not fresh:
                committed = nbformat.read(path, as_version=4)
                clean(committed, project, output)
                keep_committed(outcome.notebook, committed)
            _write_text(path, _as_text(outcome.notebook))
        chinese_edition.keep(chinese, build, project)
    return outcomes


def _run_beside(run_one: Callable[[Path], Outcome], paths: Sequence[Path], jobs: int) -> dict[Path, Outcome]:
    """`run_one` of each path, `jobs` at a time, each in a process that Ctrl-C reaches; one numbered path at a time."""
    waiting, done = list(paths), {}
    running: dict[Future[Outcome], Path] = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        while waiting or running:
            for path in tuple(waiting):
                taken = len(running) == jobs or (_is_numbered(path) and any(map(_is_numbered, running.values())))
                if not taken:
                    waiting.remove(path)
                    running[pool.submit(run_one, path)] = path
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                done[running.pop(future)] = future.result()
    return done


def _is_numbered(path: Path) -> bool:
    return path.stem[:1].isdigit()


def _run_one(path: Path, build: Path, project: Path, extension: str, environment: Mapping[str, str]) -> Outcome:
    """Execute one notebook, clean it, write it to `build` as notebook and as page."""
    output = build / "outputs"
    if not _is_numbered(path):
        output /= path.stem
        output.mkdir()
    words = build / f"{path.stem}.words.jsonl"
    words.unlink(missing_ok=True)
    checks = project / "tests" / "notebooks" / f"{path.stem}.py"
    notebook, start = nbformat.read(path, as_version=4), time.perf_counter()
    try:
        execute(
            notebook,
            path.stem,
            path.parent,
            extension=extension,
            checks=checks.read_text(encoding="utf-8") if checks.is_file() else "",
            environment={
                **environment,
                "GLM_OUTPUT": str(output),
                "GLM_FIGURE_WORDS": str(words),
                cell_coverage.FILE_VARIABLE: str(build / f"{path.stem}.jsonl"),
            },
        )
    except CellFailedError:
        print(f"{path.stem} failed", flush=True)
        nbformat.write(notebook, build / path.name)
        raise
    outcome = Outcome(path.stem, time.perf_counter() - start, _read_result(output, path.stem), notebook)
    print(f"{path.stem}: {outcome.seconds:.1f} s", flush=True)
    clean(notebook, project, output)
    _write_text(build / path.name, _as_text(notebook))
    _write_text(build / f"{path.stem}.html", _as_html(notebook, path.stem))
    return outcome


def _read_result(output: Path, name: str) -> dict[str, Any]:
    path = output / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _as_text(notebook: NotebookNode) -> str:
    nbformat.validate(notebook)
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def _as_html(notebook: NotebookNode, title: str) -> str:
    # Widgets do not live in a page without a kernel, so their loaders are left out.
    exporter = HTMLExporter(require_js_url="", jquery_url="")
    exporter.log.setLevel(logging.ERROR)  # it warns of every figure without alternative text
    html, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": title}})
    return html


def _write_text(path: Path, text: str) -> None:
    draft = path.with_name(path.name + ".part")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def table(outcomes: Sequence[Outcome]) -> str:
    """Notebook, seconds, key result; one notebook a row, long results wrapped."""
    first = max(len("notebook"), *(len(outcome.name) for outcome in outcomes))
    lines = [f"{'notebook':{first}}  seconds  key result", "-" * WIDTH]
    for outcome in outcomes:
        result = "   ".join(f"{key}={_short(value)}" for key, value in outcome.result.items()) or "-"
        start = f"{outcome.name:{first}}  {outcome.seconds:7.1f}  "
        lines += textwrap.wrap(start + result, WIDTH, subsequent_indent=" " * len(start))
    total = sum(outcome.seconds for outcome in outcomes)
    return "\n".join([*lines, "-" * WIDTH, f"{'sum':{first}}  {total:7.1f}"])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the notebooks and print the table; 1 if a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks to run, by name; default: all")
    parser.add_argument("--write", action="store_true", help="rewrite the notebooks themselves, cleaned")
    parser.add_argument("--fresh", action="store_true", help="with --write: take new durations too")
    parser.add_argument("--notebooks", type=Path, default=PROJECT / "notebooks")
    parser.add_argument("--build", type=Path, default=PROJECT / "build" / "tutorial")
    parser.add_argument(
        "--jobs", type=int, help="notebooks at a time; default: 2 if there are two cores, 1 with --write"
    )
    parser.add_argument("--weights", type=Path, help="folder of a checkpoint to take for the real one")
    args = parser.parse_args(argv)
    if args.write and args.weights:
        parser.error("--write is for the tiny model's outputs: leave out --weights")
    weights = args.weights.resolve() if args.weights else None
    folder, build = args.notebooks.resolve(), args.build.resolve()
    jobs = args.jobs or (1 if args.write else min(2, os.cpu_count() or 1))
    start = time.perf_counter()
    try:
        outcomes = run(find_notebooks(folder, args.names), build, folder.parent, args.write, args.fresh, weights, jobs)
    except (CellFailedError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    if weights:
        print(f"\n{cell_coverage.report([build / f'{outcome.name}.jsonl' for outcome in outcomes])}")
    seconds = time.perf_counter() - start
    print(f"\n{table(outcomes)}\nall of it in {seconds:.0f} s\n\nPages to read: {args.build}/*.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
