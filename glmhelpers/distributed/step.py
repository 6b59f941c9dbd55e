"""One optimizer step of many processes, with the numbers of one process.

    batch of B rows, known to every rank        labels counted over *all* rows: the loss of a part is its sum divided
      │  rows of this pipeline (`my_rows`)      by that, so no way of cutting the batch changes the result
      ▼
    schedule (GPipe, 1F1B, interleaved)  ──►  gradients of this rank's LoRA, summed over micro-batches
      │                                         │ DistributedDataParallel: summed over the pipelines
      ▼                                         ▼
    losses of the last stage             ──►  `update`: one norm, one verdict on overflow, one step on all ranks

DistributedDataParallel is put around each stage, not around the pipeline: PipelineStage knows it and lets it add up
gradients with the last micro-batch only. It divides by the number of pipelines, which the loss makes good. Weights are
not sent at the start (`init_sync=False`): every rank has read the same files and drawn the same random numbers.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from glmhelpers.cost_model.sizes import padded_length
from glmhelpers.devicemap.captured import Captured, fits_graphs
from glmhelpers.devicemap.devices import side_stream, to_device
from glmhelpers.distributed.plan import ProcessPlan
from glmhelpers.distributed.processes import Processes
from glmhelpers.distributed.stage import StageModule
from glmhelpers.training.pipeline import pad_part, target_rows
from thuglm.chunked_loss import DEFAULT_CHUNK, IGNORE_INDEX


def my_rows(batch: Mapping[str, Tensor], pipelines: int, number: int, micro_batches: int) -> dict[str, Tensor]:
    """The rows of one pipeline, filled up so that all micro-batches of all pipelines have the same number of rows.

    Filling rows are copies of the first row without a label: they add 0 to loss and gradients.

    Args:
        batch: `input_ids`, `attention_mask`, `labels`, [B, L] on the CPU.
        pipelines: how many share the batch; number: which of them this is.
        micro_batches: parts into which each cuts its rows.
    """
    rows = len(batch["labels"])
    share = -(-rows // (pipelines * micro_batches)) * micro_batches
    mine = torch.arange(number * share, (number + 1) * share)
    found = {name: tensor[mine.where(mine < rows, 0)] for name, tensor in batch.items()}
    found["labels"][mine >= rows] = IGNORE_INDEX
    return found


class PipelineStep:
    """Forward and backward of one batch on this rank's stages.

    Args:
        stages: of this rank, in order; see `build_stage`.
        plan: the schedule and the number of micro-batches.
        processes: the ranks.
        loss_chunk: rows of logits alive at once.
        scaler: for a float16 base.
        captured: the blocks as CUDA graphs, of a plan that is `whole`; short rows are padded to one of a few lengths.
    """

    def __init__(
        self,
        stages: list[StageModule],
        plan: ProcessPlan,
        processes: Processes,
        loss_chunk: int = DEFAULT_CHUNK,
        scaler: torch.amp.GradScaler | None = None,
        captured: Captured | None = None,
    ):
        self.stages, self.plan, self.processes = stages, plan, processes
        self.loss_chunk, self.scaler, self.captured = loss_chunk, scaler, captured
        self.modules: list[Any] = list(stages)
        if processes.pipelines > 1:
            group, device = processes.mesh["dp"].get_group(), processes.device
            # Gradients add up in the stream that is current now, and a recording must not reach beyond its own.
            recording = torch.cuda.stream(side_stream(device)) if captured and device.type == "cuda" else nullcontext()
            with recording, warnings.catch_warnings():
                # Of torch 2.13, whose successor of broadcast_buffers still sends them once.
                warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
                self.modules = [
                    DistributedDataParallel(stage, process_group=group, broadcast_buffers=False, init_sync=False)
                    for stage in stages
                ]
        self.shape: tuple[int, ...] | None = None
        self.num_items = 0
        self.losses: list[Tensor] = []

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Gradients of the mean loss over all labels of a batch, added to `.grad`; they may be scaled, see `scaler`.

        Args:
            batch: `input_ids`, `attention_mask`, `labels`, [B, L] on the CPU; the same on every rank.

        Returns:
            This rank's share of the mean loss, float32 on its device: the shares of all ranks add up to it.
        """
        device, self.num_items, self.losses = self.processes.device, len(target_rows(batch["labels"])), []
        mine = my_rows(batch, self.processes.pipelines, self.processes.pipeline, self.plan.micro_batches)
        rows, length = mine["input_ids"].shape
        padded = [(rows, padded_length(length))]
        captured = self.captured if fits_graphs(padded) else None
        if captured is not None:
            mine = pad_part(mine, padded[0][1])
        if mine["input_ids"].shape != self.shape:
            self._announce(mine["input_ids"].shape)
        ids, mask = (to_device(mine[name], device) for name in ("input_ids", "attention_mask"))
        given = (ids,) if self.stages[0].cut.first else ()
        target = mine["labels"] if self.stages[-1].cut.last else None
        with nullcontext() if captured is None else captured.step(padded):
            self.schedule.step(*given, target=target, return_outputs=False, ids=ids, attention_mask=mask)
        return torch.stack(self.losses).sum() if self.losses else torch.zeros((), device=device)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Tensor]]) -> float:
        """Mean loss over all labels of these batches, the same on every rank; without dropout.

        Parts are sent from stage to stage as they are done: a schedule is made for a forward *and* a backward pass.
        """
        group, ranks, device = self.processes.mesh["pp"].get_group(), self.plan.ranks, self.processes.device
        total, parts = torch.zeros(2, dtype=torch.float64, device=device), self.plan.micro_batches
        for batch in batches:
            mine = my_rows(batch, self.processes.pipelines, self.processes.pipeline, parts)
            for names in zip(*(tensor.chunk(parts) for tensor in mine.values()), strict=True):
                part = dict(zip(mine, names, strict=True))
                ids, mask = (to_device(part[name], device) for name in ("input_ids", "attention_mask"))
                hidden = ids
                for stage in self.stages:
                    cut = stage.cut
                    if not cut.first and ranks > 1:
                        hidden = self._hidden(ids.shape, device)
                        dist.recv(hidden, group=group, group_src=(cut.index - 1) % ranks)
                    hidden = stage.eval()(hidden, ids, mask)
                    stage.train()
                    if cut.last:
                        total[0] += stage.loss_sum(hidden, part["labels"], self.loss_chunk)
                        total[1] += len(target_rows(part["labels"]))
                    elif ranks > 1:
                        dist.send(hidden.contiguous(), group=group, group_dst=(cut.index + 1) % ranks)
        dist.all_reduce(total)
        return (total[0] / total[1]).item()

    def _hidden(self, shape: Sequence[int], device: torch.device | str, **settings: Any) -> Tensor:
        """Room for the hidden states of rows of this shape, [B, L, H]."""
        net: Any = self.stages[0].model.get_base_model()
        return torch.empty(*shape, net.config.hidden_size, dtype=net.config.dtype, device=device, **settings)

    def _announce(self, shape: torch.Size) -> None:
        """Make the schedule for rows of this shape: receive buffers have the size of what is sent."""
        self.shape, parts = shape, self.plan.micro_batches
        rows, length = shape[0] // parts, shape[1]
        hidden = self._hidden((rows, length), "meta", requires_grad=True)
        ids = torch.empty(rows, length, dtype=torch.int64, device="meta")
        stages: list[Any] = [
            PipelineStage(
                module,
                stage.cut.index,
                len(self.plan.stages),
                self.processes.device,
                input_args=ids if stage.cut.first else hidden,
                output_args=hidden,
                group=self.processes.mesh["pp"].get_group(),
            )
            for module, stage in zip(self.modules, self.stages, strict=True)
        ]
        if self.plan.schedule == "Interleaved1F1B":
            self.schedule: Any = ScheduleInterleaved1F1B(stages, parts, self._loss, scale_grads=False)
        else:
            kind = ScheduleGPipe if self.plan.schedule == "GPipe" else Schedule1F1B
            self.schedule = kind(stages[0], parts, self._loss, scale_grads=False)

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        loss = self.stages[-1].loss_sum(hidden, labels, self.loss_chunk) / self.num_items
        self.losses.append(loss.detach())
        loss = loss * self.processes.pipelines  # DistributedDataParallel divides by it
        return loss if self.scaler is None else self.scaler.scale(loss)


def make_scaler(device: torch.device, **settings: Any) -> torch.amp.GradScaler:
    """A GradScaler for `update`, ready on every rank."""
    scaler = torch.amp.GradScaler(device.type, **settings)
    # It makes its scale when it first scales something, which only the rank with the loss ever does.
    scaler.scale(torch.zeros((), device=device))
    return scaler


def update(
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    processes: Processes,
    scaler: torch.amp.GradScaler | None = None,
    max_grad_norm: float = 0.0,
) -> tuple[float, float, bool]:
    """One optimizer step, the same on all ranks: one gradient norm over all stages, one decision to skip.

    Args:
        optimizer: of this rank's LoRA matrices.
        loss: this rank's share, from `PipelineStep`.
        max_grad_norm: gradients are scaled down to it; 0: they are left alone.

    Returns:
        (mean loss over all labels of all ranks, norm of all gradients before clipping, was the step taken?). A loss or
        a norm that is not finite takes no step.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    # Every pipeline has the same gradients, and only its last stage has a loss.
    sums = torch.stack((loss.double(), norm.double() ** 2 / processes.pipelines))
    dist.all_reduce(sums)
    mean, total = sums[0].item(), sums[1].sqrt()
    finite = bool(sums.isfinite().all())
    if scaler is not None:
        total = total / scaler.get_scale()
        if not finite:  # on some rank: the scaler of each must find it, or one would step where another skips
            parameters[0].grad = torch.full_like(parameters[0], float("inf"))
        scaler.unscale_(optimizer)
    if max_grad_norm and finite:
        clip_grads_with_norm_(parameters, max_grad_norm, total.float())
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    elif finite:
        optimizer.step()
    optimizer.zero_grad()
    return mean, total.item(), finite
