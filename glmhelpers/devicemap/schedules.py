"""One process a GPU: the order in which each rank works, how long a step takes, and what each rank holds.

                                                                        micro-batches in flight on rank r of R
    GPipe          rank 0  F1 F2 F3 F4 .  .  B1 B2 B3 B4                all of them
                   rank 1  .  F1 F2 F3 F4 B1 B2 B3 B4
    1F1B           rank 0  F1 F2 .  B1 F3 B2 F4 B3 .  B4                R - r
                   rank 1  .  F1 B1 F2 B2 F3 B3 F4 B4
    interleaved    V small stages a rank: the pipeline is full after a V-th of the time, for V times the messages

`work_order` is the order of PyTorch's schedules, which a test lays beside theirs. `run_order` simulates it: a rank does
one thing at a time; a micro-batch is fetched from the neighbour before it is worked on, as PyTorch does it; and each
rank has a host of its own, which starts the kernels of that rank alone, so that launches of ranks go on side by side.

`rank_terms` walks through the same order with a ledger of bytes. What is other than in one process (`step_memory`):

    buffers      PipelineStage makes one for each micro-batch that it receives, and for each gradient, for good
    outputs      a stage's output lives until that micro-batch has been undone
    masks        each stage makes its own
    loss         a micro-batch is undone on its own, so no sum over all keeps graphs alive
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from glmhelpers.cost_model.block_memory import block_cost
from glmhelpers.cost_model.gpus import GPU
from glmhelpers.cost_model.sizes import Setting, Shape
from glmhelpers.cost_model.stages import Stage
from glmhelpers.cost_model.step_memory import (
    TERMS,
    embedding_bytes,
    hidden_bytes,
    lora_bytes,
    loss_kept_bytes,
    loss_working_bytes,
    mask_bytes,
    table_bytes,
    unpacked_matrix_bytes,
    weight_bytes,
)
from glmhelpers.cost_model.step_time import StageTime, Task

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B")


@dataclass(frozen=True)
class Work:
    """One piece of work: a micro-batch forward or backward through a stage."""

    kind: str
    stage: int
    micro_batch: int


@lru_cache(maxsize=4096)
def work_order(schedule: str, ranks: int, stages_per_rank: int, micro_batches: int) -> tuple[tuple[Work, ...], ...]:
    """What each rank does, in order.

    Args:
        schedule: one of SCHEDULES.
        ranks: of one pipeline.
        stages_per_rank: 1, but for Interleaved1F1B; stage s is on rank s modulo `ranks`.
        micro_batches: of one pipeline.
    """
    total = micro_batches * stages_per_rank
    # Micro-batches go through a rank's stages in rounds: all of a round through the first stage, then the second, ...
    a_round = micro_batches // max(1, micro_batches // ranks) if stages_per_rank > 1 else micro_batches

    def piece(kind: str, number: int, rank: int) -> Work:
        turn, place = divmod(number, a_round)
        rounds, local = divmod(turn, stages_per_rank)
        local = local if kind == "forward" else stages_per_rank - 1 - local
        return Work(kind, local * ranks + rank, rounds * a_round + place)

    orders = []
    for rank in range(ranks):
        ahead = {
            "GPipe": total,
            "1F1B": ranks - rank,
            "Interleaved1F1B": (stages_per_rank - 1) * a_round + 2 * (ranks - 1 - rank) + 1,
        }[schedule]
        ahead = min(ahead, total)
        order = [piece("forward", number, rank) for number in range(ahead)]
        for number in range(total):
            order.append(piece("backward", number, rank))
            if ahead + number < total:
                order.append(piece("forward", ahead + number, rank))
        orders.append(tuple(order))
    return tuple(orders)


def run_order(orders: Sequence[Sequence[Work]], times: Sequence[StageTime], transfer: float = 0.0) -> list[Task]:
    """Every piece of work of one step with its start and end in seconds, in order of its start; `gpu` is the rank.

    Args:
        orders: from `work_order`.
        times: of each stage for one micro-batch, sending left out.
        transfer: seconds that hidden states, or their gradient, need from a rank to its neighbour.
    """
    last, ranks = len(times) - 1, len(orders)
    free, host, places = [0.0] * ranks, [0.0] * ranks, [0] * ranks
    ends: dict[Work, float] = {}
    tasks = []
    left = sum(map(len, orders))
    while left:
        before = left
        for rank, order in enumerate(orders):
            while places[rank] < len(order):
                work = order[places[rank]]
                source = _source(work, last)
                if source is not None and source not in ends:
                    break
                time = times[work.stage]
                forward = work.kind == "forward"
                seconds = time.forward if forward else time.backward
                launch = time.launch_forward if forward else time.launch_backward
                ready = max(free[rank], ends[source] if source else 0.0)
                if source is not None and ranks > 1 and source.stage != work.stage:
                    ready += transfer
                start = max(ready, host[rank])
                host[rank] += launch
                end = max(start + seconds, host[rank])
                free[rank] = ends[work] = end
                tasks.append(Task(rank, work.kind, work.micro_batch, start, end))
                places[rank] += 1
                left -= 1
        if left == before:
            raise ValueError("these orders wait for each other for ever")
    return sorted(tasks, key=lambda task: (task.start, task.gpu))


def lane_schedule(
    times: Sequence[StageTime], micro_batches: int, in_flight: int, delay: float, end: float
) -> list[Task]:
    """Every piece of work of one process that keeps so many micro-batches in flight, from `delay` to `end` seconds.

    Each GPU works as a rank of 1F1B does, or less far ahead. Where the host needs longer than the GPUs, each piece is
    drawn longer.
    """
    stages = len(times)
    # A stage is as far ahead as there are stages from it to the end, but never further than all that are in flight.
    orders = work_order("1F1B", min(stages, in_flight), 1, micro_batches)
    ahead = [max(0, len(orders) - stages + stage) for stage in range(stages)]
    own = [[Work(each.kind, stage, each.micro_batch) for each in orders[rank]] for stage, rank in enumerate(ahead)]
    tasks = run_order(own, [StageTime(time.forward, time.backward) for time in times])
    stretch = (end - delay) / max(task.end for task in tasks)
    return [replace(task, start=delay + stretch * task.start, end=delay + stretch * task.end) for task in tasks]


def _source(work: Work, last: int) -> Work | None:
    """What must be over before: the stage before, or behind; the loss is made from the last stage's own output."""
    if work.kind == "forward":
        return Work("forward", work.stage - 1, work.micro_batch) if work.stage else None
    if work.stage == last:
        return Work("forward", last, work.micro_batch)
    return Work("backward", work.stage + 1, work.micro_batch)


class Ledger:
    """What one stage adds to its rank, in bytes by term (keys of TERMS), as a function of what it is doing.

    Args:
        shape: of the model; setting: of one pipeline, with its micro-batches.
        stage: its blocks, and which ends of the model it has.
    """

    def __init__(self, shape: Shape, setting: Setting, stage: Stage):
        self.shape, self.setting, self.stage = shape, setting, stage
        self.marks, self.count = stage.blocks, len(stage.blocks)
        self.unit = hidden_bytes(shape, setting)
        self.cost, self.cost_of_first = block_cost(shape, setting), block_cost(shape, setting, stage.first)
        self.lora = lora_bytes(shape, setting, self.count)
        # Block 0 needs no gradient of its input. The input of every other stage lies in a buffer.
        self.spared = int(not stage.first or not self.marks[0])

    def always(self) -> dict[str, int]:
        """From the first step on."""
        ends = int(not self.stage.first) + int(not self.stage.head)
        return {
            "weights": weight_bytes(self.shape, self.setting, self.stage),
            "embedding": embedding_bytes(self.shape, self.setting, self.stage),
            "lora": self.lora,
            "adam": 2 * self.lora,
            "transfer": ends * self.setting.micro_batches * self.unit,
        }

    def saved(self, blocks: int) -> int:
        """What the first `blocks` blocks keep, those that are not checkpointed."""
        plain = self.marks[:blocks].count(False)
        more = self.cost_of_first.saved - self.cost.saved
        return self.cost.saved * plain + more * (plain > 0 and not self.marks[0])

    def held(self, blocks: int | None = None) -> dict[str, int]:
        """Of one micro-batch in flight, as far as its first `blocks` blocks (by default all, with the loss)."""
        here = self.count if blocks is None else blocks
        return {
            "masks": mask_bytes(self.setting) + table_bytes(self.shape, self.setting),
            "inputs": self.unit * (here - self.spared),
            "activations": self.saved(here),
            "transfer": self.unit,
            "loss": loss_kept_bytes(self.shape, self.setting) if blocks is None and self.stage.head else 0,
        }

    def forward(self) -> list[dict[str, int]]:
        """Moments of a micro-batch's forward, beside what the others hold."""
        last = self.cost_of_first if self.count == 1 else self.cost
        running = last.forward if self.marks[-1] else last.keeping - last.saved
        # Visible pairs (bool), positions (2 x int64), and embeddings where block 0 keeps none.
        running += self.setting.rows * self.setting.seq_length**2 + 16 * self.setting.tokens
        running += self.unit * (self.stage.first and self.spared)
        held = self.held(self.count)
        moments = [held | {"transfer": 0, "block": running}]
        if self.stage.head:
            working = loss_working_bytes(self.shape, self.setting) - self.unit  # the normed states are the output
            moments.append(self.held() | {"block": 0, "loss": self.held()["loss"] + working})
        return moments

    def backward(self, first_time: bool) -> list[dict[str, int]]:
        """The same for its backward; `first_time`: gradients of the adapters are made now."""
        ends = {0, 1, self.count - 1}
        ends |= {p + side for p, pair in enumerate(pairwise(self.marks)) if pair[0] != pair[1] for side in (0, 1)}
        moments = []
        for place in ends & set(range(self.count)):
            here = self.cost_of_first if place == 0 else self.cost
            block = here.again if self.marks[place] else here.undo
            done = self.count - 1 - place if first_time else 0
            moments.append({**self.held(place + 1), "block": block, "gradients": self.lora // self.count * done})
        return moments


def rank_terms(
    shape: Shape,
    setting: Setting,
    stages: Sequence[tuple[int, Stage]],
    order: Sequence[Work],
    workspace: int = 0,
    pipelines: int = 1,
) -> dict[str, int]:
    """The worst moment of one rank in a step: bytes by term (keys of TERMS); their sum is the peak.

    Args:
        shape: of the model.
        setting: of one pipeline: its rows, cut into its micro-batches.
        stages: index and contents of this rank's stages.
        order: this rank's work.
        workspace: bytes of one cuBLAS workspace; pipelines: more than one have buckets for the sum of gradients.
    """
    ledgers = {index: Ledger(shape, setting, stage) for index, stage in stages}
    lora = sum(ledger.lora for ledger in ledgers.values())
    base = dict.fromkeys(TERMS, 0)
    base["workspace"] = 2 * workspace + unpacked_matrix_bytes(shape, setting)
    base["gradients"] = lora * (pipelines > 1)
    for ledger in ledgers.values():
        _add(base, ledger.always())
    base["transfer"] += next(iter(ledgers.values())).unit  # the engine keeps the last output until the next
    flying, undone, sent = dict.fromkeys(ledgers, 0), set[int](), 0
    worst = _sum(base, {"gradients": lora, "block": 2 * lora})  # the optimizer's step
    for work in order:
        ledger = ledgers[work.stage]
        now = dict(base)
        for index, count in flying.items():
            _add(now, ledgers[index].held(), count - (index == work.stage and work.kind == "backward"))
        now["gradients"] += sum(ledgers[index].lora for index in undone)
        now["transfer"] += sent
        moments = ledger.forward() if work.kind == "forward" else ledger.backward(work.stage not in undone)
        worst = max([worst, *(_sum(now, moment) for moment in moments)], key=lambda terms: sum(terms.values()))
        flying[work.stage] += 1 if work.kind == "forward" else -1
        if work.kind == "backward":
            undone.add(work.stage)
            sent = 0 if ledger.stage.first else ledger.unit  # the gradient on its way to the stage before
    return worst


def _add(terms: dict[str, int], more: dict[str, int], times: int = 1) -> None:
    for name, size in more.items():
        terms[name] += times * size


def _sum(terms: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    total = dict(terms)
    _add(total, more)
    return total


def all_reduce_seconds(size: int, ranks: int, gpu: GPU) -> float:
    """Seconds of a sum of `size` bytes over `ranks` GPUs in a ring: each sends all but one part of it twice."""
    return 2 * (ranks - 1) / ranks * size / gpu.link
