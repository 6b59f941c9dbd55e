"""On paper: one step on 1 to 64 GPUs of several machines. What would each way hold and send, and where does it stop?

    dp      the whole model on each GPU, rows shared out        sends  gradients of the adapters, once a step
    pp      blocks shared out, a pipeline of all GPUs           sends  hidden states, twice for each micro-batch
    dp pp   a pipeline in each machine, rows shared out         sends  both; between machines the gradients alone
    fsdp    every weight shared out, fetched when needed        sends  all weights, twice for each micro-batch (ZeRO-3)
    tp      every matrix shared out                             sends  hidden states, six times for each block

The batch is the same for every number of GPUs, so what is counted is how much sooner a step is over. A ring over
several machines is as fast as its slowest link. Each number of seconds is a formula; `simulated` is the same step
played event by event (`devicemap.schedules`, and `_finish` for messages), and a test lays the two side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from glmhelpers.cost_model.gpus import GPU, find_gpu
from glmhelpers.cost_model.sizes import Setting, Shape, divisors
from glmhelpers.cost_model.stages import Stage
from glmhelpers.cost_model.step_memory import embedding_bytes, hidden_bytes, lora_bytes, slack_bytes, weight_bytes
from glmhelpers.cost_model.step_time import StageTime, block_seconds, head_seconds, stage_seconds
from glmhelpers.devicemap.schedules import rank_terms, run_order, work_order
from glmhelpers.utils.markdown import markdown_table
from glmhelpers.utils.units import GIB

WAYS = {"dp": "dp", "pp": "pp", "dp pp": "dp x pp", "fsdp": "FSDP", "tp": "tensor parallel"}
"""Ways in the order in which they are drawn, with their names for readers."""

NETWORK = 3.1e9
"""Bytes a second between two machines: 25 Gbit/s."""

LATENCY = 20e-6
"""Seconds until a message has begun to arrive; an estimate."""


@dataclass(frozen=True)
class Scaled:
    """One way on so many GPUs.

    Attributes:
        way: one of WAYS; gpus: how many.
        held_bytes: on the fullest GPU, with slack and CUDA context.
        sent_bytes: by one GPU in a step.
        seconds: of a step, by formula; simulated: played event by event. Both 0 where it cannot be.
        busy: part of the time in which a GPU works, 0 to 1.
        tokens_per_s: of the whole batch.
        fits: is it possible, and within the GPU's memory?
        why: what makes it impossible, in words; "" if it is not.
    """

    way: str
    gpus: int
    held_bytes: int = 0
    sent_bytes: int = 0
    seconds: float = 0.0
    simulated: float = 0.0
    busy: float = 0.0
    tokens_per_s: float = 0.0
    fits: bool = False
    why: str = ""


@dataclass(frozen=True)
class _Cluster:
    """GPUs of one kind in machines of `per_machine`, joined by a network of so many bytes a second."""

    gpu: GPU
    per_machine: int
    network: float

    def links(self, count: int) -> list[float]:
        """Bytes a second of each link of a ring of so many GPUs, machine by machine."""
        if count <= self.per_machine:
            return [self.gpu.link] * count
        slow = min(self.gpu.link, self.network)
        return [slow if gpu % self.per_machine == self.per_machine - 1 else self.gpu.link for gpu in range(count)]

    def ring(self, size: float, count: int, rounds: int) -> float:
        """Seconds of `rounds` rounds in which each GPU hands 1/count of `size` bytes on."""
        return rounds * (size / count / min(self.links(count)) + LATENCY) if count > 1 else 0.0

    def ring_simulated(self, size: float, count: int, rounds: int) -> float:
        """The same, message by message."""
        ends = [0.0] * count
        free = [0.0] * count
        for _ in range(rounds if count > 1 else 0):
            for gpu, link in enumerate(self.links(count)):
                free[gpu] = max(free[gpu], ends[gpu]) + size / count / link + LATENCY
            ends = [free[gpu - 1] for gpu in range(count)]
        return max(ends)


def _finish(steps: Sequence[tuple[float, float]]) -> float:
    """Seconds until all steps are done: (fetch, work) each; one is fetched while the one before it is worked on."""
    fetched = worked = before = 0.0
    for fetch, work in steps:
        fetched = max(fetched, before) + fetch  # there is room for two: the next and the one at work
        before, worked = worked, max(worked, fetched) + work
    return worked


@dataclass(frozen=True)
class _Job:
    """The step that is spread."""

    shape: Shape
    setting: Setting
    cluster: _Cluster

    def parts(self, rows: int, each: int = 1) -> Setting:
        """Setting for so many rows in micro-batches of `each`."""
        return replace(self.setting, batch_size=rows, micro_batches=rows // each)

    def whole(self, setting: Setting, pipelines: int) -> dict[str, int]:
        """Terms of a GPU that has the whole model, a micro-batch at a time."""
        stage = Stage.of(self.shape.layers, 0, True, True, True, True)
        order = work_order("1F1B", 1, 1, setting.micro_batches)[0]
        return rank_terms(self.shape, setting, [(0, stage)], order, self.cluster.gpu.gemm_workspace, pipelines)

    def work(self, setting: Setting) -> float:
        """Seconds of one micro-batch through the whole model, there and back."""
        forward, again, backward = block_seconds(self.shape, setting, self.cluster.gpu)
        return self.shape.layers * (forward + again + backward) + head_seconds(self.shape, setting, self.cluster.gpu)

    def point(
        self, way: str, gpus: int, terms: dict[str, int], sent: float, seconds: float, simulated: float
    ) -> Scaled:
        """A point of a way that is possible."""
        gpu, setting = self.cluster.gpu, self.setting
        held = sum(terms.values()) + slack_bytes(terms) + gpu.context
        ideal = self.work(self.parts(setting.batch_size)) * setting.batch_size / gpus
        speed = setting.batch_size * setting.seq_length / seconds
        busy = min(1.0, ideal / seconds)
        return Scaled(way, gpus, held, int(sent), seconds, simulated, busy, speed, held <= gpu.memory)

    def dp(self, gpus: int) -> Scaled:
        """Rows shared out; the gradients of the adapters go round in a ring."""
        rows = self.setting.batch_size
        if rows % gpus:
            return Scaled("dp", gpus, why=f"{rows} rows for {gpus} GPUs")
        setting = self.parts(rows // gpus)
        adapter, each = lora_bytes(self.shape, setting, self.shape.layers), self.work(setting)
        rounds = 2 * (gpus - 1)
        seconds = setting.micro_batches * each + self.cluster.ring(adapter, gpus, rounds)
        played = run_order(work_order("1F1B", 1, 1, setting.micro_batches), [self._half(each)])[-1].end
        simulated = played + self.cluster.ring_simulated(adapter, gpus, rounds)
        return self.point("dp", gpus, self.whole(setting, gpus), rounds / gpus * adapter, seconds, simulated)

    @staticmethod
    def _half(seconds: float) -> StageTime:
        return StageTime(seconds / 3, 2 * seconds / 3)

    def pp(self, gpus: int) -> Scaled:
        """One pipeline of all GPUs."""
        return self._pipelines("pp", gpus, gpus)

    def dp_pp(self, gpus: int) -> Scaled:
        """A pipeline in each machine."""
        ranks = min(gpus, self.cluster.per_machine)
        if gpus % ranks or self.setting.batch_size % (gpus // ranks):
            return Scaled("dp pp", gpus, why=f"{self.setting.batch_size} rows for {gpus // ranks} pipelines")
        return self._pipelines("dp pp", gpus, ranks)

    def _pipelines(self, way: str, gpus: int, ranks: int) -> Scaled:
        shape, gpu, pipelines = self.shape, self.cluster.gpu, gpus // ranks
        if ranks > shape.layers:
            return Scaled(way, gpus, why=f"{shape.layers} blocks for {ranks} ranks")
        setting = self.parts(self.setting.batch_size // pipelines)
        if setting.micro_batches < ranks:
            return Scaled(way, gpus, why=f"{setting.micro_batches} micro-batches for {ranks} ranks")
        share, more = divmod(shape.layers, ranks)
        blocks = [share + (rank < more) for rank in range(ranks)]
        stages = [
            Stage.of(count, 0, rank == 0, rank == ranks - 1, ranks == 1, rank == 0) for rank, count in enumerate(blocks)
        ]
        times = [stage_seconds(shape, setting, stage, replace(gpu, link=float("inf"))) for stage in stages]
        times = [StageTime(time.forward, time.backward) for time in times]  # launches count as little as for the others
        unit, parts = hidden_bytes(shape, setting), setting.micro_batches
        transfer = 0.0 if ranks == 1 else unit / min(self.cluster.links(ranks)) + LATENCY
        # A rank fetches each message itself. The slowest sets the pace; the pipeline is filled and drained once.
        fetches = [(rank > 0) + (rank < ranks - 1) for rank in range(ranks)]
        paces = [time.forward + time.backward + n * transfer for time, n in zip(times, fetches, strict=True)]
        played = parts * max(paces) + sum(paces) - max(paces)
        adapter = lora_bytes(shape, setting, max(blocks))
        rounds = 2 * (pipelines - 1)
        between = replace(self.cluster, per_machine=1) if pipelines > 1 else self.cluster
        orders = work_order("1F1B", ranks, 1, parts)
        simulated = max(task.end for task in run_order(orders, times, transfer))
        held = [
            rank_terms(shape, setting, [(rank, stages[rank])], orders[rank], gpu.gemm_workspace, pipelines)
            for rank in {0, ranks - 1}
        ]
        sent = 2 * parts * unit * (ranks > 1) + rounds / pipelines * adapter
        return self.point(
            way,
            gpus,
            max(held, key=lambda terms: sum(terms.values())),
            sent,
            played + between.ring(adapter, pipelines, rounds),
            simulated + between.ring_simulated(adapter, pipelines, rounds),
        )

    def fsdp(self, gpus: int) -> Scaled:
        """Weights shared out and fetched block by block, in the largest micro-batches that fit."""
        rows = self.setting.batch_size
        if rows % gpus:
            return Scaled("fsdp", gpus, why=f"{rows} rows for {gpus} GPUs")
        points = [self._fsdp(gpus, each) for each in divisors(rows // gpus)]
        return min(points, key=lambda point: (not point.fits, point.seconds if point.fits else point.held_bytes))

    def _fsdp(self, gpus: int, each: int) -> Scaled:
        shape, cluster, layers = self.shape, self.cluster, self.shape.layers
        setting = self.parts(self.setting.batch_size // gpus, each)
        terms = self.whole(setting, gpus)
        block = weight_bytes(shape, setting, Stage.of(1))
        head = embedding_bytes(shape, setting, Stage(embedding=True))
        if gpus > 1:
            terms |= {"weights": terms["weights"] // gpus + 2 * block, "embedding": terms["embedding"] // gpus + head}
        rounds = gpus - 1
        fetch, fetch_head = (cluster.ring(size, gpus, rounds) for size in (block, head))
        played, played_head = (cluster.ring_simulated(size, gpus, rounds) for size in (block, head))
        forward, again, backward = block_seconds(shape, setting, cluster.gpu)
        head_work = head_seconds(shape, setting, cluster.gpu)
        adapter = lora_bytes(shape, setting, layers)
        # Each piece of work takes as long as itself, or as fetching what comes behind it.
        there = (layers - 1) * max(forward, fetch) + max(forward, fetch_head)
        back = max(head_work, fetch) + layers * max(again + backward, fetch)
        seconds = fetch + setting.micro_batches * (there + back) + cluster.ring(adapter, gpus, 2 * rounds)
        steps = [(played, forward)] * layers + [(played_head, head_work)] + [(played, again + backward)] * layers
        simulated = _finish(steps * setting.micro_batches) + cluster.ring_simulated(adapter, gpus, 2 * rounds)
        sent = rounds / gpus * (setting.micro_batches * (2 * layers * block + head) + 2 * adapter)
        return self.point("fsdp", gpus, terms, sent, seconds, simulated)

    def tp(self, gpus: int) -> Scaled:
        """Every matrix shared out, head by head; hidden states are summed twice a block: forward, again, backward."""
        shape, cluster = self.shape, self.cluster
        if shape.heads % gpus:
            return Scaled("tp", gpus, why=f"{shape.heads} heads for {gpus} GPUs")
        setting = self.parts(self.setting.batch_size)
        terms = self.whole(setting, 1)
        shared = ("weights", "embedding", "lora", "adam", "gradients", "activations", "block", "loss")
        terms |= {name: terms[name] // gpus for name in shared}
        unit, sums, rounds = hidden_bytes(shape, setting), 6 * shape.layers, 2 * (gpus - 1)
        each, parts = self.work(setting) / gpus, setting.micro_batches
        seconds = parts * (each + sums * cluster.ring(unit, gpus, rounds))
        one = cluster.ring_simulated(unit, gpus, rounds)
        simulated = sum(each / sums + one for _ in range(parts * sums))
        return self.point("tp", gpus, terms, rounds / gpus * unit * sums * parts, seconds, simulated)


def scale_out(
    config: Any,
    gpus: Any = "T4",
    counts: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    per_machine: int = 8,
    batch_size: int = 256,
    seq_length: int = 1024,
    network: float = NETWORK,
    **settings: Any,
) -> list[Scaled]:
    """Each way on so many GPUs, every block checkpointed; one point for each way and count.

    Args:
        config: ChatGLMConfig, or a dict with its keys.
        gpus: the kind of GPU: a catalogue name, a size, or a GPU.
        counts: numbers of GPUs.
        per_machine: GPUs in a machine.
        batch_size: rows of a step, the same for all; seq_length: tokens in a row.
        network: bytes a second between machines.
        settings: further fields of `sizes.Setting`.
    """
    setting = Setting(batch_size, seq_length, **settings)
    job = _Job(Shape.of(config), setting, _Cluster(find_gpu(gpus), per_machine, network))
    ways = {"dp": job.dp, "pp": job.pp, "dp pp": job.dp_pp, "fsdp": job.fsdp, "tp": job.tp}
    return [way(count) for way in ways.values() for count in counts]


def scaling_table(points: Sequence[Scaled], counts: Sequence[int] = (32, 64)) -> str:
    """A Markdown table: what each way holds and sends on so many GPUs, how long a step takes, or why it cannot be.

    Args:
        points: from `scale_out`.
        counts: numbers of GPUs to show.
    """
    rows = []
    for point in points:
        if point.gpus not in counts:
            continue
        row = {"way": WAYS[point.way], "GPUs": point.gpus}
        if point.why:
            row |= {"a GPU holds": f"impossible: {point.why}"}
        else:
            row |= {
                "a GPU holds": f"{point.held_bytes / GIB:.1f} GiB" + ("" if point.fits else ": too much"),
                "sends in a step": f"{point.sent_bytes / 1e9:.3g} GB",
                "seconds a step": f"{point.seconds:.3g}",
                "simulated": f"{point.simulated:.3g}",
                "at work": f"{point.busy:.0%}",
            }
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return markdown_table([{name: row.get(name, "") for name in names} for row in rows])
