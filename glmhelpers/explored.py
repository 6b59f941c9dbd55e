"""The explorer's state: settings that can always exist, and the plan they make. No widgets in here.

wish (a control was moved)  ->  changed(...)  ->  a state with every number in range  ->  .plan
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from glmhelpers.devicemap import Plan, plan_device_map
from glmhelpers.gpus import find_gpu
from glmhelpers.mapcheck import part_names
from glmhelpers.shapes import Setting, Shape, divisors
from glmhelpers.stages import Stage
from glmhelpers.timemodel import lookup_seconds, step_seconds

MAX_BATCH = 128


@dataclass(frozen=True)
class Explored:
    """One state of the explorer.

    Attributes:
        shape: sizes of the model.
        gpu, count: kind and number of GPUs.
        cuts: count - 1 ascending numbers; blocks cuts[i-1] to cuts[i] - 1 are on GPU i.
        checkpointed: how many blocks are checkpointed; those without are the last ones of the GPUs, in turn.
        embedding: "first", "tied" or "cpu".
        others: as in shapes.Setting.
    """

    shape: Shape
    gpu: str
    count: int
    cuts: tuple[int, ...]
    batch_size: int
    seq_length: int
    micro_batches: int
    checkpointed: int
    lora_rank: int = 8
    lora_targets: tuple[str, ...] = ("query_key_value",)
    embedding: str = "tied"
    dtype: str = "float16"
    base_bits: int = 16
    loss_chunk: int = 512
    skipped: tuple[int, ...] | None = None

    @classmethod
    def start(cls, config: Any, gpu: str, count: int, batch_size: int, seq_length: int) -> "Explored":
        """Equal parts, every block checkpointed."""
        shape = Shape.of(config)
        length = min(seq_length, shape.max_length)
        return cls(shape, gpu, count, equal_cuts(shape.layers, count), batch_size, length, 1, shape.layers)

    def changed(self, **wishes: Any) -> "Explored":
        """The state nearest to the wishes that can exist."""
        state = replace(self, **wishes)
        if "count" in wishes and wishes["count"] != self.count:
            state = replace(state, cuts=equal_cuts(self.shape.layers, state.count), skipped=None)
        if "checkpointed" in wishes or "cuts" in wishes:
            state = replace(state, skipped=None)
        if state.batch_size % state.micro_batches:
            possible = [part for part in divisors(state.batch_size) if part <= state.micro_batches]
            state = replace(state, micro_batches=possible[-1])
        if not state.lora_targets:
            state = replace(state, lora_targets=self.lora_targets)
        return state

    def with_cut(self, number: int, place: int) -> "Explored":
        """Move one cut; the others give way, so that they stay in order."""
        place = min(max(place, 0), self.shape.layers)
        cuts = [min(cut, place) for cut in self.cuts[:number]]
        cuts += [place, *(max(cut, place) for cut in self.cuts[number + 1 :])]
        return self.changed(cuts=tuple(cuts))

    def best(self, objective: str) -> "Explored":
        """The planner's choice of cuts, embedding, micro-batches and checkpointed blocks for these settings.

        Raises:
            DoesNotFit: nothing fits.
        """
        plan = plan_device_map(
            self.shape,
            [self.gpu] * self.count,
            self.batch_size,
            self.seq_length,
            objective,
            lora_rank=self.lora_rank,
            lora_targets=self.lora_targets,
            dtype=self.dtype,
            base_bits=self.base_bits,
        )
        ends = [len(stage.blocks) for stage in plan.stages]
        cuts = tuple(sum(ends[: number + 1]) for number in range(self.count - 1))
        skipped = tuple(sorted(set(range(self.shape.layers)) - set(plan.checkpointed_layers)))
        return replace(
            self,
            cuts=cuts,
            embedding=plan.embedding,
            micro_batches=plan.micro_batches,
            checkpointed=len(plan.checkpointed_layers),
            loss_chunk=plan.setting.loss_chunk,
            skipped=skipped,
        )

    @property
    def blocks(self) -> list[range]:
        """For each GPU, its blocks."""
        edges = [0, *self.cuts, self.shape.layers]
        return [range(edges[number], edges[number + 1]) for number in range(self.count)]

    @property
    def skipped_blocks(self) -> tuple[int, ...]:
        """Blocks that are not checkpointed."""
        if self.skipped is not None:
            return self.skipped
        ends = [list(blocks) for blocks in self.blocks]
        chosen: list[int] = []
        while len(chosen) < self.shape.layers - self.checkpointed:
            longest = max(ends, key=len)
            chosen.append(longest.pop())
        return tuple(sorted(chosen))

    @cached_property
    def plan(self) -> Plan:
        """The plan of this state; it need not fit."""
        setting = Setting(
            self.batch_size, self.seq_length, self.micro_batches, self.lora_rank, self.lora_targets,
            dtype=self.dtype, base_bits=self.base_bits, loss_chunk=self.loss_chunk,
        )  # fmt: skip
        skipped, last = set(self.skipped_blocks), self.count - 1
        first = next(number for number, blocks in enumerate(self.blocks) if blocks)
        place = {"first": first, "tied": last, "cpu": "cpu"}[self.embedding]
        stages = [
            Stage(
                tuple(block not in skipped for block in blocks),
                embedding=place == number,
                head=number == last,
                shared=place == number == last,
                first=first == number,
            )
            for number, blocks in enumerate(self.blocks)
        ]
        names = part_names(self.shape.layers)
        places = [number for number, blocks in enumerate(self.blocks) for _ in blocks]
        card = find_gpu(self.gpu)
        plan = Plan(
            device_map=dict(zip(names, [place, *places, last, last], strict=True)),
            micro_batches=self.micro_batches,
            checkpointed_layers=[block for block in range(self.shape.layers) if block not in skipped],
            embedding=self.embedding,
            seconds=0.0,
            objective="by hand",
            gpus=[card] * self.count,
            usable_bytes=[card.memory] * self.count,
            shape=self.shape,
            setting=setting,
            stages=stages,
        )
        lookup = lookup_seconds(self.shape, setting, self.embedding, len(plan.stage_times), card)
        return replace(plan, seconds=lookup + step_seconds(plan.stage_times, self.micro_batches))


def equal_cuts(layers: int, count: int) -> tuple[int, ...]:
    """Cuts into parts as equal as possible, the longer ones first: the head is on the last GPU."""
    return tuple(-(-layers * number // count) for number in range(1, count))
