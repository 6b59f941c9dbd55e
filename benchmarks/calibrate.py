"""Does the calibrated planner know this machine? Predicted seconds and peaks beside measured ones, full size.

    python benchmarks/calibrate.py                   all GPUs at hand and one of them, random weights; about 3 minutes
    python benchmarks/calibrate.py --tiny            the tiny sizes on a machine with a GPU: to see that it runs
    python benchmarks/calibrate.py --slow-host 5     the same on a host that needs 5 ms more for each block and pass
    python benchmarks/calibrate.py --cases 4x1024    only these rows x tokens
    python benchmarks/calibrate.py --cap 14.75 --parts flight --cases 24x1024    a T4's memory, and only point 4

1. measure_machine(): a line with every rate, and how long it took, part by part. Then the host's rates again, on one
   GPU and split over all, with few blocks and with many: how much they vary, and what a cut costs the host.
2. For each case (rows x tokens), number of GPUs, and all or no blocks checkpointed: the plan under that rule, its
   seconds by the catalogue and by the calibration, the seconds measured, peaks predicted and measured. `ms` is the
   median of all steps in about 0.6 s, three at least, and `difference` compares with that; `least_ms` is the step that
   was disturbed least: the difference between the two is the host's noise.
3. For each case: the planner's free choice for all GPUs, and every number of micro-batches timed on them and on one
   GPU, until they are far slower: is the choice the fastest? `slower` is how much slower it is than the best of
   those, 0 if it is the best; `slower_least` the same of the least, which tells noise from a wrong choice.
4. For each case, where memory is short: the best plan for all GPUs in one part, with every micro-batch in flight, and
   with as many as there are GPUs, in turns; `faster` is the ratio of the medians of the second and this one, and
   `against_one_part` of the first and this one; `predicted_faster` is what the planner expects.

One JSON line each, printed at once; an error is one of them. No trial is begun `--budget-s` seconds after the start.
"""

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.decode import random_model
from benchmarks.random_checkpoint import make_config
from benchmarks.slow_host import slow_host
from glmhelpers.cost_model import GPU, gpus_here
from glmhelpers.cost_model.kept_rates import RATES, keep_rates
from glmhelpers.devicemap import DoesNotFit, plan_device_map
from glmhelpers.devicemap.plan import Plan
from glmhelpers.training import measure_machine, run_step
from glmhelpers.training.calibration import HOST_BLOCKS, clear_workspaces, host_launches
from glmhelpers.training.measure import prepare, random_batch
from glmhelpers.utils.timing import Laps, repeated
from glmhelpers.utils.units import GIB
from thuglm import ChatGLMConfig

STEPS = 0.6
"""Seconds of steps under a plan: a dozen of the short ones, which the host's noise moves most."""
HOPELESS = 1.7
"""So many times as slow as fewer parts: yet more parts are not timed."""
OUT_OF_TIME = "out of time: --budget-s"
CASES = ((16, 56), (4, 256), (4, 1024), (1, 2048), (24, 1024))
PARTS = ("host", "case", "choice", "flight")
TURNS = 2
"""Times that each plan of point 4 is run."""
TINY = Path(__file__).resolve().parents[1] / "data" / "tiny-chatglm"


def wait() -> None:
    """Until every GPU has finished."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)


@dataclass(frozen=True)
class Timed:
    """Milliseconds of a step, median and least of all, and the peak of each GPU in bytes."""

    ms: float
    least_ms: float
    peaks: list[int]


class Trial:
    """A model with adapters that is laid out by one plan after the other, and timed."""

    def __init__(self, config: Any, gpus: int):
        model: Any = random_model(config, gpus, torch.float16)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        self.model, self.config = prepare(model, []), config

    def run(self, plan: Plan, rows: int, length: int, repeats: int) -> Timed:
        """Steps under a plan for `STEPS` seconds, at least `repeats`, behind one that is not timed."""
        plan.apply(self.model)
        gc.collect()
        clear_workspaces()  # those of the streams that another plan used
        torch.cuda.empty_cache()
        # A new one each time: the last one's moments lie where the adapters were before.
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6)
        batch = random_batch(self.config, rows, length)

        def step() -> float:
            for index in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(index)
            wait()
            begin = time.perf_counter()
            run_step(self.model, batch, **plan.setting.for_step)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            wait()
            return 1e3 * (time.perf_counter() - begin)

        times = repeated(STEPS, step, repeats)
        peaks = [torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())]
        return Timed(round(statistics.median(times), 1), round(min(times), 1), peaks)


def say(**line: Any) -> None:
    """One result, printed at once."""
    print(json.dumps({"bench": "calibrate", **line}), flush=True)


def parts_of(rows: int) -> list[int]:
    """Numbers of micro-batches worth a trial."""
    return [parts for parts in (1, 2, 4, 8, 16, 24) if rows % parts == 0]


def main() -> None:
    """Measure the machine, then every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=3, help="steps under a plan at least, however long they are")
    parser.add_argument("--budget-s", type=float, default=240)
    parser.add_argument("--slow-host", type=float, default=0.0, metavar="MS", help="wait before each block and pass")
    parser.add_argument("--cases", nargs="+", default=[f"{rows}x{length}" for rows, length in CASES])
    parser.add_argument("--cap", type=float, metavar="GIB", help="of each GPU, plan for and take no more than this")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this machine has no GPU that torch can use: there is nothing to calibrate")
    with slow_host(options.slow_host / 1e3):
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """The whole program, on the host as it now is."""
    deadline = time.perf_counter() + options.budget_s
    config = ChatGLMConfig.from_pretrained(TINY) if options.tiny else make_config("full")
    keep_rates({})
    catalogue = gpus_here()
    found = measure_machine(refresh=True)
    gpus = capped(found.gpus, options.cap) if options.cap else found.gpus
    names = [torch.cuda.get_device_name(index) for index in range(len(gpus))]
    rates = [{name: getattr(gpu, name) for name in RATES} for gpu in gpus]
    took = {"seconds": round(found.seconds, 2), "start_seconds": round(found.start_seconds, 2)}
    took |= {"parts": {part: round(seconds, 2) for part, seconds in found.parts.items()}}
    how = {"notes": found.notes, "slow_host_ms": options.slow_host, "cap_gib": options.cap}
    say(what="rates", gpus=names, torch=torch.__version__, **took, **how, rates=rates)
    split = [f"cuda:{index}" for index in range(len(gpus))]
    ways = 2 * ([["cuda:0"], split] if len(split) > 1 else [["cuda:0"]])
    for devices in ways if "host" in options.parts else []:
        for blocks in (HOST_BLOCKS, 2 * HOST_BLOCKS):
            launches = host_launches(devices, ChatGLMConfig(), Laps(), blocks)
            ms = {name: round(1e3 * seconds, 2) for name, seconds in launches.items()}
            say(what="host", gpus=len(devices), blocks=blocks, launch_ms=ms)
    trial = Trial(config, len(gpus))
    known = {"case": partial(one_case, catalogue=catalogue), "choice": one_choice, "flight": one_flight}
    for rows, length in (map(int, case.split("x")) for case in options.cases):
        for part in (known[name] for name in options.parts if name in known):
            try:
                part(trial, rows, length, gpus, repeats=options.repeats, deadline=deadline)
            except Exception as error:  # of one case: the others go on
                say(what="error", rows=rows, length=length, error=f"{type(error).__name__}: {error}"[:600])
                traceback.clear_frames(error.__traceback__)


def capped(gpus: list[GPU], cap: float) -> list[GPU]:
    """The same GPUs with `cap` GiB of memory, and from now on no more of it to be had."""
    for index, gpu in enumerate(gpus):
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GIB / gpu.memory), index)
    return [replace(gpu, memory=min(gpu.memory, int(cap * GIB))) for gpu in gpus]


def one_case(
    trial: Trial, rows: int, length: int, gpus: list[GPU], catalogue: list[GPU], repeats: int, deadline: float
) -> None:
    """Point 2 of the module's docstring for one case."""
    for count in sorted({1, len(gpus)}):
        for rule in ("all", "none"):
            how = {"checkpointed": rule, "label_share": 0.5}
            if time.perf_counter() > deadline:
                say(what="case", rows=rows, length=length, gpus=count, checkpointed=rule, skipped=OUT_OF_TIME)
                continue
            try:
                plan = plan_device_map(trial.config, gpus[:count], rows, length, **how)
                by_catalogue = plan_device_map(
                    trial.config, catalogue[:count], rows, length, micro_batches=plan.micro_batches, **how
                )
            except DoesNotFit:
                say(what="case", rows=rows, length=length, gpus=count, checkpointed=rule, skipped="does not fit")
                continue
            timed = trial.run(plan, rows, length, repeats)
            say(
                what="case",
                rows=rows,
                length=length,
                gpus=count,
                checkpointed=rule,
                blocks=[len(blocks) for blocks in plan.blocks],
                micro_batches=plan.micro_batches,
                in_flight=plan.setting.in_flight,
                ms=timed.ms,
                least_ms=timed.least_ms,
                predicted_ms=round(1e3 * plan.seconds, 1),
                difference=round(1e3 * plan.seconds / timed.ms - 1, 3),
                catalogue_difference=round(1e3 * by_catalogue.seconds / timed.ms - 1, 3),
                peak_bytes=timed.peaks,
                predicted_peak_bytes=list(plan.peak_bytes),
            )


def one_choice(trial: Trial, rows: int, length: int, gpus: list[GPU], repeats: int, deadline: float) -> None:
    """Point 3 for one case."""
    if time.perf_counter() > deadline:
        say(what="choice", rows=rows, length=length, skipped=OUT_OF_TIME)
        return
    chosen = plan_device_map(trial.config, gpus, rows, length, label_share=0.5)
    took = trial.run(chosen, rows, length, repeats)
    others: dict[str, Any] = {}
    predicted: dict[str, float] = {}
    least = [took.least_ms]
    for count in sorted({1, len(gpus)}):
        fastest = float("inf")
        for parts in parts_of(rows):
            name = f"{count} GPUs, {parts} parts"
            try:
                plan = plan_device_map(trial.config, gpus[:count], rows, length, micro_batches=parts, label_share=0.5)
            except DoesNotFit:
                continue
            if time.perf_counter() > deadline:
                others[name] = OUT_OF_TIME
                continue
            timed = trial.run(plan, rows, length, repeats)
            others[name], predicted[name] = timed.ms, round(1e3 * plan.seconds, 1)
            least.append(timed.least_ms)
            fastest = min(fastest, others[name])
            if others[name] > HOPELESS * fastest:
                break
    medians = [ms for ms in others.values() if ms != OUT_OF_TIME] or [took.ms]
    say(
        what="choice",
        rows=rows,
        length=length,
        blocks=[len(blocks) for blocks in chosen.blocks],
        micro_batches=chosen.micro_batches,
        in_flight=chosen.setting.in_flight,
        ms=took.ms,
        least_ms=took.least_ms,
        predicted_ms=round(1e3 * chosen.seconds, 1),
        others_ms=others,
        others_predicted_ms=predicted,
        slower=round(max(0.0, took.ms / min(medians) - 1), 3),
        slower_least=round(took.least_ms / min(least) - 1, 3),
    )


def one_flight(trial: Trial, rows: int, length: int, gpus: list[GPU], repeats: int, deadline: float) -> None:
    """Point 4 for one case."""
    ways = {"one": {"micro_batches": 1}, "all": {"in_flight": rows}, "few": {"in_flight": len(gpus)}}
    plans = {n: plan_device_map(trial.config, gpus, rows, length, label_share=0.5, **way) for n, way in ways.items()}
    timed: dict[str, list[Timed]] = {name: [] for name in plans}
    for name in TURNS * tuple(plans):
        if time.perf_counter() > deadline:
            say(what="flight", rows=rows, length=length, skipped=OUT_OF_TIME)
            return
        timed[name].append(trial.run(plans[name], rows, length, repeats))
    ms = {name: statistics.median(each.ms for each in turns) for name, turns in timed.items()}
    for name, plan in plans.items():
        say(
            what="flight",
            rows=rows,
            length=length,
            way=name,
            blocks=[len(blocks) for blocks in plan.blocks],
            micro_batches=plan.micro_batches,
            in_flight=plan.setting.in_flight,
            checkpointed=len(plan.checkpointed_layers),
            ms=[each.ms for each in timed[name]],
            least_ms=min(each.least_ms for each in timed[name]),
            predicted_ms=round(1e3 * plan.seconds, 1),
            difference=round(1e3 * plan.seconds / ms[name] - 1, 3),
            peak_bytes=timed[name][-1].peaks,
            predicted_peak_bytes=list(plan.peak_bytes),
            against_one_part=round(ms["one"] / ms[name], 3),
            faster=round(ms["all"] / ms[name], 3),
            predicted_faster=round(plans["all"].seconds / plan.seconds, 3),
        )


if __name__ == "__main__":
    main()
