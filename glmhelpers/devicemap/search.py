"""The search behind `plan_device_map`: where to cut, which blocks are checkpointed, how many micro-batches: exactly.

    GPU      0            1            2
    units    0..u         u..v         v..N+1        (block 0, block 1, ..., norm + head)

    partial plan      the GPUs up to here: forward and backward seconds, their sum and the slowest stage, launches
    rest              the least that each of these can be behind it: five small tables, made from the end
    incumbent         the best whole plan known; the first comes from following only the most promising ones

Branch and bound: a partial plan is dropped if another one is not worse in anything that counts for what comes, or if
it is slower than the incumbent even with the best conceivable rest. Whole settings (numbers of micro-batches) are
dropped by the same rule (`bounds`).
"""

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from glmhelpers.cost_model.sizes import Setting, divisors
from glmhelpers.cost_model.stages import Stage
from glmhelpers.cost_model.step_time import StageTime, lookup_seconds, pass_seconds
from glmhelpers.devicemap.bounds import EMBEDDINGS, Bounds, Costs, Need, Room, stage_flags

BEAM = 3
"""Partial plans a state in the first, quick pass, which gives the search its first incumbent."""

SAME = 1e-9
"""Seconds within which two plans are equally fast: sums of floats differ in their last digits."""


@dataclass(frozen=True)
class Found:
    """The best plan: one Stage for each GPU, and the seconds of a step."""

    setting: Setting
    embedding: str
    stages: tuple[Stage, ...]
    seconds: float

    @property
    def rank(self) -> tuple[float, bool, int, int, int]:
        """What the best plan has least of. A GPU that makes nothing faster is left free."""
        used, setting = sum(stage != Stage() for stage in self.stages), self.setting
        return round(self.seconds, 9), setting.waves, used, setting.micro_batches, EMBEDDINGS.index(self.embedding)


class _Partial(NamedTuple):
    """The GPUs so far: seconds of all stages, of the slowest one, of the host's launches for the backward pass."""

    forward: float = 0.0
    backward: float = 0.0
    slow_forward: float = 0.0
    slow_backward: float = 0.0
    launch: float = 0.0
    used: int = 0
    stages: tuple[Stage, ...] = ()

    def beats(self, other: "_Partial") -> bool:
        """Not worse in anything that counts for what is still to come."""
        return (
            self.forward <= other.forward
            and self.backward <= other.backward
            and self.slow_forward <= other.slow_forward
            and self.slow_backward <= other.slow_backward
            and self.launch <= other.launch
            and (self.used == other.used or min(self.used, other.used) > 1)
        )

    def with_stage(self, stage: Stage, time: StageTime) -> "_Partial":
        """One GPU more."""
        return _Partial(
            self.forward + time.forward,
            self.backward + time.backward,
            max(self.slow_forward, time.forward),
            max(self.slow_backward, time.backward),
            self.launch + time.launch_backward,
            self.used + 1,
            (*self.stages, stage),
        )


NOTHING = _Partial()


def variants(setting: Setting, micro_batches: int | None, in_flight: int | None = None) -> list[Setting]:
    """The setting with every number of micro-batches that may be chosen, ascending; no more than so many in flight."""
    fixed = micro_batches or (None if setting.training else 1)
    numbers = [fixed] if fixed else divisors(setting.batch_size)
    return [replace(setting, micro_batches=part, in_flight=in_flight and min(in_flight, part)) for part in numbers]


class Search:
    """Finds the best plan for one room.

    Args:
        room: the model and the GPUs.
        objective: "speed" or "memory".
        checkpointed: "auto", "all" or "none".
        embedding: one of EMBEDDINGS, or None for all of them.
    """

    def __init__(self, room: Room, objective: str, checkpointed: str, embedding: str | None):
        if checkpointed not in ("auto", "all", "none"):
            raise ValueError(f"checkpointed={checkpointed!r}; use 'auto', 'all' or 'none'")
        if embedding not in (None, *EMBEDDINGS):
            raise ValueError(f"embedding={embedding!r}; use one of {EMBEDDINGS}, or None to let the planner choose")
        self.room, self.objective = room, objective
        self.checkpointed = "all" if objective == "memory" and checkpointed == "auto" else checkpointed
        self.embeddings = (embedding,) if embedding else EMBEDDINGS
        self.bounds = Bounds(room, self.checkpointed, self.embeddings)
        self.units, self.last = room.shape.layers + 1, len(room.gpus) - 1
        self._costs = lru_cache(maxsize=None)(lambda setting: Costs(room.shape, setting))

    def best(self, settings: list[Setting]) -> Found | None:
        """The best plan over all settings and all places of the embedding, or None if nothing fits."""
        settings, ceiling = self.bounds.that_may_fit(settings), None
        ways = [(self._costs(setting), place) for setting in settings for place in self.embeddings]
        if self.objective == "memory":
            peaks: dict[tuple, int] = {}
            while settings:  # the more parts, the less memory
                *settings, setting = settings
                before = ceiling
                for way in [(self._costs(setting), place) for place in self.embeddings]:
                    if (peak := self._least_peak(*way, ceiling)) is not None:
                        ceiling = peaks[way] = peak
                if ceiling != before:
                    settings = self.bounds.that_may_fit(settings, ceiling)
            ways = [way for way, peak in peaks.items() if peak == ceiling]
        best: Found | None = None
        quick = {each: self.bounds.quick_seconds(each) for each in dict.fromkeys(each for each, _ in ways)}
        for each, place in sorted(ways, key=lambda way: quick[way[0]]):
            if best is not None:
                limit = best.seconds + SAME
                if quick[each] > limit:
                    break
                if self.bounds.least_seconds(each) > limit:
                    continue
            best = self._walk(each, place, ceiling, best) or best
        return best

    def fits(self, settings: list[Setting]) -> bool:
        """Does any plan with one of these settings fit?"""
        return any(
            self._reaches(self._peaks(self._costs(setting), place), None)
            for setting in reversed(self.bounds.that_may_fit(settings))
            for place in self.embeddings
        )

    def shortage(self, setting: Setting) -> list[int]:
        """Bytes that each GPU lacks in the plan whose largest lack is smallest."""
        costs = self._costs(setting)
        return min((self._least_lack(costs, place) for place in self.embeddings), key=max)

    def _options(self, costs: Costs, gpu: int, flags: tuple[bool, ...], limit: float) -> dict[int, Need]:
        """Number of blocks -> the fastest stage of so many that fits, without those that surely take longer than a step
        may, `limit` seconds."""
        card, setting, layers = self.room.gpus[gpu], costs.setting, self.room.shape.layers
        forward, _, backward, *_ = costs.rates(self.bounds.speed[gpu], card)
        least = layers if flags[1] and flags[3] else 1 - flags[1]  # the only one has all blocks
        most = min(layers, self.room.usable[gpu] // costs.block)
        most = int(min(most, (limit + SAME) / (costs.parts * (forward + backward * setting.training))))
        known = costs.options.setdefault((self.bounds.alike[gpu], flags), {})
        for count in range(least, most + 1):
            if count not in known:
                known[count] = self._fastest(costs, gpu, count, flags)
        return {count: need for count in range(least, most + 1) if (need := known[count])}

    def _fastest(self, costs: Costs, gpu: int, count: int, flags: tuple[bool, ...]) -> Need | None:
        """With as few checkpointed blocks as there is memory for; None where nothing fits."""
        card, usable = self.room.gpus[gpu], self.room.usable[gpu]
        kept = count if self.checkpointed == "none" else 0
        if self.checkpointed == "auto" and costs.setting.training:
            # Beside what comes and goes, each block more without checkpointing takes `more`; the first may take less.
            rest = usable - costs.need(count, 0, flags).lasting
            kept = max(0, min(count, rest // costs.more + 2)) if costs.more > 0 else count
        for number in range(kept, -1, -1) if self.checkpointed == "auto" else [kept]:
            if (need := costs.need(count, number, flags)).fits(card, usable):
                return need
        return None

    def _tables(self, costs: Costs, gpu: int, place: str, limit: float = float("inf")) -> list[dict[int, Need]]:
        """Options of this GPU: as the first one, as the only one, in the middle, as the last one."""
        kinds = [(True, False, gpu < self.last), (True, True, True), (False, False, 0 < gpu < self.last)]
        kinds.append((False, True, gpu > 0))
        return [
            self._options(costs, gpu, stage_flags(place, first, head), limit) if can else {}
            for first, head, can in kinds
        ]

    def _peaks(self, costs: Costs, place: str) -> list[list[dict[int, int]]]:
        """For each GPU its tables, with the peak alone."""
        peaks = []
        for gpu, card in enumerate(self.room.gpus):
            tables = self._tables(costs, gpu, place)
            peaks.append([{count: need.on(card) for count, need in table.items()} for table in tables])
        return peaks

    def _reaches(self, peaks: list[list[dict[int, int]]], limit: int | None) -> bool:
        """Is there a plan with no peak above `limit`? Numbers of blocks placed so far are bits of `placed`."""
        layers, placed = self.room.shape.layers, 0
        for tables in peaks:
            first, only, middle, last = (
                [count for count, peak in table.items() if limit is None or peak <= limit] for table in tables
            )
            if layers in only or any(placed >> layers - count & 1 for count in last):
                return True
            before = placed
            for count in middle:
                placed |= before << count
            for count in first:
                placed |= 1 << count
            placed &= (2 << layers) - 1
        return False

    def _least_peak(self, costs: Costs, place: str, limit: int | None) -> int | None:
        """The least largest peak of any plan, or None if none fits or all are above `limit`."""
        if limit is not None:
            # One of the GPUs has so many blocks at least, and more blocks need more.
            count = -(-self.room.shape.layers // len(self.room.gpus))
            kinds = {stage_flags(place, first, head) for first in (True, False) for head in (True, False)}
            kept = count if self.checkpointed == "none" else 0
            if min(costs.need(count, kept, flags).peak for flags in kinds) > limit:
                return None
        peaks = self._peaks(costs, place)
        if not self._reaches(peaks, limit):
            return None
        values = {peak for tables in peaks for table in tables for peak in table.values()}
        ascending = sorted(peak for peak in values if limit is None or peak <= limit)
        return ascending[bisect_left(ascending, True, key=lambda peak: self._reaches(peaks, peak))]

    def _moves(self, costs: Costs, gpu: int, place: str, ceiling: int | None, limit: float) -> dict[int, list]:
        """Units placed so far -> (units placed behind it, stage, its seconds) for all that this GPU can take.

        Left out is what has a peak above `ceiling`, or takes longer on its own than a step may take, `limit` seconds.
        """
        card, layers, speed = self.room.gpus[gpu], self.room.shape.layers, self.bounds.speed[gpu]

        def timed(table: dict[int, Need]) -> dict[int, tuple[Stage, StageTime]]:
            found = {}
            for count, need in table.items():
                if ceiling is None or need.on(card) <= ceiling:
                    time = costs.time(speed, card, need.stage)
                    if costs.parts * (time.forward + time.backward) <= limit + SAME:
                        found[count] = need.stage, time
            return found

        first, only, middle, last = map(timed, self._tables(costs, gpu, place, limit))

        def moves(done: int, on: dict, ends: dict) -> list[tuple[int, Stage, StageTime]]:
            found = [(done + count, *piece) for count, piece in on.items() if done + count <= layers]
            found = found if gpu < self.last else []
            return [*found, (self.units, *ends[layers - done])] if layers - done in ends else found

        return {0: moves(0, first, only)} | {done: moves(done, middle, last) for done in range(1, self.units)}

    def _walk(self, costs: Costs, place: str, ceiling: int | None, known: Found | None) -> Found | None:
        """The best plan with this setting and this place of the embedding, or None if `known` is as good."""
        room, setting, parts, gpus = self.room, costs.setting, costs.parts, range(self.last + 1)
        limit = known.seconds if known else float("inf")
        moves = [self._moves(costs, gpu, place, ceiling, limit) for gpu in gpus]
        rests = self._rests(moves)
        head, blocks = room.host.launch_forward, room.shape.layers * room.host.launch_forward
        lookup = {used: lookup_seconds(room.shape, setting, place, used, room.gpus[0]) for used in (1, 2)}

        def seconds(partial: _Partial, rest: _Partial = NOTHING) -> float:
            launch = partial.launch + rest.launch
            ahead = head + (launch if setting.replayed else blocks)  # a segment's two graphs start equally fast
            total = StageTime(partial.forward + rest.forward, partial.backward + rest.backward, ahead, launch)
            slow = StageTime(
                max(partial.slow_forward, rest.slow_forward), max(partial.slow_backward, rest.slow_backward)
            )
            return lookup[min(max(partial.used, 1), 2)] + pass_seconds(total, slow, parts, setting.flying)

        def may_win(partial: _Partial, rest: _Partial) -> bool:
            least = round(seconds(partial, rest) * (1 - 1e-12), 9)
            return (least, setting.waves, partial.used + rest.used, parts, EMBEDDINGS.index(place)) < to_beat

        def found(partials: list[_Partial]) -> list[Found]:
            return [Found(setting, place, partial.stages, seconds(partial)) for partial in partials]

        def walk(beam: int | None) -> list[_Partial]:
            states: dict[int, list[_Partial]] = {0: [_Partial()]}
            for gpu in gpus:
                grown: dict[int, list[_Partial]] = {}
                # Of equally good plans the first one stays: one that is complete rather than one that goes on behind an
                # empty GPU, and last one that has not begun.
                for done, partials in sorted(states.items(), key=lambda s: (s[0] == 0, s[0] < self.units, s[0])):
                    for partial in partials:
                        stay = partial._replace(stages=(*partial.stages, Stage()))
                        ends = [(done, stay)] if done in rests[gpu + 1] else []
                        for end, stage, time in moves[gpu].get(done, []):
                            if end in rests[gpu + 1]:
                                ends.append((end, partial.with_stage(stage, time)))
                        for end, new in ends:
                            if may_win(new, rests[gpu + 1][end]):
                                _keep(grown.setdefault(end, []), new)
                if beam:
                    for end, partials in grown.items():
                        rest = rests[gpu + 1][end]
                        grown[end] = sorted(partials, key=lambda partial: seconds(partial, rest))[:beam]
                states = grown
            return states.get(self.units, [])

        if 0 not in rests[0]:
            return None
        incumbent = known
        for beam in (BEAM, None):
            to_beat = incumbent.rank if incumbent else (float("inf"),)
            plans = found(walk(beam)) + ([incumbent] if incumbent else [])
            incumbent = min(plans, key=lambda plan: plan.rank, default=None)
        return None if incumbent is known else incumbent

    def _rests(self, moves: list[dict[int, list]]) -> list[dict[int, _Partial]]:
        """For each GPU and number of units placed before it: the least of each number from there to the end."""
        rests = [{self.units: NOTHING}]
        for ways in reversed(moves):
            behind, here = rests[0], dict(rests[0])
            for done, pieces in ways.items():
                ends = [
                    (time.forward + rest.forward, time.backward + rest.backward,
                     max(time.forward, rest.slow_forward), max(time.backward, rest.slow_backward),
                     time.launch_backward + rest.launch, rest.used + 1)
                    for end, _, time in pieces if (rest := behind.get(end))
                ]  # fmt: skip
                if done in behind:
                    ends.append(behind[done][:6])
                if ends:
                    here[done] = _Partial(*map(min, zip(*ends, strict=True)))
            rests.insert(0, here)
        return rests

    def _least_lack(self, costs: Costs, place: str) -> list[int]:
        """Bytes short on each GPU, for the cuts whose largest shortage is smallest."""
        none = self.checkpointed == "none"
        states: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
        for gpu in range(self.last + 1):
            card, usable = self.room.gpus[gpu], self.room.usable[gpu]
            grown: dict[int, tuple[int, tuple[int, ...]]] = {}
            for done, (most, lacks) in states.items():
                for end in range(done, self.units + 1):
                    lack, head = 0, end == self.units
                    if end > done:
                        count = end - done - head
                        need = costs.need(count, count * none, stage_flags(place, done == 0, head))
                        lack = max(0, need.total + need.on(card) - need.peak + card.context - usable)
                    if end not in grown or max(most, lack) < grown[end][0]:
                        grown[end] = max(most, lack), (*lacks, lack)
            states = grown
        return [*states[self.units][1]]


def _keep(partials: list[_Partial], new: _Partial) -> None:
    """Put a partial plan into the list unless another one beats it; take out those that it beats."""
    if any(old.beats(new) for old in partials):
        return
    partials[:] = [old for old in partials if not new.beats(old)]
    partials.append(new)
