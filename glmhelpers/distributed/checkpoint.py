"""Checkpoints and adapters of a model that no process holds whole: gathered, written by one, read by one, handed out.

    rank 0   lora 0-4, Adam's moments ──┐                   ┌──► checkpoint-60/   the Trainer's files, then the marker
    rank 1   lora 5-7, Adam's moments ──┴─► rank 0 ─────────┴──► adapter/         one PEFT folder
                                              │
                                              └─► rank 0 of every other machine whose disk is another one

Adapter and moments of all blocks are small (45 MB for ChatGLM-6B), so they are gathered and nothing in a file tells how
the model was cut: another number of processes, or one process with the Trainer, goes on from it. Each machine keeps
checkpoints of its own unless the folder is shared, so that the loss of any machine leaves the others a full set.
"""

import shutil
import uuid
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import TrainerState

from glmhelpers.distributed.processes import Processes, StartError
from glmhelpers.distributed.stage import StageModule
from glmhelpers.lora.adapter import write_peft_files
from glmhelpers.lora.adapter_files import AdapterFiles
from glmhelpers.lora.attach import adapter_weights, digest_of, fill_adapter, origin_of
from glmhelpers.lora.fingerprint import note_of, weight_samples
from glmhelpers.training.checkpoint_manager import (
    STATE,
    keep_last,
    last_complete,
    mark_complete,
    marker_facts,
    read_state,
    step_of,
)
from glmhelpers.utils.files import alone, room_for

OPTIMIZER, SCHEDULER, SCALER = "optimizer.pt", "scheduler.pt", "scaler.pt"

Matrices = dict[str, dict[str, Any]]
"""Name as in PEFT's files -> `weight` and what the optimizer keeps of it, on the CPU; in the order of the model."""


def in_order(found: list[list[tuple[int, Any]]]) -> list[Any]:
    """What stages have sent, in the order of the forward pass: from each rank, pairs (index of a stage, its part)."""
    return [part for _, part in sorted(chain.from_iterable(found), key=lambda pair: pair[0])]


def base_of(stages: list[StageModule], processes: Processes) -> dict[str, Any]:
    """`base_note` of the whole base, on every rank of a pipeline."""
    mine = [(stage.cut.index, weight_samples(stage.model)) for stage in stages]
    everybody: list[Any] = [None] * processes.mesh["pp"].size()
    dist.all_gather_object(everybody, mine, group=processes.mesh["pp"].get_group())
    weights = [weight for part in in_order(everybody) for weight in part]
    net: Any = stages[0].model.get_base_model()
    return note_of([(name, shape, partial(torch.clone, found)) for name, shape, found in weights], net.config)


def settings_of(files: AdapterFiles) -> dict[str, Any]:
    """Arguments of `build_stage` for an adapter to go on from.

    Raises:
        ValueError: blocks or layers of it have settings of their own.
    """
    config = files.lora_config(trainable=True)
    targets = tuple(sorted(config.target_modules or ()))
    settings = {"r": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout, "targets": targets}
    own = ("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora")
    if name := next((name for name in own if getattr(config, name)), None):
        raise ValueError(f"the adapter {files.name} has {name}: only one process goes on from it, with `train`")
    return settings


def start_from(files: AdapterFiles, stages: list[StageModule], base: Mapping[str, Any]) -> None:
    """Fill this rank's stages with an adapter of a finished training, and note that they start from it.

    Args:
        stages: of this rank, made with `settings_of` the adapter.
        base: `base_of`.

    Raises:
        ValueError: it belongs to another base, or its tensors do not fit.
    """
    layers, block = base["sizes"]["num_layers"], stages[0].cut.blocks[0]
    net: Any = stages[0].model.get_base_model()
    rests = [name for name, _ in net.transformer.layers[block].named_modules() if name]
    files.check_base(base, [f"transformer.layers.{number}.{rest}" for number in range(layers) for rest in rests])
    for stage in stages:
        here = {name: x for name, x in files.tensors.items() if int(name.split(".")[4]) in stage.cut.blocks}
        fill_adapter(stage.model, here, files.name)
    order = whole_order(list(adapter_weights(stages[0].model)), files.tensors)
    for stage in stages:
        origin_of(stage.model).starts_from = f"loaded, {digest_of((name, files.tensors[name]) for name in order)}"


class Store:
    """The folder of a run, on this machine's disk.

    Args:
        folder: of the run, see `run_folder`; need not be there.
        stages: of this rank.
        optimizer, scheduler: of this rank; `scaler`: or None.
        processes: all ranks.
        keep: how many complete checkpoints are kept.
    """

    def __init__(
        self,
        folder: Path,
        stages: list[StageModule],
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        scaler: torch.amp.GradScaler | None,
        processes: Processes,
        keep: int,
    ):
        self.folder, self.stages, self.optimizer, self.scheduler = folder, stages, optimizer, scheduler
        self.scaler, self.processes, self.keep = scaler, processes, keep
        self.writers = self._find_writers()
        self.held = self._hold()

    def _find_writers(self) -> list[int]:
        """Ranks that write: rank 0, and the first of each machine that does not see what rank 0 has written."""
        name = [f".seen-{uuid.uuid4().hex}"]
        dist.broadcast_object_list(name, 0)
        if self.processes.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / name[0]).touch()
        dist.barrier()
        leads = self.processes.rank == 0 or (self.processes.local_rank == 0 and not (self.folder / name[0]).exists())
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, leads)
        if self.processes.rank == 0:
            (self.folder / name[0]).unlink()
        return [rank for rank, answer in enumerate(answers) if answer]

    def _hold(self) -> ExitStack:
        """Keep other trainings out of the folder, on each machine that writes, as long as this process lives."""
        held, busy = ExitStack(), [""] * dist.get_world_size()
        try:
            if self.processes.rank in self.writers:
                held.enter_context(alone(self.folder, wait=False, doing="training in"))
            mine = ""
        except OSError as error:
            mine = str(error.strerror)
        dist.all_gather_object(busy, mine)
        if said := next(filter(None, busy), ""):
            raise StartError(said)
        return held

    def gathered(self) -> Matrices | None:
        """All matrices and moments, on the ranks that write; None elsewhere. Every rank must call it."""
        found: list[Matrices | None] = [self._gather() if self.processes.pipeline == 0 else None]
        if len(self.writers) > 1:
            dist.broadcast_object_list(found, 0)
        return found[0] if self.processes.rank in self.writers else None

    def _gather(self) -> Matrices | None:
        """On rank 0, what the ranks of the first pipeline have; the others have the same."""
        mine = []
        for stage in self.stages:
            kept = {n: {"weight": w, **self.optimizer.state[w]} for n, w in adapter_weights(stage.model).items()}
            found = {n: {key: value.detach().cpu() for key, value in entry.items()} for n, entry in kept.items()}
            mine.append((stage.cut.index, found))
        group = self.processes.mesh["pp"].get_group()
        everybody: Any = [None] * group.size() if self.processes.rank == 0 else None
        dist.gather_object(mine, everybody, dst=0, group=group)
        return everybody and {name: entry for part in in_order(everybody) for name, entry in part.items()}

    def save(self, state: TrainerState, window: Mapping[str, float]) -> None:
        """Write checkpoint-N, N = `state.global_step`; whole or without its marker. Every rank must call it.

        Args:
            window: `sum` of the losses since the step `logged`.
        """
        found = self.gathered()
        if found is not None:
            target = self.folder / f"checkpoint-{state.global_step}"
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            config: Any = self.stages[0].model.peft_config["default"]
            with room_for(target):
                write_peft_files(target, config, {name: entry["weight"] for name, entry in found.items()})
                torch.save(self._whole_optimizer(found), target / OPTIMIZER)
                torch.save(self.scheduler.state_dict(), target / SCHEDULER)
                if self.scaler is not None:
                    torch.save(self.scaler.state_dict(), target / SCALER)
                state.save_to_json(str(target / STATE))
            mark_complete(target, step=state.global_step, window=dict(window))
            keep_last(self.folder, self.keep)
        dist.barrier()  # a rank that is far ahead would only find out in the next step that a writer has died

    def _whole_optimizer(self, found: Matrices) -> dict[str, Any]:
        """The state of one optimizer over all matrices."""
        entries = enumerate(found.values())
        moments = {number: {k: v for k, v in entry.items() if k != "weight"} for number, entry in entries}
        trained, empty = self.optimizer.state_dict()["param_groups"]
        return {"state": moments, "param_groups": [{**trained, "params": list(range(len(found)))}, empty]}

    def resume(self) -> tuple[TrainerState | None, dict[str, float]]:
        """Take up the newest complete checkpoint of any machine; (its state, its window), or (None, {}) without one."""
        newest = last_complete(self.folder) if self.processes.rank in self.writers else None
        steps: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(steps, -1 if newest is None else step_of(newest))
        reader = steps.index(max(steps))
        if steps[reader] < 0:
            return None, {}
        box: list[Any] = [None]
        if self.processes.rank == reader:
            assert newest is not None
            files = {name: newest / name for name in (OPTIMIZER, SCHEDULER, SCALER) if (newest / name).is_file()}
            box = [
                {
                    "weights": load_file(newest / "adapter_model.safetensors"),
                    "state": read_state(newest),
                    "window": marker_facts(newest)["window"],
                    **{name: torch.load(path, map_location="cpu", weights_only=True) for name, path in files.items()},
                }
            ]
        dist.broadcast_object_list(box, reader)
        self._take(box[0])
        known = TrainerState.__dataclass_fields__
        return TrainerState(**{k: v for k, v in box[0]["state"].items() if k in known}), box[0]["window"]

    def _take(self, found: dict[str, Any]) -> None:
        mine: list[str] = []
        for stage in self.stages:
            names = list(adapter_weights(stage.model))
            fill_adapter(stage.model, {name: found["weights"][name] for name in names}, "the checkpoint")
            mine += names
        numbers = {name: number for number, name in enumerate(whole_order(mine, found["weights"]))}
        moments, (trained, empty) = found[OPTIMIZER]["state"], found[OPTIMIZER]["param_groups"]
        state = {place: moments[numbers[name]] for place, name in enumerate(mine) if numbers[name] in moments}
        groups = [{**trained, "params": list(range(len(mine)))}, empty]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.scheduler.load_state_dict(found[SCHEDULER])
        if self.scaler is not None and SCALER in found:
            self.scaler.load_state_dict(found[SCALER])


def whole_order(some: list[str], names: Iterable[str]) -> list[str]:
    """Names of an adapter's matrices in the order of the model, which numbers them for an optimizer.

    Args:
        some: names of at least one whole block, in the order of the model: all blocks are alike.
        names: all of them, in any order.
    """
    pieces = [name.split(".", 5) for name in some]  # base_model.model.transformer.layers.N.rest
    rests = [rest for *_, block, rest in pieces if block == pieces[0][4]]
    return sorted(names, key=lambda name: (int(name.split(".")[4]), rests.index(name.split(".", 5)[5])))
