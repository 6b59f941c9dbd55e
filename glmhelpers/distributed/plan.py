"""Which process holds what: the cut of a placement, handed to the ranks of a pipeline.

    placement  GPU 0: blocks 0-4      GPU 1: blocks 5-7       (the same plan as for one process)

    GPipe, 1F1B          rank 0: stage 0 = embedding, 0-4     rank 1: stage 1 = 5-7, norm, head
    Interleaved1F1B      rank 0: stages 0, 2 = 0-2, 5-6       rank 1: stages 1, 3 = 3-4, 7        two stages a rank

    ranks, dp 2 x pp 2   0 1     rows 0 .. B/2-1     one pipeline
                         2 3     rows B/2 .. B-1     another, with the same weights

Interleaved stages are smaller, so the pipeline is full sooner (a smaller bubble), for more messages. A rank holds as
many blocks as the placement gives its GPU, whatever the schedule. The number of pipelines is not part of a plan: it is
what the number of processes makes it, so a run may go on with fewer.
"""

from dataclasses import dataclass
from typing import Any

from glmhelpers.cost_model.placement import Placement
from glmhelpers.cost_model.stages import is_checkpointed
from glmhelpers.devicemap.schedules import SCHEDULES


@dataclass(frozen=True)
class StageCut:
    """One stage: its index, the rank of the pipeline that has it, its blocks, whether it begins or ends the model."""

    index: int
    rank: int
    blocks: range
    first: bool
    last: bool


@dataclass(frozen=True)
class ProcessPlan:
    """How a model is spread over the processes of one pipeline.

    Attributes:
        blocks: number of blocks of each rank, in order; their number is that of the pipeline's ranks.
        schedule: one of SCHEDULES.
        micro_batches: parts into which the rows of one pipeline are cut.
        stages_per_rank: 1; for Interleaved1F1B 2 or more.
        checkpointed: blocks under activation checkpointing.

    Raises:
        ValueError: a value that cannot work; names it.
    """

    blocks: tuple[int, ...]
    schedule: str = "1F1B"
    micro_batches: int = 1
    stages_per_rank: int = 1
    checkpointed: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        ranks, parts = len(self.blocks), self.micro_batches
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r} is unknown; there are {', '.join(SCHEDULES)}")
        if not self.blocks or min(self.blocks) < self.stages_per_rank:
            few = f"{list(self.blocks)} blocks for {self.stages_per_rank} stages on each rank"
            raise ValueError(f"{few}: every stage needs at least one block")
        if (self.schedule == "Interleaved1F1B") != (self.stages_per_rank > 1):
            raise ValueError(
                f"schedule {self.schedule} with {self.stages_per_rank} stages on each rank: Interleaved1F1B takes 2 or "
                "more, the others 1"
            )
        if parts < 1 or (self.schedule == "1F1B" and parts < ranks):
            raise ValueError(f"{parts} micro-batches for {ranks} stages of 1F1B: use {ranks} or more, or GPipe")
        if self.schedule == "Interleaved1F1B" and parts % max(1, parts // ranks):
            raise ValueError(f"{parts} micro-batches for {ranks} ranks: Interleaved1F1B wants a multiple of {ranks}")

    @classmethod
    def of(
        cls, source: Any, layers: int, schedule: str = "1F1B", checkpointed: Any = None, **settings: Any
    ) -> "ProcessPlan":
        """The cut of a plan, or of whatever a `Placement` can be read from; GPU 0 is rank 0, and so on.

        The embedding is always with the first stage and the head with the last; a placement that has the embedding
        elsewhere is taken for its blocks.

        Args:
            source: a plan, a device map or a placement.
            layers: number of blocks.
            schedule: one of SCHEDULES.
            checkpointed: as for `is_checkpointed`; None: as the plan says, or all. All, too, for a plan that keeps few
                micro-batches in flight, unless the schedule is 1F1B: the others keep more.
            settings: further attributes; a plan gives its number of micro-batches if none is given here.
        """
        if hasattr(source, "micro_batches"):
            settings.setdefault("micro_batches", source.micro_batches)
        if checkpointed is None:
            more = schedule != "1F1B" and hasattr(source, "setting") and source.setting.waves
            checkpointed = "all" if more else getattr(source, "checkpointed_layers", "all")
        marks = is_checkpointed(layers, checkpointed)
        counts = tuple(len(blocks) for blocks in Placement.of(source, layers).blocks.values())
        chosen = tuple(block for block, marked in enumerate(marks) if marked)
        return cls(counts, schedule, checkpointed=chosen, **settings)

    def __str__(self) -> str:
        stages = "" if self.stages_per_rank == 1 else f", {self.stages_per_rank} stages on each rank"
        blocks = " | ".join(map(str, self.blocks))
        return f"{blocks} blocks, {self.schedule}{stages}, {self.micro_batches} micro-batches"

    @property
    def ranks(self) -> int:
        """Processes of one pipeline."""
        return len(self.blocks)

    @property
    def whole(self) -> bool:
        """Does each rank have the whole model and one part: a forward and a backward pass, as one process has them?
        Such steps can be CUDA graphs; the schedules of pipelines go backward in another order than graphs do."""
        return self.ranks == self.stages_per_rank == self.micro_batches == 1

    @property
    def stages(self) -> list[StageCut]:
        """All stages in the order of the forward pass; stage s is on rank s modulo `ranks`, as torch wants it."""
        total, start, cuts = self.ranks * self.stages_per_rank, 0, []
        for index in range(total):
            turn, rank = divmod(index, self.ranks)
            share, more = divmod(self.blocks[rank], self.stages_per_rank)
            count = share + (turn < more)
            cuts.append(StageCut(index, rank, range(start, start + count), index == 0, index == total - 1))
            start += count
        return cuts


def even_blocks(layers: int, ranks: int) -> tuple[int, ...]:
    """Blocks for each rank, as equal as they can be; the first ranks get one more."""
    share, more = divmod(layers, ranks)
    return tuple(share + (rank < more) for rank in range(ranks))
