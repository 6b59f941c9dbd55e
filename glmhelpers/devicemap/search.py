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

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from glmhelpers.cost_model.block_memory import block_cost
from glmhelpers.cost_model.sizes import Setting, divisors
from glmhelpers.cost_model.stages import Stage
from glmhelpers.cost_model.step_memory import cast_bytes, slack_bytes, stage_terms, weight_bytes
from glmhelpers.cost_model.step_time import StageTime, lookup_seconds, pass_seconds, stage_seconds
from glmhelpers.devicemap.bounds import EMBEDDINGS, Bounds, Room, stage_flags

BEAM = 3
"""Partial plans a state in the first, quick pass, which gives the search its first incumbent."""

SAME = 1e-9
"""Seconds within which two plans are equally fast: sums of floats differ in their last digits."""

PASSING = ("block", "loss", "gradients", "transfer")
"""Terms of what comes and goes in a step."""


@dataclass(frozen=True)
class Found:
    """The best plan: one Stage for each GPU, and the seconds of a step."""

    setting: Setting
    embedding: str
    stages: tuple[Stage, ...]
    seconds: float

    @property
    def rank(self) -> tuple[float, int, int, int]:
        """What the best plan has least of. A GPU that makes nothing faster is left free."""
        used = sum(stage != Stage() for stage in self.stages)
        return round(self.seconds, 9), used, self.setting.micro_batches, EMBEDDINGS.index(self.embedding)


class _Piece(NamedTuple):
    """One stage on one GPU: what it holds and how long it works."""

    stage: Stage
    time: StageTime
    peak: int


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


NOTHING, ONE_BLOCK = _Partial(), Stage.of(1)


def variants(setting: Setting, micro_batches: int | None) -> list[Setting]:
    """The setting with every number of micro-batches that may be chosen, ascending."""
    fixed = micro_batches or (None if setting.training else 1)
    return [replace(setting, micro_batches=part) for part in ([fixed] if fixed else divisors(setting.batch_size))]


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
        self._option = lru_cache(maxsize=None)(self._find_option)

    def best(self, settings: list[Setting]) -> Found | None:
        """The best plan over all settings and all places of the embedding, or None if nothing fits."""
        ceiling: int | None = None
        settings = self.bounds.that_may_fit(settings)
        if self.objective == "memory":
            for setting in reversed(settings):  # the more parts, the less memory
                peaks = [self._least_peak(setting, place, ceiling) for place in self.embeddings]
                ceiling = min((peak for peak in [*peaks, ceiling] if peak is not None), default=None)
            if ceiling is None:
                return None
        best: Found | None = None
        for least, setting in sorted(((self.bounds.least_seconds(s), s) for s in settings), key=lambda pair: pair[0]):
            if best is not None and least > best.seconds + SAME:
                break
            for place in self.embeddings:
                best = self._walk(setting, place, ceiling, best) or best
        return best

    def fits(self, settings: list[Setting]) -> bool:
        """Does any plan with one of these settings fit?"""
        return any(
            self._least_peak(setting, place, None) is not None
            for setting in reversed(self.bounds.that_may_fit(settings))
            for place in self.embeddings
        )

    def shortage(self, setting: Setting) -> list[int]:
        """Bytes that each GPU lacks in the plan whose largest lack is smallest."""
        return min((self._least_lack(setting, place) for place in self.embeddings), key=max)

    def _total(self, setting: Setting, gpu: int, stage: Stage) -> int:
        """Bytes that the stage needs of this GPU."""
        card = self.room.gpus[gpu]
        _, terms = stage_terms(self.room.shape, setting, stage, card.gemm_workspace)
        return sum(terms.values()) + slack_bytes(terms) + card.context

    def _find_option(self, setting: Setting, gpu: int, count: int, flags: tuple[bool, ...]) -> _Piece | None:
        """The fastest stage of `count` blocks that fits: as few checkpointed blocks as there is memory for."""
        shape, card = self.room.shape, self.room.gpus[gpu]
        kept = count if self.checkpointed == "none" else 0
        if self.checkpointed == "auto" and setting.training:
            _, terms = stage_terms(shape, setting, Stage.of(count, 0, *flags), card.gemm_workspace)
            # Beside what comes and goes, each block more without checkpointing takes `more`; the first may take less.
            rest = self.room.usable[gpu] - sum(terms[name] for name in terms if name not in PASSING)
            more = (block_cost(shape, setting).saved - cast_bytes(shape, setting)) * setting.micro_batches
            kept = max(0, min(count, rest // more + 2)) if more > 0 else count
        for number in range(kept, -1, -1) if self.checkpointed == "auto" else [kept]:
            stage = Stage.of(count, number, *flags)
            if self._total(setting, gpu, stage) <= self.room.usable[gpu]:
                peak = sum(stage_terms(shape, setting, stage, card.gemm_workspace)[1].values())
                return _Piece(stage, stage_seconds(shape, setting, stage, card), peak)
        return None

    def _moves(self, setting: Setting, gpu: int, place: str, limit: float = float("inf")) -> dict[int, list]:
        """Units placed so far -> (units placed behind it, piece) for every stage that this GPU can take.

        `limit`: seconds that a step may take; a stage that is too slow for that on its own is left out.
        """
        alike, layers = self.bounds.alike[gpu], self.room.shape.layers
        most = self.room.usable[gpu] // weight_bytes(self.room.shape, setting, ONE_BLOCK)

        def pieces(first: bool, head: bool) -> dict[int, _Piece]:
            found = {}
            for count in range(1 - head, min(most, layers) + 1):
                if setting.micro_batches * sum(self.bounds.least_time(setting, alike, count)) > limit + SAME:
                    break
                if piece := self._option(setting, alike, count, stage_flags(place, first, head)):
                    found[count] = piece
            return found

        def moves(done: int, inner: dict[int, _Piece], ends: dict[int, _Piece]) -> list[tuple[int, _Piece]]:
            on = [(done + count, piece) for count, piece in inner.items() if done + count <= layers and gpu < self.last]
            return [*on, (self.units, ends[layers - done])] if layers - done in ends else on

        inner, ends = pieces(False, False), pieces(False, True)
        found = {done: moves(done, inner, ends) for done in range(1, self.units)}
        return {0: moves(0, pieces(True, False), pieces(True, True)), **found}

    def _least_peak(self, setting: Setting, place: str, limit: int | None) -> int | None:
        """The least largest peak of any plan, or None if none fits or all are above `limit`."""
        least = {0: 0}
        for gpu in range(self.last + 1):
            grown = dict(least)
            moves = self._moves(setting, gpu, place)
            for done, peak in least.items():
                for end, piece in moves.get(done, []):
                    new = max(peak, piece.peak)
                    if (limit is None or new <= limit) and (end not in grown or new < grown[end]):
                        grown[end] = new
            least = grown
        return least.get(self.units)

    def _walk(self, setting: Setting, place: str, ceiling: int | None, known: Found | None) -> Found | None:
        """The best plan with this setting and this place of the embedding, or None if `known` is as good."""
        room, parts, gpus = self.room, setting.micro_batches, range(self.last + 1)
        limit = known.seconds if known else float("inf")
        moves = [self._moves(setting, gpu, place, limit) for gpu in gpus]
        if ceiling is not None:
            moves = [
                {done: [way for way in ways if way[1].peak <= ceiling] for done, ways in one.items()} for one in moves
            ]
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
            return lookup[min(max(partial.used, 1), 2)] + pass_seconds(total, slow, parts)

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
                        for end, piece in moves[gpu].get(done, []):
                            if end in rests[gpu + 1]:
                                ends.append((end, partial.with_stage(piece.stage, piece.time)))
                        for end, new in ends:
                            if seconds(new, rests[gpu + 1][end]) <= limit + SAME:
                                _keep(grown.setdefault(end, []), new)
                if beam:
                    for end, partials in grown.items():
                        rest = rests[gpu + 1][end]
                        grown[end] = sorted(partials, key=lambda partial: seconds(partial, rest))[:beam]
                states = grown
            return states.get(self.units, [])

        if 0 not in rests[0]:
            return None
        limit = min([limit, *map(seconds, walk(BEAM))])
        found = [Found(setting, place, partial.stages, seconds(partial)) for partial in walk(None)]
        best = min(found, key=lambda plan: plan.rank, default=None)
        return best if best and (known is None or best.rank < known.rank) else None

    def _rests(self, moves: list[dict[int, list]]) -> list[dict[int, _Partial]]:
        """For each GPU and number of units placed before it: the least of each number from there to the end."""
        rests = [{self.units: NOTHING}]
        for ways in reversed(moves):
            behind, here = rests[0], dict(rests[0])
            for done, pieces in ways.items():
                ends = [
                    (time.forward + rest.forward, time.backward + rest.backward,
                     max(time.forward, rest.slow_forward), max(time.backward, rest.slow_backward),
                     time.launch_backward + rest.launch)
                    for end, (_, time, _) in pieces if (rest := behind.get(end))
                ]  # fmt: skip
                if done in behind:
                    ends.append(behind[done][:5])
                if ends:
                    here[done] = _Partial(*map(min, zip(*ends, strict=True)))
            rests.insert(0, here)
        return rests

    def _least_lack(self, setting: Setting, place: str) -> list[int]:
        """Bytes short on each GPU, for the cuts whose largest shortage is smallest."""
        room, none = self.room, self.checkpointed == "none"
        states: dict[int, list[int]] = {0: []}
        for gpu in range(self.last + 1):
            grown: dict[int, list[int]] = {}
            for done, lacks in states.items():
                for end in range(done, self.units + 1):
                    lack, head = 0, end == self.units
                    if end > done:
                        count = end - done - head
                        stage = Stage.of(count, count * none, *stage_flags(place, done == 0, head))
                        lack = max(0, self._total(setting, gpu, stage) - room.usable[gpu])
                    new = [*lacks, lack]
                    if end not in grown or max(new) < max(grown[end]):
                        grown[end] = new
            states = grown
        return states[self.units]


def _keep(partials: list[_Partial], new: _Partial) -> None:
    """Put a partial plan into the list unless another one beats it; take out those that it beats."""
    if any(old.beats(new) for old in partials):
        return
    partials[:] = [old for old in partials if not new.beats(old)]
    partials.append(new)
