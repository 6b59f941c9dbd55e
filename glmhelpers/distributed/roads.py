"""Which road is faster on a machine, and by how much: one process for all GPUs, or one process for each?

    one process       one interpreter starts all kernels; embedding and head may share a tensor      Plan
    pp R              a pipeline of R processes: GPipe, 1F1B, interleaved                            ProcessPlan
    dp D              D processes with the whole model each, rows shared out, gradients summed       ProcessPlan
    dp D x pp R       D such pipelines                                                               ProcessPlan

For each road the best plan that fits is looked for: how many parts, where the cuts are, which blocks need not be
checkpointed. Seconds come from the simulation in `devicemap.schedules`, bytes from its ledger.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from glmhelpers.cost_model.gpus import GPU, find_gpus
from glmhelpers.cost_model.sizes import Setting, Shape, divisors
from glmhelpers.cost_model.stages import Stage
from glmhelpers.cost_model.step_memory import hidden_bytes, lora_bytes, slack_bytes, stage_terms
from glmhelpers.cost_model.step_time import StageTime, Task, stage_seconds
from glmhelpers.devicemap.plan import DoesNotFit, Plan, plan_device_map
from glmhelpers.devicemap.schedules import all_reduce_seconds, rank_terms, run_order, work_order
from glmhelpers.distributed.plan import SCHEDULES, ProcessPlan, even_blocks
from glmhelpers.utils.markdown import markdown_table
from glmhelpers.utils.units import GIB, MIB

NCCL_BYTES = 256 * MIB
"""What NCCL takes on each GPU beside tensors; an estimate."""

MOST_PARTS = 32
"""More parts than these are not tried: each costs launches, and the bubble is small by then."""

FEWER = 4
"""The last rank, which has the head, is tried with up to so many blocks less than its share."""


@dataclass(frozen=True)
class Road:
    """One way to train on all GPUs of a machine.

    Attributes:
        name: "one process", "pp 2, 1F1B", "dp 2", "dp 2 x pp 2, GPipe".
        seconds: of a step.
        terms: for each GPU, bytes by term (keys of TERMS) at its worst moment.
        total_bytes: with the allocator's slack, the CUDA context and NCCL.
        fits: is every total within its GPU?
        plan: a Plan for one process, a ProcessPlan for several.
        pipelines: how many; 1 for one process.
        tasks: who works when, of one pipeline; for `plots.draw_schedule`.
    """

    name: str
    seconds: float
    terms: list[dict[str, int]]
    total_bytes: list[int]
    fits: bool
    plan: Plan | ProcessPlan
    pipelines: int
    tasks: list[Task]

    @property
    def peak_bytes(self) -> list[int]:
        """For each GPU, bytes in tensors at its worst moment: torch.cuda.max_memory_allocated."""
        return [sum(terms.values()) for terms in self.terms]

    @property
    def busy(self) -> float:
        """Part of all GPUs' time in which they work, 0 to 1."""
        used = self.pipelines * sum(task.end - task.start for task in self.tasks)
        return used / (self.seconds * len(self.terms))


def contents(plan: ProcessPlan) -> list[list[tuple[int, Stage]]]:
    """For each rank of a pipeline, index and contents of its stages."""
    ranks: list[list[tuple[int, Stage]]] = [[] for _ in plan.blocks]
    for cut in plan.stages:
        marks, both = tuple(block in plan.checkpointed for block in cut.blocks), cut.first and cut.last
        ranks[cut.rank].append((cut.index, Stage(marks, cut.first, cut.last, both, cut.first)))
    return ranks


def forecast_processes(
    config: Any,
    plan: ProcessPlan,
    gpus: Any,
    batch_size: int,
    seq_length: int,
    pipelines: int = 1,
    **settings: Any,
) -> Road:
    """Seconds and bytes of one plan.

    Args:
        config: ChatGLMConfig, or a dict with its keys.
        plan: of each pipeline.
        gpus: as for `plan_device_map`, one for each process; pipeline by pipeline.
        batch_size: rows of a step, of all pipelines together; filled up where they cannot be shared out evenly.
        seq_length: tokens in a row.
        pipelines: how many.
        settings: further fields of `sizes.Setting`, as for `plan_device_map`.

    Raises:
        ValueError: too few GPUs.
    """
    shape, cards = Shape.of(config), find_gpus(gpus)
    if len(cards) != pipelines * plan.ranks:
        raise ValueError(
            f"{pipelines} pipelines of {plan.ranks} ranks need {pipelines * plan.ranks} GPUs: {len(cards)}"
        )
    rows = -(-batch_size // (pipelines * plan.micro_batches)) * plan.micro_batches
    setting = Setting(rows, seq_length, plan.micro_batches, **settings)
    setting = replace(setting, cuda_graphs=setting.cuda_graphs and plan.whole)
    terms, totals = _bytes(shape, setting, plan, cards, pipelines)
    tasks = _tasks(shape, setting, plan, cards)
    lora = lora_bytes(shape, setting, max(plan.blocks))
    seconds = max(task.end for task in tasks)
    if pipelines > 1:
        seconds += all_reduce_seconds(lora, pipelines, min(cards, key=lambda gpu: gpu.link))
    fits = all(total <= gpu.memory for total, gpu in zip(totals, cards, strict=True))
    return Road(_name(plan, pipelines), seconds, terms, totals, fits, plan, pipelines, tasks)


def _name(plan: ProcessPlan, pipelines: int) -> str:
    parts = [f"dp {pipelines}"] * (pipelines > 1) + [f"pp {plan.ranks}"] * (plan.ranks > 1)
    return " x ".join(parts or ["one rank"]) + (f", {plan.schedule}" if plan.ranks > 1 else "")


def _bytes(
    shape: Shape, setting: Setting, plan: ProcessPlan, cards: Sequence[GPU], pipelines: int
) -> tuple[list[dict[str, int]], list[int]]:
    """For each GPU: terms, and their sum with what is outside of tensors."""
    orders = work_order(plan.schedule, plan.ranks, plan.stages_per_rank, plan.micro_batches)
    held = contents(plan)
    known: dict[tuple[int, int], dict[str, int]] = {}
    found = []
    for number, gpu in enumerate(cards):
        rank = number % plan.ranks
        key = rank, gpu.gemm_workspace
        if key not in known:
            if setting.recorded:  # the step of one process, and buckets for the sum of gradients
                known[key] = dict(stage_terms(shape, setting, held[rank][0][1], gpu.gemm_workspace)[1])
                known[key]["gradients"] += known[key]["lora"] * (pipelines > 1)
            else:
                known[key] = rank_terms(shape, setting, held[rank], orders[rank], gpu.gemm_workspace, pipelines)
        found.append(known[key])
    nccl = NCCL_BYTES * (len(cards) > 1)
    totals = [
        sum(terms.values()) + slack_bytes(terms) + gpu.context + nccl for terms, gpu in zip(found, cards, strict=True)
    ]
    return found, totals


def _tasks(shape: Shape, setting: Setting, plan: ProcessPlan, cards: Sequence[GPU]) -> list[Task]:
    """Who works when in the slowest pipeline that could be made of these cards."""
    times: list[StageTime] = [StageTime(0.0, 0.0)] * len(plan.stages)
    for rank, stages in enumerate(contents(plan)):
        for index, stage in stages:
            each = [
                stage_seconds(shape, setting, stage, replace(gpu, link=float("inf")))
                for gpu in cards[rank :: plan.ranks]
            ]
            times[index] = max(each, key=lambda time: time.forward + time.backward)
    transfer = hidden_bytes(shape, setting) / min(gpu.link for gpu in cards)
    return run_order(work_order(plan.schedule, plan.ranks, plan.stages_per_rank, plan.micro_batches), times, transfer)


def compare_roads(config: Any, gpus: Any, batch_size: int, seq_length: int, **settings: Any) -> list[Road]:
    """Every road for a machine with the best plan for it, those that fit first, the fastest first of those.

    Args:
        config: ChatGLMConfig, or a dict with its keys.
        gpus: as for `plan_device_map`; "here" for this machine as it was measured.
        batch_size: rows of a step; seq_length: tokens in a row.
        settings: further fields of `sizes.Setting`: lora_rank, loss_chunk, label_share ...; cuda_graphs counts for one
            process, and for ranks that have the whole model and one part.

    Raises:
        DoesNotFit: no road fits; as for `plan_device_map`.
    """
    cards = find_gpus(gpus)
    roads, refusal = [], None
    try:
        roads.append(_in_one_process(plan_device_map(config, cards, batch_size, seq_length, **settings)))
    except DoesNotFit as error:
        refusal = error
    layers = Shape.of(config).layers
    for ranks in divisors(len(cards)):
        if len(cards) == 1 or ranks > layers:
            continue
        pipelines = len(cards) // ranks
        for schedule in SCHEDULES if ranks > 1 else SCHEDULES[:1]:
            rows = -(-batch_size // pipelines)
            tried = [
                _least_checkpointed(config, plan, cards, batch_size, seq_length, pipelines, settings)
                for plan in _plans(layers, ranks, schedule, rows)
            ]
            if tried:
                roads.append(min(tried, key=lambda road: (not road.fits, road.seconds)))
    if refusal and not any(road.fits for road in roads):
        raise refusal
    return sorted(roads, key=lambda road: (not road.fits, road.seconds))


def _in_one_process(plan: Plan) -> Road:
    tasks = plan.schedule
    return Road("one process", plan.seconds, plan.breakdown, plan.total_bytes, plan.fits, plan, 1, tasks)


def _plans(layers: int, ranks: int, schedule: str, rows: int) -> Iterator[ProcessPlan]:
    """Plans worth a look, every block checkpointed."""
    stages_per_rank = 2 if schedule == "Interleaved1F1B" else 1
    for parts, fewer in product(divisors(rows), range(FEWER + 1 if ranks > 1 else 1)):
        if fewer >= layers // ranks or parts > MOST_PARTS:
            continue
        rest = layers - (layers // ranks - fewer)
        blocks = (*even_blocks(rest, ranks - 1), layers - rest) if ranks > 1 else (layers,)
        try:
            yield ProcessPlan(blocks, schedule, parts, stages_per_rank, tuple(range(layers)))
        except ValueError:  # too few parts for this schedule, or too few blocks for two stages
            continue


def _least_checkpointed(
    config: Any, plan: ProcessPlan, cards: list[GPU], batch: int, length: int, pipelines: int, settings: dict[str, Any]
) -> Road:
    """The plan with as few checkpointed blocks as fit: the last ones of each stage go without, as many in each."""

    def road(kept: int) -> Road:
        gone = {block for cut in plan.stages for block in cut.blocks[max(0, len(cut.blocks) - kept) :]}
        some = tuple(block for block in range(sum(plan.blocks)) if block not in gone)
        return forecast_processes(config, replace(plan, checkpointed=some), cards, batch, length, pipelines, **settings)

    most = max(len(cut.blocks) for cut in plan.stages)
    best = road(most)
    if best.fits:
        return best
    best, low, high = road(0), 0, most
    while best.fits and high - low > 1:
        middle = (low + high) // 2
        found = road(middle)
        best, low, high = (found, middle, high) if found.fits else (best, low, middle)
    return best


def roads_table(roads: Sequence[Road]) -> str:
    """A Markdown table of roads, in their order.

    Args:
        roads: from `compare_roads`.
    """
    alone = next((road.seconds for road in roads if road.name == "one process"), None)
    return markdown_table(
        [
            {
                "road": road.name,
                "parts": road.plan.micro_batches,
                "seconds a step": f"{road.seconds:.3g}",
                "times one process": f"{alone / road.seconds:.2f}" if alone else "",
                "GPUs at work": f"{road.busy:.0%}",
                "fullest GPU": f"{max(road.total_bytes) / GIB:.2f} GiB" + ("" if road.fits else ": too much"),
            }
            for road in roads
        ]
    )
