"""One training step on several GPUs by one of two roads, inside the processes that `processes.py` starts.

one         one process with all GPUs     run_step, GradScaler, clipping, fused AdamW, as the Trainer has it
processes   one process a GPU             PipelineStep and update on PyTorch's schedules, as in glmhelpers.distributed

Both take the same batch, the same random weights (each tensor's depend on its name alone) and the same adapter, so that
losses and gradients can be laid side by side. A process prints one JSON line when a case begins and one when it is
over; of several ranks the first one prints.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from benchmarks.road_bench import (  # noqa: E402
    Bench,
    Case,
    draw_adapter,
    draw_tasks,
    map_of,
    no_dropout,
    result,
    save_gradients,
)
from benchmarks.split_machine import random_net  # noqa: E402
from benchmarks.train_step import update as update_one  # noqa: E402
from glmhelpers.cost_model.gpus import GPU, gpus_here  # noqa: E402
from glmhelpers.cost_model.kept_rates import RATES  # noqa: E402
from glmhelpers.cost_model.stages import is_checkpointed  # noqa: E402
from glmhelpers.devicemap.captured import Captured  # noqa: E402
from glmhelpers.devicemap.plan import DoesNotFit, plan_device_map  # noqa: E402
from glmhelpers.distributed.plan import ProcessPlan, StageCut, even_blocks  # noqa: E402
from glmhelpers.distributed.processes import Processes, joined, make_mesh  # noqa: E402
from glmhelpers.distributed.stage import StageModule, make_stage, parts_of  # noqa: E402
from glmhelpers.distributed.step import PipelineStep, make_scaler, update  # noqa: E402
from glmhelpers.lora.attach import adapter_weights  # noqa: E402
from glmhelpers.training.calibration import measure_machine  # noqa: E402
from glmhelpers.training.measure import prepare  # noqa: E402
from glmhelpers.training.pipeline import run_step  # noqa: E402
from glmhelpers.training.step_recorder import StepRecorder, idle_shares  # noqa: E402

ORDER = "GLM_BENCHMARK_ORDER"
"""Environment variable with the cases, as JSON."""
SCALE = 1024.0
"""Of the GradScalers: random weights overflow with the usual 65536, and a skipped step is no step."""


def one_process(bench: Bench, case: Case, keep: Path | None = None) -> dict[str, Any]:
    """A step of all GPUs in one process.

    Args:
        bench: sizes.
        case: `parts` 0 for the planner's choice.
        keep: folder for the gradients of one step without dropout, and a picture of who worked when.

    Raises:
        DoesNotFit: no plan of the planner does.
    """
    layers = bench.config.num_layers
    if case.parts:
        parts, chunk, seconds = case.parts, 512, None
        places: dict[str, Any] = map_of(even_blocks(layers, case.gpus))
        marks = [block for block, marked in enumerate(is_checkpointed(layers, case.checkpointed)) if marked]
    else:
        cards = bench.cards(case.gpus)
        plan = plan_device_map(bench.config, cards, case.rows, case.length, **bench.settings(case))
        parts, chunk, seconds = plan.micro_batches, plan.setting.loss_chunk, plan.seconds
        places, marks = plan.device_map, plan.checkpointed_layers
    used = sorted({place for place in places.values() if place != "cpu"})
    homes = {part: f"cuda:{place}" if bench.on_gpu and place != "cpu" else "cpu" for part, place in places.items()}
    embedding = homes["transformer.word_embeddings"]
    net = random_net(bench.config, homes, bench.dtype, embedding).place(homes)
    model = prepare(net, marks)
    draw_adapter(model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=SCALE, enabled=bench.on_gpu)
    batch, losses, captured = bench.batch(case), [], Captured(model) if case.cuda_graphs else None

    def gradient() -> torch.Tensor:
        def backward(loss: torch.Tensor) -> None:
            scaler.scale(loss).backward()

        return run_step(model, batch, parts, backward=backward, captured=captured, loss_chunk=chunk)

    def step() -> None:
        losses.append(gradient())
        update_one(scaler, optimizer)

    times = bench.time(step)
    peaks, blocks = bench.peaks(), [list(places.values())[1:-2].count(gpu) for gpu in used]
    facts: dict[str, Any] = {"planned_ms": round(seconds * 1e3, 2)} if seconds else {}
    if keep:
        no_dropout(model)
        draw_adapter(model)
        gradient()
        save_gradients({n: w.grad / scaler.get_scale() for n, w in adapter_weights(model).items()}, keep, case)
        with StepRecorder(model, blocks) as recorder:
            run_step(model, batch, parts, backward=recorder.backward, loss_chunk=chunk)
        facts["idle_share"] = [round(share, 3) for share in idle_shares(recorder.tasks())]
        draw_tasks(recorder.tasks(), keep / f"{case.name}.png")
    forecast = bench.forecast(case, places, marks, parts)
    facts |= {"parts": parts, "planned": not case.parts, "blocks": blocks, "checkpointed": len(marks)}
    facts |= {"peak_bytes": peaks, "predicted_peak_bytes": forecast.peak_bytes}
    return result(
        case, times, loss=losses[0].item(), steps_skipped=int(bench.on_gpu and scaler.get_scale() < SCALE), **facts
    )


class Ranks:
    """One group of processes, and the pipelines that it can be."""

    def __init__(self, bench: Bench, processes: Processes, timeout: float):
        self.bench, self.timeout = bench, timedelta(seconds=timeout)
        self.known: dict[int, Processes] = {processes.mesh["pp"].size(): processes}

    def processes(self, ranks: int) -> Processes:
        """This process among pipelines of so many ranks."""
        if ranks not in self.known:
            some = next(iter(self.known.values()))
            self.known[ranks] = replace(some, mesh=make_mesh(ranks, some.device.type, self.timeout))
        return self.known[ranks]

    def stage(self, plan: ProcessPlan, cut: StageCut, device: torch.device) -> StageModule:
        """With its random weights, and the adapter."""
        places = dict.fromkeys(parts_of(plan, cut), str(device))
        stage = make_stage(random_net(self.bench.config, places, self.bench.dtype, str(device)), plan, cut)
        draw_adapter(stage.model)
        return stage

    def run(self, case: Case, keep: Path | None = None) -> dict[str, Any]:
        """One case; every rank must call it. `keep`: as for `one_process`, for gradients alone, written by rank 0.

        Raises:
            DoesNotFit: the same on all ranks: no plan of this kind fits.
        """
        bench, processes = self.bench, self.processes(case.gpus)
        bench.free()
        road = bench.road(case)
        if not road.fits and not case.parts:
            raise DoesNotFit(f"no plan fits; the best would take {max(road.total_bytes):,} bytes on a GPU", [], {})
        plan: Any = road.plan
        mine = [cut for cut in plan.stages if cut.rank == processes.stage_rank]
        stages = [self.stage(plan, cut, processes.device) for cut in mine]
        weights = {name: weight for stage in stages for name, weight in adapter_weights(stage.model).items()}
        optimizer = torch.optim.AdamW(weights.values(), lr=1e-6, fused=True)
        scaler = make_scaler(processes.device, init_scale=SCALE) if bench.on_gpu else None
        captured = Captured(stages[0].model) if case.cuda_graphs else None
        engine, batch = PipelineStep(stages, plan, processes, scaler=scaler, captured=captured), bench.batch(case)
        found: list[tuple[float, float, bool]] = []

        def step() -> None:
            found.append(update(optimizer, engine(batch), processes, scaler, 1.0))

        times = bench.time(step, agree=from_first)
        peaks = gathered(bench.peaks())
        facts: dict[str, Any] = {"planned": not case.parts, "planned_ms": round(road.seconds * 1e3, 2)}
        facts |= {"parts": plan.micro_batches, "blocks": plan.blocks, "checkpointed": len(plan.checkpointed)}
        facts |= {"peak_bytes": [*chain(*peaks)], "predicted_peak_bytes": road.peak_bytes}
        facts |= {"outside_bytes": [*chain(*gathered(bench.outside()))]}
        facts |= {"loss": found[0][0], "steps_skipped": sum(not taken for _, _, taken in found)}
        if keep:
            for stage in stages:
                no_dropout(stage.model)
                draw_adapter(stage.model)
            engine(batch)
            scale = scaler.get_scale() if scaler else 1.0
            everybody = gathered({name: weight.grad.float().cpu() / scale for name, weight in weights.items()})
            if processes.rank == 0:
                save_gradients({name: grad for part in everybody for name, grad in part.items()}, keep, case)
        return result(case, times, **facts)


def gathered(value: Any) -> list[Any]:
    """What each rank has."""
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, value)
    return everybody


def from_first(seconds: float) -> float:
    """Rank 0's number, on every rank."""
    return gathered(seconds)[0]


def say(**line: Any) -> None:
    """One JSON line, at once."""
    print(json.dumps(line, ensure_ascii=False), flush=True)


def results(cases: list[Case], run: Callable[[Case], dict[str, Any]], alone: bool) -> Iterator[dict[str, Any]]:
    """The line of each case. An error of a process that is alone becomes a line; of one among others it ends all."""
    for number, case in enumerate(cases):
        yield {"begins": number}
        try:
            yield {"result": run(case)}
        except DoesNotFit as refusal:
            yield {"result": {**asdict(case), "skipped": str(refusal)[:300]}}
        except Exception as error:
            if not alone:
                raise
            yield {"result": {**asdict(case), "error": f"{type(error).__name__}: {error}"[:600]}}


def work(cases: list[Case], tiny: bool, timeout: float, keep: Path | None = None) -> None:
    """Run the cases, all of as many processes as were started, and print.

    Args:
        cases: all of the same number of processes.
        tiny: the tiny model's sizes on the CPU.
        timeout: seconds that a rank waits for another.
        keep: folder for gradients and pictures of each case, under its name.
    """
    alone = cases[0].processes == 1
    bench = Bench(tiny, own=None if alone else int(os.environ["LOCAL_RANK"]))
    if tiny:
        torch.set_num_threads(1)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, *([SDPBackend.MATH] if tiny else [])]):
        if alone:
            if bench.on_gpu:
                rates = [{"name": gpu.name, **{rate: getattr(gpu, rate) for rate in RATES}} for gpu in calibrated()]
                say(machine=rates, torch=torch.__version__)
            for line in results(cases, lambda case: one_process(bench, case, keep), alone=True):
                bench.free()
                say(**line)
            return
        with joined(cases[0].gpus, bench.on_gpu, timeout) as processes:
            ranks = Ranks(bench, processes, timeout)
            for line in results(cases, lambda case: ranks.run(case, keep), alone=False):
                if processes.rank == 0:
                    say(**line)


def calibrated() -> list[GPU]:
    """Measure GPUs and host, for all plans of this and later processes; what cannot be measured is the catalogue's."""
    try:
        measure_machine()
    except Exception as error:
        say(warning=f"not calibrated: {type(error).__name__}: {error}"[:600])
    return gpus_here()


def main() -> None:
    """Read what `processes.py` orders from the environment, and do it."""
    order = json.loads(os.environ[ORDER])
    folder = Path(order["keep"]) if order["keep"] else None
    work([Case(**entry) for entry in order["cases"]], order["tiny"], order["timeout"], folder)


if __name__ == "__main__":
    main()
