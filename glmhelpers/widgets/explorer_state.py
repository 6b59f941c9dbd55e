"""The explorer's state: settings that can always exist, and the plan they make. No widgets in here.

wish (a control was moved)  ->  changed(...)  ->  a state with every number in range  ->  .plan
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from glmhelpers.cost_model.gpus import CATALOGUE, GPU, find_gpu
from glmhelpers.cost_model.sizes import LORA_TARGETS, Setting, Shape, divisors
from glmhelpers.cost_model.stages import Stage
from glmhelpers.devicemap.bounds import EMBEDDINGS
from glmhelpers.devicemap.plan import Plan, plan_device_map

MAX_BATCH, MAX_GPUS, LENGTH_STEP = 128, 4, 64
RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
CHOICES = {
    "gpu": tuple(CATALOGUE),
    "embedding": EMBEDDINGS,
    "dtype": ("float16", "float32"),
    "base_bits": (16, 8, 4),
    "in_flight": tuple(range(MAX_GPUS + 1)),
}
"""Settings of which the explorer knows a few only; any other is refused."""


@dataclass(frozen=True)
class Explored:
    """One state of the explorer.

    Attributes:
        shape: sizes of the model.
        gpu, count: kind and number of GPUs; the kind by its name in the catalogue, or a card of this machine.
        cuts: count - 1 ascending numbers; blocks cuts[i-1] to cuts[i] - 1 are on GPU i.
        checkpointed: how many blocks are checkpointed; those without are the last ones of the GPUs, in turn.
        embedding: "first", "tied" or "cpu".
        in_flight: micro-batches in memory at a time, 0 for all of them.
        others: as in sizes.Setting.
    """

    shape: Shape
    gpu: str | GPU
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
    label_share: float = 1.0
    skipped: tuple[int, ...] | None = None
    in_flight: int = 0

    @classmethod
    def start(cls, config: Any, gpu: str | GPU, count: int, batch_size: int, seq_length: int) -> "Explored":
        """Equal parts, every block checkpointed."""
        shape = Shape.of(config)
        state = cls(shape, "T4", 1, (), 1, shape.max_length, 1, shape.layers)
        return state.changed(gpu=gpu, count=count, batch_size=batch_size, seq_length=seq_length)

    def changed(self, **wishes: Any) -> "Explored":
        """The state nearest to the wishes that can exist: numbers go to the nearest end of their range.

        Raises:
            ValueError: a name that is no setting, or a choice that there is not.
        """
        if unknown := [name for name in wishes if name not in SETTINGS]:
            raise ValueError(f"{unknown[0]!r} is no setting of the explorer; there are {', '.join(SETTINGS)}")
        for name, possible in CHOICES.items():
            if name in wishes and wishes[name] not in possible and not isinstance(wishes[name], GPU):
                raise ValueError(f"{name}={wishes[name]!r}; choose from {', '.join(map(repr, possible))}")
        targets = tuple(name for name in LORA_TARGETS if name in wishes.get("lora_targets", ()))
        if wrong := set(wishes.get("lora_targets", ())) - set(targets):
            raise ValueError(f"lora_targets: {sorted(wrong)[0]!r} is none; choose from {', '.join(LORA_TARGETS)}")
        limits = self.limits()
        wishes = {name: min(max(wish, limits[name][0]), limits[name][1]) if name in limits else wish
                  for name, wish in wishes.items()}  # fmt: skip
        state = replace(self, **{**wishes, "lora_targets": targets or self.lora_targets})
        if "lora_rank" in wishes:
            state = replace(state, lora_rank=min(RANKS, key=lambda rank: abs(rank - state.lora_rank)))
        if state.count != self.count and "cuts" not in wishes:
            state = replace(state, cuts=equal_cuts(self.shape.layers, state.count), skipped=None)
        if "checkpointed" in wishes or "cuts" in wishes:
            state = replace(state, cuts=self._cuts(state.cuts, state.count), skipped=None)
        if state.batch_size % state.micro_batches:
            even = [part for part in divisors(state.batch_size) if part <= state.micro_batches]
            state = replace(state, micro_batches=even[-1])
        return state

    def limits(self) -> dict[str, tuple[int, int]]:
        """Smallest and largest value of each number."""
        return {
            "count": (1, MAX_GPUS),
            "batch_size": (1, MAX_BATCH),
            "seq_length": (min(LENGTH_STEP, self.shape.max_length), self.shape.max_length),
            "micro_batches": (1, MAX_BATCH),
            "checkpointed": (0, self.shape.layers),
        }

    def _cuts(self, wanted: tuple[int, ...], count: int) -> tuple[int, ...]:
        """`count - 1` cuts in order: the wanted ones, and for those that are missing the end of the model."""
        cuts = [*wanted, *[self.shape.layers] * count][: count - 1]
        return tuple(sorted(min(max(cut, 0), self.shape.layers) for cut in cuts))

    def with_cut(self, number: int, place: int) -> "Explored":
        """Move one cut; the others give way, so that they stay in order."""
        place = min(max(place, 0), self.shape.layers)
        cuts = [min(cut, place) for cut in self.cuts[:number]]
        cuts += [place, *(max(cut, place) for cut in self.cuts[number + 1 :])]
        return self.changed(cuts=tuple(cuts))

    @classmethod
    def of(cls, plan: Plan) -> "Explored":
        """The state that has this plan.

        Raises:
            ValueError: the plan's GPUs are of several kinds, or too many.
        """
        card, setting = plan.gpus[0], plan.setting
        if len(plan.gpus) > MAX_GPUS or any(gpu != card for gpu in plan.gpus):
            raise ValueError(
                f"the explorer knows 1 to {MAX_GPUS} GPUs of one kind; this plan is for "
                f"{', '.join(gpu.name for gpu in plan.gpus)}: make one for equal GPUs"
            )
        ends = [len(stage.blocks) for stage in plan.stages]
        return cls(
            plan.shape, card.name if CATALOGUE.get(card.name) == card else card, len(ends),
            tuple(sum(ends[: number + 1]) for number in range(len(ends) - 1)),
            setting.batch_size, setting.seq_length, plan.micro_batches, len(plan.checkpointed_layers),
            setting.lora_rank, tuple(setting.lora_targets), plan.embedding, setting.dtype, setting.base_bits,
            setting.loss_chunk, setting.label_share,
            tuple(sorted(set(range(plan.shape.layers)) - set(plan.checkpointed_layers))), setting.in_flight or 0,
        )  # fmt: skip

    def question(self) -> "Explored":
        """This state without what the planner chooses: equal for all states that have the same best plan."""
        chosen: dict[str, Any] = {"micro_batches": 1, "in_flight": 0, "checkpointed": 0, "embedding": "tied"}
        return replace(self, cuts=(), **chosen, loss_chunk=512, skipped=None)

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
            label_share=self.label_share,
        )
        return replace(Explored.of(plan), gpu=self.gpu)

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
            dtype=self.dtype, base_bits=self.base_bits, loss_chunk=self.loss_chunk, label_share=self.label_share,
            in_flight=self.in_flight if 0 < self.in_flight < self.micro_batches else None,
        )  # fmt: skip
        skipped, last = set(self.skipped_blocks), self.count - 1
        first = next(number for number, blocks in enumerate(self.blocks) if blocks)
        home = {"first": first, "tied": last, "cpu": None}[self.embedding]
        stages = [
            Stage(
                tuple(block not in skipped for block in blocks),
                embedding=number == home,
                head=number == last,
                shared=number == home == last,
                first=number == first,
            )
            for number, blocks in enumerate(self.blocks)
        ]
        card, count = find_gpu(self.gpu), self.count
        cards, rooms = [card] * count, [card.memory] * count
        return Plan(self.shape, setting, stages, cards, range(count), rooms, self.embedding, "by hand")


SETTINGS = (
    *("gpu", "count", "cuts", "batch_size", "seq_length", "micro_batches", "checkpointed"),
    *("lora_rank", "lora_targets", "embedding", "dtype", "base_bits", "loss_chunk", "in_flight"),
)
"""What `changed` takes."""


def equal_cuts(layers: int, count: int) -> tuple[int, ...]:
    """Cuts into parts as equal as possible, the longer ones first: the head is on the last GPU."""
    return tuple(-(-layers * number // count) for number in range(1, count))
