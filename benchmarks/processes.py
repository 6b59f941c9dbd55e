"""One process a GPU against one process for all: step time and peaks on two GPUs of one host, one JSON line a figure.

    python benchmarks/processes.py              two GPUs, full size, each capped to 14.75 GiB; ends within 4 minutes
    python benchmarks/processes.py --tiny       the tiny model's sizes on the CPU, gloo (a test runs this)

    24 x 1024 in 8 parts      one process: 1 part, 8 parts, planned     processes: GPipe, 1F1B, interleaved
    16 x 56, 4 x 256          one process: 1 part, planned, graphs      processes: few parts; one pipeline, or two (of
                                                                        one rank each: with graphs and without)

Weights are random, float16 and made on the GPUs; adapters are float32 with a GradScaler; attention runs on the kernel
that a T4 has. First the machine is calibrated, so that the plans are made for it. Every result is printed and appended
to OUT/processes.jsonl as it comes; a case that fails or hangs becomes a line, and the next one starts in new processes.
What the ranks of such a case wrote on stderr is in OUT/processes.stderr.txt; if it hangs, where all their threads are.
The last lines compare: how much faster than one part, and than the best way in one process without CUDA graphs.
"""

import argparse
import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"""NVLink multicast can put GPUs that others share out of service."""
os.environ |= NO_MULTICAST
# All processes are on this host, whose name a bare machine may not be able to look up.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

from benchmarks.road_bench import Case  # noqa: E402
from benchmarks.roads import ORDER  # noqa: E402

START, CASE, PATIENCE = 75.0, 45.0, 40.0
"""Seconds: until the first case begins, for a case, and that a rank waits for another; on a CPU three times that."""

SIZES = {False: ((24, 1024, 8), (16, 56, 2), (4, 256, 2)), True: ((8, 32, 4), (4, 16, 2))}
"""Tiny or not -> (rows, tokens in a row, parts)."""


def cases_of(tiny: bool) -> list[Case]:
    """All that is measured: first in one process, then in two."""
    (rows, length, parts), *short = SIZES[tiny]
    long = [Case(rows, length, count) for count in (1, parts, 0)]
    cases = long + [Case(*size[:2], count, checkpointed="none") for size in short for count in (1, 0)]
    cases += [Case(*size[:2], checkpointed="none", cuda_graphs=True) for size in short]
    twice = {"schedule": "Interleaved1F1B", "stages_per_rank": 2}
    cases += [Case(rows, length, parts, name) for name in ("1F1B", "GPipe")] + [Case(rows, length, parts, **twice)]
    cases += [Case(rows, length, 0, "1F1B"), Case(rows, length, 0, **twice)]
    for rows, length, parts in short:
        size: dict[str, Any] = {"rows": rows, "length": length, "checkpointed": "none"}
        cases.append(Case(**size, schedule="GPipe"))
        cases += [Case(**size, parts=parts, schedule=name) for name in ("1F1B", "GPipe")]
        cases.append(Case(**size, parts=parts, **twice))
        cases += [Case(**size, schedule="GPipe", gpus=1, pipelines=2, cuda_graphs=graphs) for graphs in (False, True)]
    cases += [Case(*size[:2], 0, "GPipe", checkpointed="none") for size in short]
    return cases


class Book:
    """Where results go: to the screen and to a file, at once."""

    def __init__(self, path: Path, bench: str):
        self.path, self.bench = path, bench
        self.lines: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **line: Any) -> None:
        """One JSON line."""
        self.lines.append(line)
        text = json.dumps({"bench": self.bench, **line}, ensure_ascii=False)
        print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def keep(self, text: str) -> None:
        """What is too long for a line goes to a file of its own beside the lines."""
        with self.path.with_suffix(".stderr.txt").open("a", encoding="utf-8") as file:
            file.write(f"==== {json.dumps(self.lines[-1], ensure_ascii=False)[:200]}\n{text}\n")


class Group:
    """Some processes of `roads.py` that run cases together; `messages` yields what the first one says.

    Args:
        cases: all for the same number of processes.
        tiny: sizes.
        folder: for what they write on stderr.
        keep: folder for gradients and pictures, or None.
    """

    def __init__(self, cases: list[Case], tiny: bool, folder: Path, keep: Path | None = None):
        self.folder, self.said, self.slower = folder, queue.Queue[str | None](), 3 if tiny else 1
        order = {
            "cases": [asdict(case) for case in cases],
            "tiny": tiny,
            "timeout": PATIENCE * self.slower,
            "keep": str(keep) if keep else None,
        }
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        count = cases[0].processes
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        own = {ORDER: json.dumps(order), "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "4"}
        own |= {"PYTHONFAULTHANDLER": "1"}  # for `abort`
        self.processes: list[subprocess.Popen[str]] = []
        self.notes: list[str] = []
        with ExitStack() as files:
            for rank in range(count):
                errors = files.enter_context(self.errors(rank).open("w"))
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, str(PROJECT / "benchmarks" / "roads.py")],
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        text=True,
                        env={**os.environ, **own, **where, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    )
                )
        for rank, process in enumerate(self.processes):
            threading.Thread(target=self.listen, args=(rank, process.stdout), daemon=True).start()

    def errors(self, rank: int) -> Path:
        """What a rank writes on stderr."""
        return self.folder / f"stderr-{rank}.txt"

    def listen(self, rank: int, lines: IO[str]) -> None:
        """Pass on what the first rank prints, and that any of them has ended."""
        for text in lines:
            if rank == 0 and text.startswith("{"):
                self.said.put(text)
            elif text.startswith("["):  # a note
                self.notes.append(f"rank {rank}: {text.strip()}")
        if self.processes[rank].wait() or rank == 0:
            self.said.put(None)

    def messages(self, until: float) -> Iterator[dict[str, Any]]:
        """What the first rank says, until a process ends or time is up (seconds of time.monotonic): then `ended`."""
        limit = time.monotonic() + START * self.slower
        while True:
            try:
                text = self.said.get(timeout=max(0.0, min(limit, until) - time.monotonic()))
            except queue.Empty:
                self.abort()
                yield {"ended": "time is up" if time.monotonic() >= until else "it hung"}
                return
            if text is None:
                codes = [process.poll() for process in self.processes]
                if codes[0] != 0:
                    self.abort(3.0)  # those that wait for the one that has failed
                yield {"ended": "" if codes[0] == 0 else f"exit codes {codes}"}
                return
            line = json.loads(text)
            if "begins" in line:
                limit = time.monotonic() + CASE * self.slower
            yield line

    def texts(self) -> list[str]:
        """What each rank wrote on stderr."""
        return [self.errors(rank).read_text(errors="replace") for rank in range(len(self.processes))]

    def last_words(self) -> str:
        """The end of what each rank wrote on stderr; of one that was aborted, where its main thread was."""
        texts = self.texts()
        places = [text.rpartition("Current thread")[2][:700] if "Current thread" in text else "" for text in texts]
        return " | ".join(place or text[-700:].strip() for place, text in zip(places, texts, strict=True))

    def abort(self, patience: float = 0.0) -> None:
        """Let ranks that have not ended after `patience` seconds write where each of their threads is, and end."""
        self.wait(patience)
        for process in self.processes:
            process.send_signal(signal.SIGABRT)
        self.wait(5.0)

    def wait(self, seconds: float) -> None:
        """Until all have ended, or so many seconds."""
        until = time.monotonic() + seconds
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))

    def all_words(self) -> str:
        """All of it, rank by rank, behind what they said on stdout."""
        return "\n".join(self.notes) + "\n".join(f"---- rank {rank}\n{text}" for rank, text in enumerate(self.texts()))

    def end(self) -> None:
        """Let nothing stay behind."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def run_cases(cases: list[Case], tiny: bool, book: Book, until: float, keep: Path | None = None) -> None:
    """Run cases of one number of processes; behind one that fails, the others run in new processes."""
    with tempfile.TemporaryDirectory() as folder:
        while cases and time.monotonic() < until:
            group, begun = Group(cases, tiny, Path(folder), keep), -1
            try:
                for message in group.messages(until):
                    begun = message.get("begins", begun)
                    if "result" in message:
                        book.write(**message["result"])
                    elif "machine" in message or "warning" in message:
                        book.write(**message)
                    elif message.get("ended"):
                        case = asdict(cases[begun]) if begun >= 0 else {}
                        book.write(**case, error=f"{message['ended']}: {group.last_words()}"[:2000])
                        book.keep(group.all_words())
                    elif "ended" in message:
                        return
            finally:
                group.end()
            if begun < 0:
                return
            cases = cases[begun + 1 :]


def compare(book: Book) -> None:
    """For each batch and road, how many times as fast as one part, and as the best in one process without graphs."""
    measured = [line for line in book.lines if "ms" in line]
    for rows, length in dict.fromkeys((line["rows"], line["length"]) for line in measured):
        here = [line for line in measured if (line["rows"], line["length"]) == (rows, length)]
        alone = [line for line in here if line["schedule"] == "one process"]
        if not alone:
            continue
        best = min(line["ms"] for line in alone if not line["cuda_graphs"])
        for line in here:
            names = ("schedule", "parts", "gpus", "pipelines", "stages_per_rank", "cuda_graphs", "ms")
            facts = {name: line[name] for name in names}
            times = {
                "against_one_part": round(alone[0]["ms"] / line["ms"], 2),
                "against_best": round(best / line["ms"], 2),
            }
            book.write(figure="compare", rows=rows, length=length, **facts, **times)


def by_processes(cases: Iterable[Case]) -> dict[int, list[Case]]:
    """Number of processes -> the cases for so many."""
    groups: dict[int, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.processes, []).append(case)
    return groups


def main() -> None:
    """Measure everything; exit status 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the tiny model's sizes on the CPU")
    parser.add_argument("--seconds", type=float, default=225, help="all must be over then")
    parser.add_argument("--sizes", nargs="+", metavar="16x56", help="only these rows x tokens")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", PROJECT / "build")))
    options = parser.parse_args()
    start = time.monotonic()
    book = Book(options.out / "processes.jsonl", "processes")
    wanted = [case for case in cases_of(options.tiny) if case.size in (options.sizes or [case.size])]
    for count, cases in by_processes(wanted).items():
        share = 0.5 if count == 1 else 1.0
        run_cases(cases, options.tiny, book, start + share * options.seconds)
    compare(book)
    sys.exit(any("error" in line for line in book.lines))


if __name__ == "__main__":
    main()
