"""What stages cost, and what no plan can be better than: cheap bounds that spare the search whole settings.

costs      of a stage under one setting, computed once: GPUs differ by workspace, context and speed only

bytes      the least slack that the allocator leaves, label rows not rounded up, no copies of a prefix: with these
           out of the way, more blocks need more and more micro-batches need less, so a bisection finds the limit
seconds    blocks spread over the GPUs as if their order did not matter, checkpointed only where memory is short

Bounds never exclude a best plan.
"""

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from glmhelpers.cost_model.block_memory import block_cost
from glmhelpers.cost_model.gpus import GPU
from glmhelpers.cost_model.sizes import Setting, Shape
from glmhelpers.cost_model.stages import Stage
from glmhelpers.cost_model.step_memory import (
    SLACK_AT_LEAST,
    cast_bytes,
    hidden_bytes,
    slack_bytes,
    stage_terms,
    unpacked_matrix_bytes,
    weight_bytes,
)
from glmhelpers.cost_model.step_time import StageTime, block_seconds, head_seconds, pass_seconds, stage_seconds

EMBEDDINGS = ("first", "tied", "cpu")
"""Places for the embedding, the preferred one first where plans are equal."""

PASSING = ("block", "loss", "gradients", "transfer")
"""Terms of what comes and goes in a step."""


@dataclass(frozen=True)
class Room:
    """The model and the GPUs: sizes, cards, and bytes that may be used on each card."""

    shape: Shape
    gpus: tuple[GPU, ...]
    usable: tuple[int, ...]

    @property
    def host(self) -> GPU:
        """A card, for what the host needs to start a block: the same on every card, see `one_host`."""
        return self.gpus[0]


def stage_flags(place: str, first: bool, head: bool) -> tuple[bool, ...]:
    """The last four fields of a Stage."""
    here = (place == "first" and first) or (place == "tied" and head)
    return here, head, here and head, first


class Need(NamedTuple):
    """A stage, and bytes that it needs beside the GPU's own context and its workspaces."""

    stage: Stage
    peak: int
    total: int
    """With the allocator's slack."""
    lasting: int
    """Without what comes and goes."""
    workspaces: int
    """How many."""

    def on(self, card: GPU) -> int:
        """The peak on this card."""
        return self.peak + self.workspaces * card.gemm_workspace

    def fits(self, card: GPU, usable: int) -> bool:
        """Is so much enough on this card?"""
        return self.total + self.workspaces * card.gemm_workspace + card.context <= usable


class Costs:
    """Bytes and seconds of stages under one setting, each computed once.

    Args:
        shape: of the model; setting: how it is run.
        smooth: as for `stage_terms`.
    """

    def __init__(self, shape: Shape, setting: Setting, smooth: bool = False):
        self.shape, self.setting, self.parts = shape, setting, setting.micro_batches
        self.block = weight_bytes(shape, setting, Stage.of(1))
        self.options: dict[tuple, dict[int, Need | None]] = {}
        self._smooth = smooth
        self._needs: dict[tuple, Need] = {}
        self._times: dict[tuple, StageTime] = {}
        self._rates: dict[int, tuple[float, ...]] = {}

    def need(self, count: int, kept: int, flags: tuple[bool, ...]) -> Need:
        """Of `count` blocks, the last `kept` of them not checkpointed."""
        key = count, kept, flags
        if key not in self._needs:
            stage = Stage.of(count, kept, *flags)
            _, terms = stage_terms(self.shape, self.setting, stage, 1, smooth=self._smooth)
            # Of one byte each, workspaces count themselves.
            workspaces = terms["workspace"] - unpacked_matrix_bytes(self.shape, self.setting)
            lasting = sum(size for name, size in terms.items() if name not in PASSING) - workspaces
            peak = sum(terms.values()) - workspaces
            slack = slack_bytes(terms, self.setting.lanes(2 - (stage.first and stage.head)))
            self._needs[key] = Need(stage, peak, peak + slack, lasting, workspaces)
        return self._needs[key]

    def time(self, number: int, card: GPU, stage: Stage) -> StageTime:
        """Seconds of a stage on a card; cards of one `number` are equally fast."""
        key = number, len(stage.blocks), sum(stage.blocks), stage.head
        if key not in self._times:
            self._times[key] = stage_seconds(self.shape, self.setting, stage, card)
        return self._times[key]

    def rates(self, number: int, card: GPU) -> tuple[float, ...]:
        """Seconds of a block forward, again, backward; the less of sending and of the head; the head."""
        if number not in self._rates:
            head = head_seconds(self.shape, self.setting, card)
            least = min(head, hidden_bytes(self.shape, self.setting) / card.link)
            self._rates[number] = *block_seconds(self.shape, self.setting, card), least, head
        return self._rates[number]

    @cached_property
    def more(self) -> int:
        """Bytes that one block more without checkpointing takes, all micro-batches in flight together."""
        return (block_cost(self.shape, self.setting).saved - cast_bytes(self.shape, self.setting)) * self.setting.flying


class Bounds:
    """Bounds for one room; `embeddings` are the places that the embedding may have."""

    def __init__(self, room: Room, checkpointed: str, embeddings: tuple[str, ...]):
        self.room, self.checkpointed, self.embeddings = room, checkpointed, embeddings
        self.units, self.last = room.shape.layers + 1, len(room.gpus) - 1
        cards = list(zip(room.gpus, room.usable, strict=True))
        self.alike = [cards.index(card) for card in cards]
        """For each GPU, the first that is like it."""
        speeds = [replace(gpu, name="", memory=0, context=0) for gpu in room.gpus]
        self.speed = [speeds.index(speed) for speed in speeds]
        """For each GPU, the first that is as fast."""

    def that_may_fit(self, settings: list[Setting], ceiling: int | None = None) -> list[Setting]:
        """Without those that surely do not, or have a peak above `ceiling`: whatever is smaller than `_most` allows
        needs less in smaller parts, as long as they are all in flight, or the same number of them."""
        kinds = ([each for each in settings if each.waves == waves] for waves in (False, True))
        return [each for kind in kinds for each in self._of_one_kind(kind, ceiling)]

    def _of_one_kind(self, settings: list[Setting], ceiling: int | None) -> list[Setting]:
        layers, usable = self.room.shape.layers, sum(self.room.usable)
        usable = usable if ceiling is None else min(usable, ceiling * len(self.room.gpus))
        if settings:
            # Each micro-batch keeps a copy of its prefix for each block, or more where the block is not checkpointed.
            copies = cast_bytes(self.room.shape, settings[0]) * settings[0].training * (layers - 1)
            settings = [setting for setting in settings if setting.micro_batches * copies <= usable]

        def may_fit(setting: Setting) -> bool:
            return self._may_fit(setting, ceiling)

        if not settings or not may_fit(settings[-1]):
            return []
        return settings[bisect_left(settings, True, key=may_fit) :]

    def _may_fit(self, setting: Setting, ceiling: int | None) -> bool:
        layers, costs = self.room.shape.layers, Costs(self.room.shape, setting, smooth=True)
        most = lru_cache(maxsize=None)(lambda gpu, flags: self._most(costs, gpu, flags, ceiling))

        def room(place: str, first: int) -> bool:
            total = 0
            for gpu in range(first, self.last + 1):
                alike = self.alike[gpu]
                if total + most(alike, stage_flags(place, gpu == first, True)) >= layers:
                    return True
                total += most(alike, stage_flags(place, gpu == first, False))
            return False

        return any(room(place, first) for place in self.embeddings for first in range(self.last + 1))

    def _most(self, costs: Costs, gpu: int, flags: tuple[bool, ...], ceiling: int | None) -> int:
        """Most blocks that this GPU could hold if the allocator left the least slack and costs were smooth; less than
        -layers if not even the head. More blocks need more, more micro-batches need less."""
        head, card = flags[1], self.room.gpus[gpu]
        usable = self.room.usable[gpu] - SLACK_AT_LEAST - card.context
        usable = usable if ceiling is None else min(usable, ceiling)

        def fits(count: int) -> bool:
            # The least of all numbers of checkpointed blocks is at one of these.
            kept = {"all": {0}, "none": {count}, "auto": {0, min(1, count), count}}[self.checkpointed]
            return any(costs.need(count, number, flags).on(card) <= usable for number in kept)

        if not fits(1 - head):
            return -self.units if head else 0
        return bisect_left(range(1, self.units), True, key=lambda count: not fits(count))

    def _least_time(self, costs: Costs, gpu: int, count: int) -> tuple[float, float]:
        """Seconds that no stage of `count` blocks beats: forward, backward; checkpointed is what has no room else."""
        shape, setting, parts = costs.shape, costs.setting, costs.setting.flying
        forward, again, backward, least, _ = self._rates(costs, gpu)
        plain = count * (self.checkpointed != "all")
        if setting.training and self.checkpointed == "auto":
            free = self.room.usable[gpu] - count * costs.block - (count - 1) * hidden_bytes(shape, setting) * parts
            saved, by_first = (block_cost(shape, setting, first).saved for first in (False, True))
            plain = max(0, min(count, (free // parts + saved - by_first) // saved))
        return count * forward + least, (count * backward + (count - plain) * again) * setting.training

    def _rates(self, costs: Costs, gpu: int) -> tuple[float, ...]:
        return costs.rates(self.speed[gpu], self.room.gpus[gpu])

    def quick_seconds(self, costs: Costs) -> float:
        """Seconds that no plan for this setting beats: all blocks and the head on the fastest GPU for the sums, shared
        out evenly for the slowest stage."""
        return self._bound(costs, [0.0, 0.0])

    def least_seconds(self, costs: Costs) -> float:
        """As `quick_seconds`, but with whole blocks in the slowest stage, checkpointed where memory is short."""
        slowest = [0.0, 0.0]
        for way in (0, 1):
            counts, times = [0] * len(self.alike), [self._least_time(costs, alike, 1)[way] for alike in self.alike]
            for _ in range(self.room.shape.layers):
                gpu = times.index(min(times))
                slowest[way] = max(slowest[way], times[gpu])
                counts[gpu] += 1
                times[gpu] = self._least_time(costs, self.alike[gpu], counts[gpu] + 1)[way]
        return self._bound(costs, slowest)

    def _bound(self, costs: Costs, slowest: list[float]) -> float:
        layers, again = self.room.shape.layers, self.checkpointed == "all"
        rates = [self._rates(costs, gpu) for gpu in range(self.last + 1)]
        head = min(rate[4] for rate in rates)  # one GPU does that, whatever else
        ahead = layers * min(rate[0] for rate in rates) + head
        even = layers + min(rate[4] / rate[0] for rate in rates)  # the head counts as so many blocks
        back = [(rate[2] + rate[1] * again) for rate in rates]
        setting, host = costs.setting, self.room.host
        launch = layers * (host.launch_backward + again * host.launch_again) * setting.training
        if setting.replayed:
            launch = (layers if again else 1) * host.launch_graph
        launch_ahead = host.launch_forward + (launch if setting.replayed else layers * host.launch_forward)
        total = StageTime(ahead, layers * min(back) * setting.training, launch_ahead, launch)
        slow = StageTime(
            max(slowest[0], head, even / sum(1 / rate[0] for rate in rates)),
            max(slowest[1], layers / sum(1 / seconds for seconds in back) * setting.training),
        )
        return pass_seconds(total, slow, costs.parts, setting.flying)
