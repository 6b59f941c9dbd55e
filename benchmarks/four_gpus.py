"""One run on four GPUs of one host: all roads, what the planner said of them, and a rank that is killed.

    python benchmarks/four_gpus.py              four GPUs, full size, each capped to 14.75 GiB; ends within 8 minutes
    python benchmarks/four_gpus.py --gpus 2     the same on two
    python benchmarks/four_gpus.py --tiny       the tiny model's sizes on the CPU, gloo (a test runs this)

    one process   on 1, 2, 3 and 4 GPUs, planned: step, peaks, idle shares, a Gantt chart of each
    processes     pp 4, dp 2 x pp 2, dp 4, planned; their LoRA gradients against those of one process
    killed        the tiny checkpoint: a rank is killed with SIGKILL, torchrun starts all again, losses as unbroken
    ranking       the roads in the order planned and in the order measured, and how far off the seconds were

24 x 1024 and 16 x 56, random float16 weights, no files. Lines, pictures and gradients go to OUT as they come; a road
that does not fit is skipped in words. Everything but the sizes is `processes.py`.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

import psutil  # noqa: E402

from benchmarks.processes import Book, by_processes, run_cases  # noqa: E402
from benchmarks.road_bench import Case  # noqa: E402
from benchmarks.split_machine import TINY  # noqa: E402
from glmhelpers.cost_model.sizes import divisors  # noqa: E402
from glmhelpers.distributed import Job, launch  # noqa: E402

SIZES = {False: ((24, 1024), (16, 56)), True: ((8, 32),)}
"""Tiny or not -> (rows, tokens in a row)."""
STEPS, KILL_AT = 16, 7


def cases_of(tiny: bool, gpus: int) -> list[Case]:
    """All roads on so many GPUs, each as the planner would have it."""
    cases = []
    for rows, length in SIZES[tiny]:
        cases += [Case(rows, length, 0, gpus=count) for count in range(1, gpus + 1) if count in (1, gpus) or not tiny]
        for ranks in divisors(gpus):
            schedule = "1F1B" if ranks > 1 else "GPipe"
            cases.append(Case(rows, length, 0, schedule, ranks, pipelines=gpus // ranks))
    return cases


def compare_gradients(book: Book, folder: Path, cases: list[Case]) -> None:
    """Largest relative distance of a matrix's gradient from one process, for each road."""
    import torch

    for rows, length in dict.fromkeys((case.rows, case.length) for case in cases):
        here = [case for case in cases if (case.rows, case.length) == (rows, length)]
        found = {case: folder / f"{case.name}.pt" for case in here if (folder / f"{case.name}.pt").is_file()}
        alone = next((file for case, file in found.items() if case.processes == 1), None)
        for case, file in found.items():
            if alone is None or case.processes == 1:
                continue
            one, other = (torch.load(path, weights_only=True) for path in (alone, file))
            far = max(((other[name] - gradient).norm() / gradient.norm()).item() for name, gradient in one.items())
            same = {"rows": rows, "length": length, "road": road_name(case.gpus, case.pipelines)}
            book.write(figure="gradients", **same, same_matrices=one.keys() == other.keys(), distance=far)


def road_name(gpus: int, pipelines: int) -> str:
    """As the planner names it."""
    return " x ".join([f"dp {pipelines}"] * (pipelines > 1) + [f"pp {gpus}"] * (gpus > 1))


def rank_roads(book: Book, gpus: int) -> None:
    """For each batch, roads on all GPUs in the order planned and in the order measured."""
    lines = [line for line in book.lines if "ms" in line and "planned_ms" in line]
    lines = [line for line in lines if line["gpus"] * line["pipelines"] == gpus]
    for rows, length in dict.fromkeys((line["rows"], line["length"]) for line in lines):
        here = [line for line in lines if (line["rows"], line["length"]) == (rows, length)]
        names = {id(line): f"{line['schedule']}, {road_name(line['gpus'], line['pipelines'])}" for line in here}
        orders = {
            key: [names[id(line)] for line in sorted(here, key=lambda line, key=key: line[key])]
            for key in ("planned_ms", "ms")
        }
        off = {names[id(line)]: round(line["planned_ms"] / line["ms"] - 1, 3) for line in here}
        same = orders["planned_ms"][0] == orders["ms"][0]
        book.write(figure="ranking", rows=rows, length=length, **orders, same_best=same, planned_off=off)


def killed(book: Book, tiny: bool, gpus: int, folder: Path, until: float) -> None:
    """A run with pipelines of half the GPUs, unbroken; and the same with one rank killed in the middle."""
    rows = [{"instruction": f"数字{i}", "output": f"答案是{i}。"} for i in range(4 * gpus)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    ranks = max(1, gpus // 2)
    cut = {"blocks": ",".join(["8"] if ranks == 1 else [str(8 // ranks)] * ranks), "micro_batches": ranks}
    settings: dict[str, Any] = {"rows_per_step": 2 * gpus, "max_steps": STEPS, "save_steps": 5, "logging_steps": 1}
    device = "cpu" if tiny else "cuda"
    losses, said = {}, []
    for name in ("unbroken", "killed"):
        if time.monotonic() > until:
            raise TimeoutError("no time was left")
        places = {"folder": str(TINY), "rows": str(folder / "rows.jsonl"), "output": str(folder / name)}
        job = Job(**places, **cut, **settings, device=device, learning_rate=1e-3, timeout=30)
        victims: list[int] = []

        def watch(line: str, name: str = name, victims: list[int] = victims) -> None:
            said.append(line)
            if name == "killed" and not victims and line.startswith(f"step {KILL_AT} of"):
                victims.append(kill_a_rank())

        losses[name] = [entry["loss"] for entry in launch(job, gpus, restarts=2, say=watch)]
    far = max(abs(one - other) for one, other in zip(losses["unbroken"], losses["killed"], strict=True))
    resumed = [line for line in said if "goes on from step" in line]
    book.write(figure="killed", processes=gpus, steps=STEPS, resumed=resumed, largest_difference=far)


def kill_a_rank() -> int:
    """SIGKILL for the last rank of the job that this program has started; returns its process id."""
    ranks = [child for child in psutil.Process().children(recursive=True) if "RANK" in child.environ()]
    last = max(ranks, key=lambda child: int(child.environ()["RANK"]))
    last.kill()
    return last.pid


def main() -> None:
    """Measure everything; exit status 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the tiny model's sizes on the CPU")
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=460, help="all must be over then")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", PROJECT / "build")))
    options = parser.parse_args()
    start = time.monotonic()
    book, cases = Book(options.out / "four_gpus.jsonl", "four_gpus"), cases_of(options.tiny, options.gpus)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count, some in by_processes(cases).items():
            share = 0.4 if count == 1 else 0.75
            run_cases(some, options.tiny, book, start + share * options.seconds, folder)
        for picture in folder.glob("*.png"):
            (options.out / picture.name).write_bytes(picture.read_bytes())
        compare_gradients(book, folder, cases)
        rank_roads(book, options.gpus)
        try:
            killed(book, options.tiny, 2 if options.tiny else options.gpus, folder, start + options.seconds - 90)
        except Exception as error:
            book.write(figure="killed", error=f"{type(error).__name__}: {error}"[-1500:])
    sys.exit(any("error" in line for line in book.lines))


if __name__ == "__main__":
    main()
