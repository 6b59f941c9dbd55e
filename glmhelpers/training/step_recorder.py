"""Who works when: a real training step measured, stage by stage (forward, backward, bubble), as the planner draws it.

    with StepRecorder(model) as recorder:
        run_step(model, batch, micro_batches=8, backward=recorder.backward)
    draw_schedule(recorder.tasks())

An event is put into each GPU's queue where a micro-batch enters or leaves its blocks; the GPU notes the time when it
gets there, so recording waits for nothing. Events of two GPUs cannot be subtracted from one another: both clocks are
started together, with both queues empty, which leaves an error of some hundredths of a millisecond. On the CPU the
clock is Python's, and the stages are one after the other.

    forward starts     before the first block of a stage           backward starts   gradient of its last block's output
    forward ends       after its last block (last stage: the loss)  backward ends     gradient of its first block's QKV
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glmhelpers.cost_model.step_time import Task
from glmhelpers.utils.types import Model


class StepRecorder:
    """Context manager that records the stages of one step.

    Args:
        model: a ChatGLM with its head, with an adapter or without.
        cut: blocks in each stage; by default a stage for each device.
    """

    def __init__(self, model: nn.Module, cut: Sequence[int] | None = None):
        whole: Model = next(m for m in model.modules() if hasattr(m, "lm_head") and hasattr(m, "transformer"))
        self.whole = whole
        blocks = list(whole.transformer.layers)
        self.devices = [block.input_layernorm.weight.device for block in blocks]
        if cut is None:
            cut = [0]
            for number, device in enumerate(self.devices):
                if number and device != self.devices[number - 1]:
                    cut.append(0)
                cut[-1] += 1
        if sum(cut) != len(blocks):
            raise ValueError(f"cut {list(cut)} has {sum(cut)} blocks, the model has {len(blocks)}")
        starts = [sum(cut[:stage]) for stage in range(len(cut))]
        self.stages = [(blocks[start], blocks[start + count - 1]) for start, count in zip(starts, cut, strict=True)]
        self.homes = [self.devices[start] for start in starts]
        self.handles: list[Any] = []

    def __enter__(self) -> "StepRecorder":
        self.marks: dict[tuple[int, str, int], list[Any]] = defaultdict(lambda: [None, None])
        self.seen = [0] * len(self.stages)
        self.recording = True
        for stage, (first, last) in enumerate(self.stages):
            self._watch(stage, first, last)
        gpus = {device for device in self.homes if device.type == "cuda"}
        for device in gpus:
            torch.cuda.synchronize(device)
        self.origin = {device: self._now(device) for device in [*gpus, torch.device("cpu")]}
        return self

    def __exit__(self, *error) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def backward(self, loss: Tensor) -> None:
        """Pass this as `run_step(backward=...)`: recomputed forwards are not forwards."""
        self.recording = False
        loss.backward()
        self.recording = True

    def tasks(self) -> list[Task]:
        """Every micro-batch's forward and backward on every stage, in seconds since the start; waits for the GPUs."""
        for device in self.origin:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        found = [
            Task(stage, kind, part, self._seconds(stage, start), self._seconds(stage, end))
            for (stage, kind, part), (start, end) in self.marks.items()
            if start is not None and end is not None
        ]
        return sorted(found, key=lambda task: (task.start, task.gpu))

    def _watch(self, stage: int, first: Model, last: Model) -> None:
        is_last = stage == len(self.stages) - 1

        def mark(kind: str, part: int, edge: int) -> None:
            self.marks[stage, kind, part][edge] = self._now(self.homes[stage])

        def enter(module, args) -> None:
            if self.recording:
                mark("forward", self.seen[stage], 0)

        def leave(module, args, output) -> None:
            if not self.recording:
                return
            part, hidden = self.seen[stage], output[0]
            if not is_last:
                mark("forward", part, 1)
                self.seen[stage] += 1
            if hidden.requires_grad:
                hidden.register_hook(lambda grad: mark("backward", part, 0))

        def loss_made(module, args, output) -> None:
            if self.recording:
                mark("forward", self.seen[stage], 1)
                self.seen[stage] += 1

        def mixed_made(module, args, output) -> None:
            if self.recording and output.requires_grad:
                part = self.seen[stage]
                output.register_hook(lambda grad: mark("backward", part, 1))

        self.handles += [
            first.register_forward_pre_hook(enter),
            last.register_forward_hook(leave),
            first.attention.query_key_value.register_forward_hook(mixed_made),
        ]
        if is_last:
            self.handles.append(self.whole.register_forward_hook(loss_made))

    @staticmethod
    def _now(device: torch.device) -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def _seconds(self, stage: int, mark: Any) -> float:
        origin = self.origin[self.homes[stage]]
        return mark - origin if isinstance(mark, float) else origin.elapsed_time(mark) / 1e3


def idle_shares(tasks: Sequence[Task]) -> list[float]:
    """For each stage, the share of the step (first start to last end) in which it does nothing.

    Raises:
        ValueError: there are no tasks.
    """
    if not tasks:
        raise ValueError("there are no tasks: no step has run while StepRecorder was attached")
    begin, end = min(task.start for task in tasks), max(task.end for task in tasks)
    busy: dict[int, float] = defaultdict(float)
    for task in tasks:
        busy[task.gpu] += task.end - task.start
    return [1 - busy[stage] / (end - begin) for stage in range(1 + max(busy))]
