"""Find the device map that fits, and the best of those.

    units in order      0   1   2  ...  13 | 14  ...  27   norm + head
                        \\____ GPU 0 _____/   \\________ GPU 1 ________/
                                           cut

A plan is: the cuts (GPUs in ascending order; one may stay empty), the place of the embedding, the number of
micro-batches and of those in flight, and the blocks that need no activation checkpointing because memory is left over.

    "speed"    of all plans that fit, the one whose step takes the shortest time (`cost_model.step_time`)
    "memory"   every block checkpointed, a small loss chunk; of all plans, the one whose largest peak is smallest; of
               equals, the fastest

All blocks are alike, so what a GPU holds and how long it works depends only on how many blocks it has and on whether
the head is there. The search walks the GPUs in order and keeps, for each number of units placed so far, only partial
plans that no other beats in everything that counts. That is exact; tests compare it with trying every cut.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from glmhelpers.cost_model.gpus import GPU, find_gpus, one_host
from glmhelpers.cost_model.sizes import Setting, Shape, with_prefix
from glmhelpers.cost_model.stages import Stage
from glmhelpers.cost_model.step_memory import Prediction, predict, stage_terms, with_outside
from glmhelpers.cost_model.step_time import StageTime, Task, lookup_seconds, schedule, stage_seconds, step_seconds
from glmhelpers.devicemap.activation_checkpointing import checkpoint_only
from glmhelpers.devicemap.check import Label, Placement, part_names
from glmhelpers.devicemap.schedules import lane_schedule
from glmhelpers.devicemap.search import SAME, Room, Search, variants
from glmhelpers.utils.units import GIB, parse_size

SMALL_LOSS_CHUNK = 128
"""Token positions whose logits exist at a time in plans for the least memory: a quarter of the model's default."""


class DoesNotFit(ValueError):
    """No plan fits; the message says which GPU is short by how much, and which single change would help.

    Attributes:
        short_bytes: bytes that each GPU lacks in the best attempt, 0 where it has enough.
        changes: name of a setting -> the value that alone would make it fit.
    """

    def __init__(self, message: str, short_bytes: list[int], changes: dict[str, Any]):
        super().__init__(message)
        self.short_bytes, self.changes = short_bytes, changes


@dataclass(frozen=True)
class Plan:
    """One way to spread the model, with what it will hold and how long a step will take.

    Attributes:
        shape, setting: the model and how it is run, with the number of micro-batches.
        stages: what each GPU holds.
        gpus: the GPUs it is for.
        devices: their indices on the machine.
        usable_bytes: for each GPU, its memory less the reserve, 0 if the reserve is larger.
        embedding: "first" (GPU of block 0), "tied" (shared with the head on the last GPU) or "cpu".
        objective: what the plan is best at.
    """

    shape: Shape
    setting: Setting
    stages: Sequence[Stage]
    gpus: Sequence[GPU]
    devices: Sequence[int]
    usable_bytes: Sequence[int]
    embedding: str
    objective: str

    @cached_property
    def device_map(self) -> dict[str, Label]:
        """Module name -> GPU index, or "cpu" for the embedding; as `from_pretrained` takes it."""
        used = [(device, stage) for device, stage in zip(self.devices, self.stages, strict=True) if stage != Stage()]
        homes: dict[str, Label] = {"first": used[0][0], "tied": used[-1][0], "cpu": "cpu"}
        blocks = [device for device, stage in used for _ in stage.blocks]
        places = [homes[self.embedding], *blocks, homes["tied"], homes["tied"]]
        return dict(zip(part_names(self.shape.layers), places, strict=True))

    @property
    def micro_batches(self) -> int:
        """Parts into which the batch is cut."""
        return self.setting.micro_batches

    @property
    def checkpointed_layers(self) -> list[int]:
        """Blocks under activation checkpointing: run again in the backward pass."""
        marks = [mark for stage in self.stages for mark in stage.blocks]
        return [block for block, checkpointed in enumerate(marks) if checkpointed]

    @cached_property
    def seconds(self) -> float:
        """Predicted time of a step; an estimate for comparing plans."""
        return self._lookup_seconds + step_seconds(self.stage_times, self.micro_batches, self.setting.flying)

    def apply(self, model: PreTrainedModel | PeftModel) -> list[str]:
        """Put every part of the model on its device and checkpoint the plan's blocks and no others.

        A part that is there already stays; a second call changes nothing.

        Args:
            model: a ChatGLM, or a PeftModel around one. After `attach_lora`, since peft changes what is checkpointed.

        Returns:
            what had to be changed, in words; nothing if the plan had been applied.

        Raises:
            ValueError: the plan is for a model of another size, or for a GPU that is not here.
        """
        net: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        if (found := Shape.of(net.config)) != self.shape:
            raise ValueError(f"the plan is for another model: it was made for {self.shape}, this one is {found}")
        wanted, changes = Placement.of(self, self.shape.layers, torch.cuda.device_count()), []
        if Placement.of(net) != wanted:
            net.place(wanted.map)
            changes.append(f"the model was moved to its devices ({', '.join(map(str, wanted.devices))})")
        marked = [block for block, module in enumerate(net.transformer.layers) if module.gradient_checkpointing]
        checkpoint_only(model, self.checkpointed_layers)
        if marked != self.checkpointed_layers:
            changes.append(f"{len(self.checkpointed_layers)} blocks are checkpointed, where {len(marked)} were")
        return changes

    @property
    def graphs_fit(self) -> bool:
        """Is there room for the CUDA graphs of this plan's micro-batches, and of shorter ones?"""
        return replace(self, setting=replace(self.setting, cuda_graphs=True)).fits

    @cached_property
    def breakdown(self) -> list[dict[str, int]]:
        """For each GPU, bytes by term (keys of step_memory.TERMS) at its worst moment; the sum is the peak."""
        return [
            dict(stage_terms(self.shape, self.setting, stage, gpu.gemm_workspace)[1])
            for stage, gpu in zip(self.stages, self.gpus, strict=True)
        ]

    @property
    def peak_bytes(self) -> list[int]:
        """For each GPU, bytes in tensors at its worst moment: torch.cuda.max_memory_allocated."""
        return [sum(terms.values()) for terms in self.breakdown]

    @property
    def total_bytes(self) -> list[int]:
        """For each GPU, the peak, the allocator's slack and the CUDA context; 0 where nothing is placed."""
        return [sum(terms.values()) for terms in self.with_outside]

    @property
    def fits(self) -> bool:
        """Is every total within what may be used?"""
        return all(total <= usable for total, usable in zip(self.total_bytes, self.usable_bytes, strict=True))

    @property
    def with_outside(self) -> list[dict[str, int]]:
        """`breakdown` with the allocator's slack and the CUDA context of each GPU that is used, for drawing."""
        return with_outside(self.breakdown, self.gpus, self.setting)

    @property
    def blocks(self) -> list[list[int]]:
        """For each GPU, its blocks."""
        ends = list(accumulate(len(stage.blocks) for stage in self.stages))
        return [list(range(start, end)) for start, end in pairwise([0, *ends])]

    @property
    def stage_times(self) -> list[StageTime]:
        """Seconds of each used GPU for one micro-batch, in order: the input of step_time.schedule."""
        used = [(stage, gpu) for stage, gpu in zip(self.stages, self.gpus, strict=True) if stage != Stage()]
        return [stage_seconds(self.shape, self.setting, stage, gpu) for stage, gpu in used]

    @property
    def schedule(self) -> list[Task]:
        """Who works when in one step, by the time model; the last end is `seconds`. For plots.draw_schedule."""
        if not self.setting.waves:
            return schedule(self.stage_times, self.micro_batches, self._lookup_seconds)
        how = (self.stage_times, self.micro_batches, self.setting.flying)
        return lane_schedule(*how, self._lookup_seconds, self.seconds)

    @property
    def _lookup_seconds(self) -> float:
        return lookup_seconds(self.shape, self.setting, self.embedding, len(self.stage_times), self.gpus[0])

    @property
    def prediction(self) -> Prediction:
        """The same breakdown as a Prediction, for the GPUs that hold something."""
        cards = dict(zip(self.devices, self.gpus, strict=True))
        return predict(
            self.shape,
            self.device_map,
            checkpointed=self.checkpointed_layers,
            gpus=[cards.get(index, self.gpus[0]) for index in range(max(self.devices) + 1)],
            **{name: getattr(self.setting, name) for name in Setting.__dataclass_fields__},
        )

    def __str__(self) -> str:
        """The plan in a few lines."""
        setting = self.setting
        marked, layers = len(self.checkpointed_layers), self.shape.layers
        known = {0: "no block", layers: f"all {layers} blocks"}
        flying = f", {setting.flying} in flight" if setting.waves else ""
        lines = [
            f"batch {setting.batch_size} x {setting.seq_length} tokens in {self.micro_batches} micro-batch"
            f"{'es' * (self.micro_batches > 1)}{flying}, embedding {_WHERE[self.embedding]}, "
            f"{known.get(marked, f'{marked} of {layers} blocks')} checkpointed, "
            f"{'CUDA graphs, ' * setting.cuda_graphs}about {self.seconds:.3g} s a step"
        ]
        facts = (self.devices, self.gpus, self.blocks, self.stages, self.peak_bytes, self.total_bytes)
        for (index, gpu, blocks, stage, peak, total), usable in zip(
            zip(*facts, strict=True), self.usable_bytes, strict=True
        ):
            what = f"blocks {blocks[0]}-{blocks[-1]}" if blocks else "no block"
            what += ", norm, head" if stage.head else ""
            lines.append(
                f"  GPU {index} ({gpu.name}): {what}: peak {peak / GIB:.2f} GiB, "
                f"{total / GIB:.2f} with slack and context, of {usable / GIB:.2f} GiB"
            )
        return "\n".join(lines)


_WHERE = {"first": "with block 0", "tied": "tied to the head", "cpu": "on the CPU"}


def plan_device_map(
    config: Any,
    gpus: Any = ("T4", "T4"),
    batch_size: int = 4,
    seq_length: int = 1024,
    objective: str = "speed",
    *,
    micro_batches: int | None = None,
    checkpointed: str = "auto",
    embedding: str | None = None,
    reserve: int | str | Sequence[int | str] = 0,
    devices: Sequence[int] | None = None,
    cuda_graphs: bool | None = False,
    in_flight: int | None = None,
    **settings: Any,
) -> Plan:
    """The best plan for these GPUs.

    Args:
        config: ChatGLMConfig, or a dict with its keys.
        gpus: list of catalogue names ("T4"), sizes ("15GiB", bytes) or GPU objects; one of them for one GPU; "here":
            this machine's, as `training.measure_machine` measured them.
        batch_size: rows in one optimizer step; seq_length: tokens in a row.
        objective: "speed" or "memory", see the module's docstring.
        micro_batches: fixed number, or None to choose among the divisors of the batch size.
        checkpointed: "auto" (blocks may go without where memory is left), "all" or "none".
        embedding: "first", "tied" or "cpu", or None to choose.
        reserve: memory to keep free on every GPU, or one size for each.
        devices: index of each GPU on its machine, ascending; by default 0, 1, ...
        cuda_graphs: count the memory of recorded micro-batches, and hardly any time of the host for them; None:
            where that makes the step faster. `train` uses graphs for other plans too if there is room (`graphs_fit`).
        in_flight: micro-batches in memory at a time, fixed, at most `batch_size`, which is all. None: where all of
            them at a time fit, and the objective is "speed", as many as there are GPUs if that is faster: the memory
            that it leaves saves running blocks again (lanes, see `training.pipeline`).
        settings: further fields of `sizes.Setting`, such as lora_rank, prefix_length, base_bits, loss_chunk
            (SMALL_LOSS_CHUNK by default when the objective is "memory"), training.

    Returns:
        A Plan; `plan.setting.loss_chunk` is what the model's forward should be given.

    Raises:
        DoesNotFit: no plan fits.
        ValueError: an argument makes no sense.
    """
    if objective not in ("speed", "memory"):
        raise ValueError(f"objective={objective!r}; use 'speed' or 'memory'")
    if objective == "memory":
        settings.setdefault("loss_chunk", SMALL_LOSS_CHUNK)
    settings["cuda_graphs"] = bool(cuda_graphs)
    room, setting = _room_and_setting(config, gpus, reserve, batch_size, seq_length, micro_batches, settings)
    if in_flight is not None:
        replace(setting, micro_batches=batch_size, in_flight=in_flight)  # refuses what is no such number
    search = Search(room, objective, checkpointed, embedding)
    settled = variants(setting, micro_batches, in_flight)
    if in_flight is None and objective == "speed" and search.fits(settled):
        settled += [each for each in variants(setting, micro_batches, len(room.gpus)) if each.waves]
    found = search.best(settled)
    if found and cuda_graphs is None and objective == "speed":
        recorded = [each for each in variants(replace(setting, cuda_graphs=True), micro_batches) if each.replayed]
        other = search.best(recorded)
        found = other if other and other.seconds < found.seconds - SAME else found
    if found is None:
        raise _does_not_fit(room, setting, micro_batches, checkpointed, embedding, in_flight)
    numbers = range(len(room.gpus)) if devices is None else devices
    if len(numbers) != len(room.gpus) or sorted(set(numbers)) != list(numbers):
        raise ValueError(f"devices={devices!r}: give the index of each of the {len(room.gpus)} GPUs, ascending")
    return Plan(room.shape, found.setting, found.stages, room.gpus, numbers, room.usable, found.embedding, objective)


def largest_batch(config: Any, gpus: Any, seq_length: int, *, reserve: Any = 0, **settings: Any) -> int:
    """Most rows of `seq_length` tokens, up to 4096, that fit in one step, in micro-batches of one row; 0 if none does.

    The arguments are those of plan_device_map.
    """
    room, setting = _room_and_setting(config, gpus, reserve, 1, seq_length, None, settings)
    search = Search(room, "memory", "all", None)

    def fits(batch: int) -> bool:
        return search.fits([replace(setting, batch_size=batch, micro_batches=batch if setting.training else 1)])

    return _last_that(fits, 4096)


def longest_length(
    config: Any, gpus: Any, batch_size: int, *, reserve: Any = 0, limit: int | None = None, **settings: Any
) -> int:
    """Most tokens in a row, in steps of 8, that fit with `batch_size` rows a step; 0 if not even 8 do.

    Args:
        config, gpus, batch_size, reserve, settings: as for plan_device_map.
        limit: do not look beyond; by default the length the model was trained for.
    """
    room, setting = _room_and_setting(config, gpus, reserve, batch_size, 8, None, settings)
    search = Search(room, "memory", "all", None)

    def fits(eights: int) -> bool:
        return search.fits(variants(replace(setting, seq_length=8 * eights), None))

    return 8 * _last_that(fits, (limit or room.shape.max_length) // 8)


def _last_that(fits: Callable[[int], bool], most: int) -> int:
    """Largest number up to `most` for which `fits` holds, if it holds for all below; 0 if for none."""
    return bisect_left(range(1, most + 1), True, key=lambda number: not fits(number))


def _room_and_setting(config, gpus, reserve, batch, length, parts, settings) -> tuple[Room, Setting]:
    with _naming("gpus"):
        cards = one_host(find_gpus(gpus))
    reserves = list(reserve) if isinstance(reserve, list | tuple) else [reserve] * len(cards)
    if len(reserves) != len(cards):
        raise ValueError(f"{len(reserves)} reserves for {len(cards)} GPUs; give one for each, or a single one")
    with _naming("reserve"):
        usable = [max(0, card.memory - parse_size(kept)) for card, kept in zip(cards, reserves, strict=True)]
    setting = Setting(batch, length, 1 if parts is None else parts, **with_prefix(config, settings))
    return Room(Shape.of(config), tuple(cards), tuple(usable)), setting


@contextmanager
def _naming(argument: str) -> Iterator[None]:
    """A refused value is told by the name of its argument, too."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error


def _does_not_fit(room, setting, micro_batches, checkpointed, embedding, in_flight) -> DoesNotFit:
    """Name the GPUs that are short in the attempt that lacks least, and every single change that would help."""
    parts = micro_batches or (setting.batch_size if setting.training else 1)
    tried = replace(setting, micro_batches=parts, in_flight=in_flight and min(in_flight, parts))
    search = Search(room, "memory", checkpointed, embedding)
    short = search.shortage(tried)
    changes: dict[str, Any] = {}

    def works(changed: Setting, other: Search = search, flying: int | None = in_flight) -> bool:
        return other.fits(variants(changed, micro_batches, flying))

    step = micro_batches or 1
    rows, eights = (setting.batch_size - 1) // step, (setting.seq_length - 1) // 8
    if many := _last_that(lambda n: works(replace(setting, batch_size=n * step, micro_batches=step)), rows):
        changes["batch_size"] = many * step
    if most := _last_that(lambda n: works(replace(setting, seq_length=8 * n)), eights):
        changes["seq_length"] = 8 * most
    if checkpointed == "none" and works(setting, Search(room, "memory", "all", embedding)):
        changes["checkpointed"] = "all"
    if micro_batches is not None:
        better = next((v.micro_batches for v in variants(setting, None, in_flight) if search.fits([v])), None)
        if better:
            changes["micro_batches"] = better
    if in_flight is None and len(room.gpus) < setting.batch_size and works(setting, flying=len(room.gpus)):
        changes["in_flight"] = len(room.gpus)
    if setting.prefix_projection and works(replace(setting, prefix_projection=0)):
        changes["prefix_projection"] = 0
    for bits in (8, 4):
        if bits < setting.base_bits and works(replace(setting, base_bits=bits)):
            changes["base_bits"] = bits
            break
    lacks = [
        f"GPU {index} ({gpu.name}) is short by {missing / GIB:.2f} GiB"
        for index, (gpu, missing) in enumerate(zip(room.gpus, short, strict=True))
        if missing
    ]
    help_ = ", or ".join(f"{name}={value!r}" for name, value in changes.items())
    message = (
        f"nothing fits: even the best cut of batch {setting.batch_size} x {setting.seq_length} in {parts} "
        f"micro-batch{'es' * (parts > 1)} leaves too little: {'; '.join(lacks)}. "
        + (f"One of these changes alone would make it fit: {help_}." if help_ else "No single change is enough.")
    )
    return DoesNotFit(message, short, changes)
