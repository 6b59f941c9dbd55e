"""The search behind `devicemap.plan_device_map`: cuts, embedding, micro-batches and checkpointing, exactly.

    GPU      0            1            2
    units    0..u         u..v         v..N+1        (block 0, block 1, ..., norm + head)

    partial plan = (forward: sum and slowest stage, backward: the same, seconds of launches, largest peak)

A partial plan that is not better than another one in any of those can never end better, and is dropped.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from glmhelpers.cost_model.block_memory import block_cost
from glmhelpers.cost_model.gpus import GPU
from glmhelpers.cost_model.sizes import Setting, Shape
from glmhelpers.cost_model.stages import Stage
from glmhelpers.cost_model.step_memory import slack_bytes, stage_terms
from glmhelpers.cost_model.step_time import StageTime, combine, lookup_seconds, pass_seconds, stage_seconds

EMBEDDINGS = ("first", "tied", "cpu")
"""Places for the embedding, the preferred one first where plans are equal."""


@dataclass(frozen=True)
class Room:
    """The model and the GPUs: sizes, cards, and bytes that may be used on each card."""

    shape: Shape
    gpus: tuple[GPU, ...]
    usable: tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """The best plan: one Stage for each GPU, and what it costs."""

    setting: Setting
    embedding: str
    stages: tuple[Stage, ...]
    seconds: float
    peak: int

    @property
    def used(self) -> int:
        """GPUs that hold something."""
        return sum(stage != Stage() for stage in self.stages)


@dataclass(frozen=True)
class _Piece:
    """One stage on one GPU: what it holds and how long it works."""

    stage: Stage
    time: StageTime
    peak: int


_NO_TIME = StageTime(0.0, 0.0)


@dataclass(frozen=True)
class _Partial:
    total: StageTime = _NO_TIME
    slowest: StageTime = _NO_TIME
    peak: int = 0
    stages: tuple[Stage, ...] = ()
    used: int = 0

    def beats(self, other: "_Partial") -> bool:
        """Not worse in anything that counts for what is still to come."""
        return (
            self.total.forward <= other.total.forward
            and self.total.backward <= other.total.backward
            and self.slowest.forward <= other.slowest.forward
            and self.slowest.backward <= other.slowest.backward
            and self.total.launch_backward <= other.total.launch_backward
            and self.peak <= other.peak
            and (self.used == other.used or min(self.used, other.used) > 1)
        )


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

    def best(self, settings: Iterable[Setting]) -> Found | None:
        """The best plan over all settings and all places of the embedding, or None if nothing fits."""
        settings = list(settings)
        ceiling = None
        if self.objective == "memory":
            peaks = [self._walk(setting, place, None, "peak") for setting in settings for place in self.embeddings]
            ceiling = min((found.peak for found in peaks if found), default=None)
            if ceiling is None:
                return None
        best = None
        for setting in settings:
            for place in self.embeddings:
                found = self._walk(setting, place, ceiling, "time", best)
                if found and (best is None or _rank(found.seconds, found.used) < _rank(best.seconds, best.used)):
                    best = found
        return best

    def fits(self, setting: Setting) -> bool:
        """Does any plan with this setting fit?"""
        return any(self._walk(setting, place, None, "peak") for place in self.embeddings)

    def shortage(self, setting: Setting) -> list[int]:
        """Bytes that each GPU lacks in the plan whose largest lack is smallest."""
        best: tuple[int, list[int]] | None = None
        for place in self.embeddings:
            lack = self._least_lack(setting, place)
            if best is None or max(lack) < max(best[1]):
                best = (max(lack), lack)
        return best[1]

    def _piece(self, setting: Setting, gpu: int, stage: Stage) -> _Piece | None:
        """The stage on this GPU, or None if it is too large."""
        card = self.room.gpus[gpu]
        _, terms = stage_terms(self.room.shape, setting, stage, card.gemm_workspace)
        peak = sum(terms.values())
        if peak + slack_bytes(terms) + card.context > self.room.usable[gpu]:
            return None
        return _Piece(stage, stage_seconds(self.room.shape, setting, stage, card), peak)

    def _option(self, setting: Setting, gpu: int, count: int, flags: dict[str, bool]) -> _Piece | None:
        """The fastest stage of `count` blocks that fits: as few checkpointed blocks as there is memory for."""
        if self.checkpointed != "auto" or not setting.training:
            return self._piece(setting, gpu, Stage.of(count, count if self.checkpointed == "none" else 0, **flags))
        plain = Stage.of(count, 0, **flags)
        _, terms = stage_terms(self.room.shape, setting, plain, self.room.gpus[gpu].gemm_workspace)
        rest = self.room.usable[gpu] - sum(terms.values()) + terms["block"] + terms["loss"]
        each = block_cost(self.room.shape, setting).saved * setting.micro_batches
        for kept in range(max(0, min(count, rest // each + 1)), -1, -1):
            if piece := self._piece(setting, gpu, Stage.of(count, kept, **flags)):
                return piece
        return None

    def _flags(self, place: str, first: bool, head: bool) -> dict[str, bool]:
        here = (place == "first" and first) or (place == "tied" and head)
        return {"embedding": here, "head": head, "shared": here and head, "first": first}

    def _walk(
        self, setting: Setting, place: str, ceiling: int | None, count_what: str, known: Found | None = None
    ) -> Found | None:
        """The best plan with this setting and this place of the embedding.

        `count_what`: "time" (a peak above `ceiling` is refused) or "peak" (time does not matter).
        `known`: a plan that must be beaten; partial plans that cannot are dropped.
        """
        room, parts = self.room, setting.micro_batches
        units, last = room.shape.layers + 1, len(room.gpus) - 1
        options: dict[tuple, _Piece | None] = {}
        states: dict[int, list[_Partial]] = {0: [_Partial()]}

        def seconds(partial: _Partial) -> float:
            start = lookup_seconds(room.shape, setting, place, partial.used, room.gpus[0])
            return start + pass_seconds(partial.total, partial.slowest, parts)

        for gpu in range(len(room.gpus)):
            grown: dict[int, list[_Partial]] = {}
            # Of equally good plans the first one stays: one that is complete rather than one that goes on behind an
            # empty GPU, and last one that has not begun.
            for done, partials in sorted(states.items(), key=lambda state: (state[0] == 0, state[0] < units, state[0])):
                for end in range(units if gpu == last else done, units + 1):
                    if end == done:
                        for partial in partials:
                            _keep(grown.setdefault(end, []), replace(partial, stages=(*partial.stages, Stage())))
                        continue
                    head = end == units
                    key = (room.gpus[gpu], room.usable[gpu], end - done - head, done == 0, head)
                    if key not in options:
                        flags = self._flags(place, done == 0, head)
                        options[key] = self._option(setting, gpu, end - done - head, flags)
                    piece = options[key]
                    if piece is None or (ceiling is not None and piece.peak > ceiling):
                        continue
                    for partial in partials:
                        new = _add(partial, piece, count_what == "time")
                        if known is None or count_what == "peak" or seconds(new) < known.seconds:
                            _keep(grown.setdefault(end, []), new)
            states = grown
        ends = states.get(units, [])
        if not ends:
            return None
        best = min(ends, key=lambda p: _rank(p.peak if count_what == "peak" else seconds(p), p.used))
        return Found(setting, place, best.stages, seconds(best), best.peak)

    def _least_lack(self, setting: Setting, place: str) -> list[int]:
        """Bytes short on each GPU, for the cuts whose largest shortage is smallest."""
        room, kept = self.room, self.checkpointed == "none"
        units = room.shape.layers + 1
        states: dict[int, list[int]] = {0: []}
        for gpu in range(len(room.gpus)):
            card, grown = room.gpus[gpu], {}
            for done, lacks in states.items():
                for end in range(done, units + 1):
                    head = end == units and end > done
                    count = end - done - head
                    stage = Stage.of(count, count * kept, **self._flags(place, done == 0 and end > 0, head))
                    _, terms = stage_terms(room.shape, setting, stage, card.gemm_workspace)
                    lack = 0
                    if end > done:
                        total = sum(terms.values()) + slack_bytes(terms) + card.context
                        lack = max(0, total - room.usable[gpu])
                    new = [*lacks, lack]
                    if end not in grown or max(new) < max(grown[end]):
                        grown[end] = new
            states = grown
        return states[units]


def _rank(amount: float, used: int) -> tuple[float, int]:
    """What the best plan has least of. A GPU that makes nothing faster is left free; sums of floats that differ in the
    last digits are the same time."""
    return round(amount, 9), used


def _add(partial: _Partial, piece: _Piece, timed: bool) -> _Partial:
    stages, used = (*partial.stages, piece.stage), partial.used + 1
    if not timed:
        return replace(partial, peak=max(partial.peak, piece.peak), stages=stages, used=used)
    return _Partial(combine(sum, partial.total, piece.time), combine(max, partial.slowest, piece.time), 0, stages, used)


def _keep(partials: list[_Partial], new: _Partial) -> None:
    """Put a partial plan into the list unless another one beats it; take out those that it beats."""
    if any(old.beats(new) for old in partials):
        return
    partials[:] = [old for old in partials if not new.beats(old)]
    partials.append(new)
