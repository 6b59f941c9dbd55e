"""Guards: a training that has gone wrong (NaN, overflow at every step) stops, says why, and says which knob to turn.

    before the step             a batch without a label
    before the optimizer step   loss nan, inf or exactly 0; gradients not finite     -> nothing of this step is learnt
    after it                    too many steps in a row skipped by the loss scale    -> nothing has been learnt lately
    before the start            several processes                                    -> the right road

Looking at the loss waits for the GPU once a step, some milliseconds in which it has nothing to do: the price of never
saving a checkpoint that is spoilt. Running out of memory is explained in memory_plan.py.
"""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from glmhelpers.devicemap.devices import parameters_of
from glmhelpers.utils.types import Told

SKIPS_ALLOWED = 20
"""Steps in a row that the loss scale may skip: 16 halvings take it from 65,536 to 1."""


class TrainingStoppedError(Told, RuntimeError):
    """Training was stopped because going on would have been useless or harmful."""


class NoLabelsError(TrainingStoppedError, ValueError):
    """A batch has nothing to learn from."""


class Guard(TrainerCallback):
    """Looks at every step and raises `TrainingStoppedError` if it has gone wrong.

    Args:
        last_good: gives the newest complete checkpoint, or None.
        skips_allowed: see SKIPS_ALLOWED.
    """

    def __init__(self, last_good: Callable[[], Path | None], skips_allowed: int = SKIPS_ALLOWED):
        self.last_good, self.skips_allowed = last_good, skips_allowed
        self.losses: list[Tensor] = []
        self.skipped = 0
        self.scale = 0.0

    def see(self, loss: Tensor) -> None:
        """Take the loss of a batch; several are summed up if gradients are accumulated."""
        self.losses.append(loss)

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Refuse a loss that is not a number or 0, and gradients that are not numbers."""
        loss, self.losses = sum(loss.item() for loss in self.losses), []
        scaler = getattr(optimizer, "scaler", None)
        self.scale = 0.0 if scaler is None else scaler.get_scale()
        self.judge(loss, scaler is not None or gradients_finite(model), state.global_step + 1, args)

    def judge(self, loss: float, gradients_are_finite: bool, step: int, args: Any) -> None:
        """Stop for a loss that is not a number or 0, and for gradients that are not numbers.

        Args:
            step: of which they are, counted from 1.
            args: `TrainingArguments`, or something with the same attributes.
        """
        if not math.isfinite(loss):
            self.stop(
                f"the loss of step {step} is {loss}",
                f"Lower the learning rate (it is {args.learning_rate:g}): a tenth of it is a good next try. If the "
                "very first step fails, a weight of the base or of the adapter is not a number: load them again.",
            )
        if loss == 0:
            self.stop(
                f"the loss of step {step} is exactly 0",
                "A model that still has something to learn never reaches it. Look at the labels of a batch (notebook "
                "02): are they what the model should answer? In float16, the base may be damaged: load it again.",
            )
        if not gradients_are_finite:
            self.stop(
                f"the gradients of step {step} are not finite, though its loss is {loss:.4g}",
                f"Lower the learning rate (it is {args.learning_rate:g}).",
            )

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """Count the steps in a row that the GradScaler skipped."""
        scaler = getattr(optimizer, "scaler", None)
        # Not `optimizer.step_was_skipped`: a fused optimizer skips inside its kernel, which accelerate does not notice.
        self.count_skip(scaler is not None and scaler.get_scale() < self.scale, state.global_step + 1, args)

    def count_skip(self, skipped: bool, step: int, args: Any) -> None:
        """Stop if the loss scale has skipped too many steps in a row; `step`, counted from 1, is the last one."""
        self.skipped = self.skipped + 1 if skipped else 0
        if self.skipped >= self.skips_allowed:
            self.stop(
                f"the last {self.skipped} steps up to step {step} were skipped: their gradients "
                f"overflowed float16, even with the loss scaled by {self.scale:.3g}",
                f"Lower the learning rate (it is {args.learning_rate:g}) or max_grad_norm ({args.max_grad_norm:g}), "
                "and look for rows of garbage in the data (notebook 02).",
            )

    def refuse_unlabelled(self, what_has: str) -> None:
        """Stop because of rows in which every label is -100; `what_has` begins the sentence: "the batch ... has"."""
        self.stop(
            f"{what_has} no label: every entry of labels[:, 1:] is -100",
            "Were the answers cut off by a length limit? Raise max_length of encode_file, or leave such rows out with "
            "too_long='drop' (notebook 02).",
            NoLabelsError,
        )

    def stop(self, what: str, remedy: str, kind: type[TrainingStoppedError] = TrainingStoppedError) -> None:
        """Raise with the cause, the knob, and where the last good checkpoint is."""
        good = self.last_good()
        where = f"The last good checkpoint is {good}." if good else "There is no checkpoint yet."
        raise kind(f"Training stopped: {what}. {remedy} {where}")


def gradients_finite(model: torch.nn.Module) -> bool:
    """Whether every gradient is a number; one look at each device, however many gradients there are."""
    sums: dict[torch.device, list[Tensor]] = {}
    for parameter in parameters_of(model):
        if parameter.grad is not None:
            sums.setdefault(parameter.grad.device, []).append(parameter.grad.sum())
    return all(bool(torch.stack(group).isfinite().all()) for group in sums.values())


def refuse_settings(args: Any) -> None:
    """Refuse training arguments that would be ignored here, or broken by taking a run up again.

    Raises:
        ValueError: names the setting, and what to do instead.
    """
    if args.load_best_model_at_end or getattr(args.save_strategy, "value", args.save_strategy) == "best":
        raise ValueError(
            "load_best_model_at_end and save_strategy='best' are not supported: a run is taken up from its last "
            "checkpoint. Find the step of the lowest eval_loss in the log that train() returns, and train again with "
            "max_steps of that many."
        )
    if args.torch_compile:
        raise ValueError("torch_compile is not supported: blocks that are run again for the backward pass break it")
    if args.label_smoothing_factor:
        raise ValueError("label_smoothing_factor has no effect on the chunked loss: leave it 0")


def refuse_rows(dataset: Any, what_for: str) -> None:
    """Refuse a data set without rows, or whose rows have no labels, and several at once.

    Raises:
        ValueError: says which.
    """
    if isinstance(dataset, Mapping):
        raise ValueError(f"several sets of rows {what_for} were given; give one, so that there is one loss")
    if not len(dataset):
        raise ValueError(f"there are no rows {what_for}: was everything dropped or held out (notebook 02)?")
    if missing := {"input_ids", "labels"} - set(dataset[0]):
        raise ValueError(f"the rows {what_for} have no {' and no '.join(sorted(missing))}: make them with encode_file")


def refuse_many_processes(environment: Any = None) -> None:
    """Explain, before anything hangs, that this trainer is one process for all GPUs.

    Args:
        environment: mapping of environment variables; the process' own by default.

    Raises:
        RuntimeError: started by torchrun, accelerate launch or mpirun, or inside a process group.
    """
    environment = os.environ if environment is None else environment
    sizes = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
    signs = [f"{name}={environment[name]}" for name in sizes if environment.get(name, "1") not in ("", "1")]
    signs += [f"{name}={environment[name]}" for name in ("TORCHELASTIC_RUN_ID", "LOCAL_RANK") if name in environment]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        signs.append("an initialised process group")
    if signs:
        raise RuntimeError(
            f"This training was started as one of several processes ({signs[0]}). It is made to be one process that "
            "drives all GPUs of a machine: every process would load the whole model, and fight for the same GPUs. "
            "Start it with plain python, or in a notebook. Where one machine is not enough, glmhelpers.distributed "
            "trains the same adapter with one process a GPU: torchrun --nproc-per-node 2 -m glmhelpers.distributed -h"
        )
