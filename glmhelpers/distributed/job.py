"""What shall be trained, and how it is spread: one record, which is also the command line.

    Job(folder=..., rows=..., blocks="15,13")   <──►   --folder ... --rows ... --blocks 15,13

The same settings, rows and base make the same run as in one process (`run_settings`), with the same checkpoints: a run
that was begun in a notebook with two GPUs goes on here, and one that was begun here may be finished there. Settings of
the cut (blocks, schedule, micro-batches) and the number of processes may change in between.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import TrainingArguments

from glmhelpers.devicemap.check import part_names
from glmhelpers.distributed.plan import ProcessPlan, even_blocks
from glmhelpers.tokens.collate import SAMPLING
from glmhelpers.training.checkpoint_manager import COUNTED
from thuglm.chunked_loss import DEFAULT_CHUNK

SEVERAL = """Several machines: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all of them, or no restart would succeed, and
run on each of them
    torchrun --nnodes 2 --nproc-per-node 2 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint HOST:29500
        --rdzv-id glm -m glmhelpers.distributed ..."""
"""The end of `--help`."""

OWN_TO_A_NODE = ("folder", "rows", "output", "adapter", "start_from", "eval_rows")
"""Fields that may differ from machine to machine: where things lie."""


@dataclass(frozen=True)
class Job:
    """A training with one process a GPU.

    Attributes:
        folder: checkpoint of the base; rows: JSON Lines file as `convert_alpaca` writes it; output: where checkpoints
            go; adapter: where the finished adapter goes, by default output/adapter; start_from: an adapter's folder to
            go on from, whose own rank, alpha, dropout and targets then hold; eval_rows: rows for the evaluation loss.
            On each machine.
        device: "cuda", "cpu", or "auto": GPUs where there are some.
        blocks: blocks of each rank of a pipeline, "15,13"; by default one pipeline of all processes, evenly.
        schedule, stages_per_rank, micro_batches: see `ProcessPlan`.
        checkpointed: "all", "none", or a number n for the first n blocks.
        loss_chunk: rows of logits alive at once.
        cuda_graphs: 1: as in `train`, for short rows; where each process has the whole model (`blocks` has one number)
            and one micro-batch.
        rows_per_step: of all pipelines together.
        max_steps ... seed: as in `TrainingArguments`.
        lora_rank, alpha, dropout, targets, adapter_seed: see `attach_lora`; targets separated by commas.
        template, max_length: see `encode_file`; 0: no limit.
        save_steps, minutes, save_total_limit: a checkpoint after so many steps, and when so many minutes have passed.
        logging_steps: a line for the mean loss of so many steps.
        eval_steps: the evaluation loss after so many steps; 0: after the last one only.
        timeout: seconds that a process waits for another one.
    """

    folder: str
    rows: str
    output: str
    adapter: str = ""
    start_from: str = ""
    eval_rows: str = ""
    device: str = "auto"
    blocks: str = ""
    schedule: str = "1F1B"
    stages_per_rank: int = 1
    micro_batches: int = 4
    checkpointed: str = "all"
    loss_chunk: int = DEFAULT_CHUNK
    cuda_graphs: int = 0
    rows_per_step: int = 16
    max_steps: int = 1000
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    lora_rank: int = 8
    alpha: float = 32
    dropout: float = 0.1
    targets: str = "query_key_value"
    adapter_seed: int = 0
    template: str = "chatglm"
    max_length: int = 0
    save_steps: int = 500
    minutes: float = 10.0
    save_total_limit: int = 2
    logging_steps: int = 10
    eval_steps: int = 0
    timeout: float = 600.0

    def __post_init__(self) -> None:
        for name in OWN_TO_A_NODE:
            object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))

    @property
    def on_gpu(self) -> bool:
        """Is there a GPU for each process?"""
        return self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen base."""
        return torch.float16 if self.on_gpu else torch.float32

    @property
    def ranks(self) -> int:
        """Processes of a pipeline; 0: all that there are."""
        return len(self.blocks.split(",")) if self.blocks else 0

    @property
    def adapter_folder(self) -> Path:
        """Where the finished adapter goes."""
        return Path(self.adapter or Path(self.output) / "adapter")

    @property
    def log_file(self) -> Path:
        """Where the log of the finished run goes."""
        return Path(self.output) / "losses.json"

    def plan(self, layers: int, world: int) -> ProcessPlan:
        """The cut for a model of so many blocks and so many processes.

        Raises:
            ValueError: blocks that are not those of the model, or see `ProcessPlan`.
        """
        try:
            blocks = tuple(map(int, self.blocks.split(","))) if self.blocks else even_blocks(layers, world)
        except ValueError:
            raise ValueError(f"blocks {self.blocks!r}: give a number for each rank of a pipeline, as 15,13") from None
        if sum(blocks) != layers:
            raise ValueError(f"blocks {self.blocks!r} add up to {sum(blocks)}, the model has {layers}")
        ends = [gpu for gpu, count in enumerate(blocks) for _ in range(count)]
        homes = dict(zip(part_names(layers), [ends[0], *ends, ends[-1], ends[-1]], strict=True))
        chosen = int(self.checkpointed) if self.checkpointed.isdecimal() else self.checkpointed
        cut = {"micro_batches": self.micro_batches, "stages_per_rank": self.stages_per_rank}
        plan = ProcessPlan.of(homes, layers, self.schedule, chosen, **cut)
        if self.cuda_graphs and not plan.whole:
            raise ValueError(
                f"cuda_graphs with {plan}: graphs are for processes with the whole model and one micro-batch each; "
                f'use blocks="{layers}", micro_batches=1, or leave cuda_graphs out'
            )
        return plan

    def training_arguments(self) -> SimpleNamespace:
        """What `run_settings` and guards read of `TrainingArguments`, with the values it would have.

        `TrainingArguments` itself would start accelerate's own process group.
        """
        known = TrainingArguments.__dataclass_fields__
        values = {name: known[name].default for name in COUNTED} | SAMPLING | vars(self)
        return SimpleNamespace(**values, per_device_train_batch_size=self.rows_per_step, gradient_accumulation_steps=1)

    def arguments(self) -> list[str]:
        """The command line that `parse` reads back: every field that has not its default value."""
        changed = [(field.name, getattr(self, field.name)) for field in fields(self) if self._changed(field)]
        return [text for name, value in changed for text in (f"--{name.replace('_', '-')}", str(value))]

    def _changed(self, field: Any) -> bool:
        return getattr(self, field.name) != field.default

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> "Job":
        """The job of a command line; a wrong one ends the program, as argparse does."""
        description = f"{(cls.__doc__ or '').strip()}\n\n{SEVERAL}"
        raw = argparse.RawDescriptionHelpFormatter
        parser = argparse.ArgumentParser("glmhelpers.distributed", description=description, formatter_class=raw)
        for field in fields(cls):
            kind: Any = field.type
            needed = field.default is MISSING
            name = f"--{field.name.replace('_', '-')}"
            parser.add_argument(name, type=kind, required=needed, default=None if needed else field.default)
        return cls(**vars(parser.parse_args(arguments)))
