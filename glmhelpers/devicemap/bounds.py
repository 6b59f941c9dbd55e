"""What no plan can be better than: cheap bounds that spare the search whole settings. They never exclude a best plan.

bytes      the least slack that the allocator leaves, no label rows rounded up, no copies of a prefix: with these out
           of the way, more blocks need more and more micro-batches need less, so a bisection finds the limit
seconds    blocks spread over the GPUs as if their order did not matter, checkpointed only where memory is short
"""

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import lru_cache

from glmhelpers.cost_model.block_memory import block_cost
from glmhelpers.cost_model.gpus import GPU
from glmhelpers.cost_model.sizes import Setting, Shape
from glmhelpers.cost_model.stages import Stage
from glmhelpers.cost_model.step_memory import SLACK_AT_LEAST, hidden_bytes, stage_terms, weight_bytes
from glmhelpers.cost_model.step_time import StageTime, block_seconds, head_seconds, pass_seconds

EMBEDDINGS = ("first", "tied", "cpu")
"""Places for the embedding, the preferred one first where plans are equal."""


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


class Bounds:
    """Bounds for one room; `embeddings` are the places that the embedding may have."""

    def __init__(self, room: Room, checkpointed: str, embeddings: tuple[str, ...]):
        self.room, self.checkpointed, self.embeddings = room, checkpointed, embeddings
        self.units, self.last = room.shape.layers + 1, len(room.gpus) - 1
        cards = list(zip(room.gpus, room.usable, strict=True))
        self.alike = [cards.index(card) for card in cards]
        """For each GPU, the first that is like it."""
        keep = lru_cache(maxsize=None)
        self._most, self._rates = keep(self._find_most), keep(self._find_rates)
        self.least_time = keep(self._find_least_time)

    def that_may_fit(self, settings: list[Setting]) -> list[Setting]:
        """Without those that surely do not: whatever is smaller than `_most` allows needs less in smaller parts."""
        if not self._may_fit(settings[-1]):
            return []
        return settings[bisect_left(settings, True, key=self._may_fit) :]

    def _may_fit(self, setting: Setting) -> bool:
        layers = self.room.shape.layers

        def room(place: str, first: int) -> bool:
            total = 0
            for gpu in range(first, self.last + 1):
                alike = self.alike[gpu]
                if total + self._most(setting, alike, stage_flags(place, gpu == first, True)) >= layers:
                    return True
                total += self._most(setting, alike, stage_flags(place, gpu == first, False))
            return False

        return any(room(place, first) for place in self.embeddings for first in range(self.last + 1))

    def _find_most(self, setting: Setting, gpu: int, flags: tuple[bool, ...]) -> int:
        """Most blocks that this GPU could hold if the allocator left the least slack, no label rows were rounded up and
        no micro-batch kept a copy of the prefix; less than -layers if not even the head. More blocks need more, more
        micro-batches need less."""
        card, usable, head = self.room.gpus[gpu], self.room.usable[gpu], flags[1]
        smooth = setting if setting.label_share == 1 else replace(setting, label_share=0.0)

        def fits(count: int) -> bool:
            # The least of all numbers of checkpointed blocks is at one of these.
            kept = {"all": {0}, "none": {count}, "auto": {0, min(1, count), count}}[self.checkpointed]
            stages = [Stage.of(count, number, *flags) for number in kept]
            terms = [stage_terms(self.room.shape, smooth, each, card.gemm_workspace, copies=0)[1] for each in stages]
            peaks = [sum(own.values()) for own in terms]
            return min(peaks) + SLACK_AT_LEAST + card.context <= usable

        if not fits(1 - head):
            return -self.units if head else 0
        return bisect_left(range(1, self.units), True, key=lambda count: not fits(count))

    def _find_least_time(self, setting: Setting, gpu: int, count: int) -> tuple[float, float]:
        """Seconds that no stage of `count` blocks beats: forward, backward; checkpointed is what has no room else."""
        forward, again, backward, least, _ = self._rates(setting, gpu)
        plain = count * (self.checkpointed != "all")
        if setting.training and self.checkpointed == "auto":
            shape, parts = self.room.shape, setting.micro_batches
            free = self.room.usable[gpu] - weight_bytes(shape, setting, Stage.of(count))
            free -= (count - 1) * hidden_bytes(shape, setting) * parts
            saved, by_first = (block_cost(shape, setting, first).saved for first in (False, True))
            plain = max(0, min(count, (free // parts + saved - by_first) // saved))
        return count * forward + least, (count * backward + (count - plain) * again) * setting.training

    def _find_rates(self, setting: Setting, gpu: int) -> tuple[float, ...]:
        """Seconds of a block forward, again, backward; the less of sending and of the head; the head."""
        shape, card = self.room.shape, self.room.gpus[gpu]
        head = head_seconds(shape, setting, card)
        return *block_seconds(shape, setting, card), min(head, hidden_bytes(shape, setting) / card.link), head

    def least_seconds(self, setting: Setting) -> float:
        """Seconds that no plan for this setting beats: all blocks and the head on the fastest GPU for the sums, blocks
        spread evenly for the slowest stage."""
        layers, again, slowest = self.room.shape.layers, self.checkpointed == "all", list[float]()
        for way in (0, 1):
            counts, times = [0] * len(self.alike), [self.least_time(setting, alike, 1)[way] for alike in self.alike]
            slowest.append(0.0)
            for _ in range(layers):
                gpu = times.index(min(times))
                slowest[way] = max(slowest[way], times[gpu])
                counts[gpu] += 1
                times[gpu] = self.least_time(setting, self.alike[gpu], counts[gpu] + 1)[way]
        rates = [self._rates(setting, alike) for alike in self.alike]
        ahead = layers * min(rate[0] for rate in rates) + min(rate[4] for rate in rates)
        even = layers + min(rate[4] / rate[0] for rate in rates)  # the head counts as so many blocks
        slowest[0] = max(slowest[0], even / sum(1 / rate[0] for rate in rates))
        back = layers * min(rate[2] + rate[1] * again for rate in rates) * setting.training
        host = self.room.host
        launch = layers * (host.launch_backward + again * host.launch_again) * setting.training
        if setting.replayed:
            launch = (layers if again else 1) * host.launch_graph
        launch_ahead = host.launch_forward + (launch if setting.replayed else layers * host.launch_forward)
        total = StageTime(ahead, back, launch_ahead, launch)
        return pass_seconds(total, StageTime(*slowest), setting.micro_batches)
