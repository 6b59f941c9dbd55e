"""Watching a training: a line for each logged step, curves that grow in a notebook, a table at the end.

    step   25/100  loss 1.1907  5230 tokens/s  0:12 left  GPU 0 7.02 GiB  GPU 1 6.91 GiB

                     Trainer ──► on_log ──► a line of text        (anywhere)
                                       └──► curves, drawn again   (in a live notebook)
                             ──► end   ──► Watch.table()          time, tokens/s, peak predicted and measured

Tokens are counted on the CPU before a batch leaves it; memory is what PyTorch's allocator has noted anyway. Nothing
here makes a GPU wait.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from glmhelpers.utils.units import clock, memory_size


class EveryMinutes(TrainerCallback):
    """Saves a checkpoint whenever `minutes` have passed since the last one."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic):
        self.seconds, self.clock, self.saved = 60 * minutes, clock, clock()

    def on_train_begin(self, args, state, control, **kwargs):
        """The time counts from the start."""
        self.saved = self.clock()

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for a checkpoint if it is time."""
        if args.save_strategy != "no" and self.clock() - self.saved >= self.seconds:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        """The time counts from the last checkpoint, whoever asked for it."""
        self.saved = self.clock()


class Watch(TrainerCallback):
    """Progress of one training, and its table afterwards.

    Args:
        predicted: a `memory.Prediction` or a Plan's `.prediction`, for the table.
        live: draw curves that grow; by default in a notebook, unless TQDM_DISABLE asks for no moving output.
        read: gives device name -> peak bytes so far; by default the allocator of the GPUs that hold the model.

    Attributes:
        points: one dict for each logged step: `step`, `loss` or `eval_loss`, and `memory` (device name -> bytes).
        seconds, steps, tokens: of this process' part of the run.
        measured: device name -> peak bytes.
        finished: the run was finished before: its log was read back, and nothing was trained or measured.
    """

    def __init__(
        self,
        predicted: Any = None,
        live: bool | None = None,
        read: Callable[[], dict[str, int]] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.predicted, self.read, self.clock = predicted, read, clock
        self.live = in_live_notebook() if live is None else live
        self.points: list[dict[str, Any]] = []
        self.seconds, self.steps, self.tokens, self.total = 0.0, 0, 0, 0
        self.measured: dict[str, int] = {}
        self.finished = False
        self._gpus: list[int] = []
        self._display = None
        self._line = ""
        self._start = (0.0, 0, 0)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Start the clock, and the peaks of the GPUs."""
        self._gpus = gpus_of(model)
        reset_gpu_peaks()
        self.finished = False
        self._start = (self.clock(), state.global_step, state.num_input_tokens_seen)
        # A resumed run shows its whole curve.
        self.points = logged_losses(state.log_history)

    def read_back(self, state: Mapping[str, Any]) -> None:
        """Take the log of a run that was finished before, for the table; `state` as `read_state` gives it."""
        self.points, self.total, self.finished = logged_losses(state["log_history"]), state["max_steps"], True
        self.seconds, self.steps, self.tokens, self.measured = 0.0, 0, 0, {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the losses that were logged."""
        kinds = [kind for kind in ("loss", "eval_loss") if kind in (logs or {})]
        for kind in kinds:
            self._measure(state)
            self.points.append({"step": state.global_step, kind: logs[kind], "memory": dict(self.measured)})
            line = f"step {state.global_step:4}/{state.max_steps}  {kind} {logs[kind]:.4f}"
            if kind == "loss":
                left = (state.max_steps - state.global_step) * self.seconds / max(self.steps, 1)
                line += f"  {self.tokens / max(self.seconds, 1e-9):.0f} tokens/s  {clock(left)} left"
                line += "".join(f"  {name} {memory_size(size)}" for name, size in self.measured.items())
            self._show(line)

    def on_train_end(self, args, state, control, **kwargs):
        """Note the totals for the table."""
        self._measure(state)

    def _measure(self, state: Any) -> None:
        started, step, tokens = self._start
        self.seconds = self.clock() - started
        self.steps, self.tokens, self.total = (
            state.global_step - step,
            state.num_input_tokens_seen - tokens,
            state.max_steps,
        )
        self.measured = self.read() if self.read else gpu_peaks(self._gpus)

    def _show(self, line: str) -> None:
        if not self.live:
            print(line)
            return
        import matplotlib.pyplot as plt
        from IPython.display import display

        from glmhelpers.plots.training import plot_progress

        # The last line with a speed stays: an evaluation's line has none.
        self._line = line if "tokens/s" in line else self._line
        figure = plot_progress(self.points, self._line)
        if self._display is None:
            self._display = display(figure, display_id=True)
        else:
            self._display.update(figure)
        plt.close(figure)

    def table(self) -> str:
        """Time, tokens a second, and each device's peak as predicted and as measured."""
        read = [
            ("steps", f"0 of {self.total} now: the run was finished before, its log and its adapter are read back"),
            ("time", "not measured now, nor tokens and memory"),
        ]
        rows = [
            ("steps", f"{self.steps} of {self.total}"),
            ("time", clock(self.seconds)),
            ("tokens", f"{self.tokens:,}"),
            ("speed", f"{self.tokens / max(self.seconds, 1e-9):.0f} tokens/s"),
        ]
        rows = read if self.finished else rows
        predicted = predicted_peaks(self.predicted)
        for name in sorted({*predicted, *self.measured}):
            text = f"predicted {memory_size(predicted[name])}" if name in predicted else "not predicted"
            text += f", measured {memory_size(self.measured[name])}" if name in self.measured else ", not measured"
            rows.append((f"peak {name}", text))
        return "\n".join(f"{name:12}{text}" for name, text in rows)


def logged_losses(history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The entries of a Trainer's log that hold a loss, as points of a Watch."""
    return [dict(entry) for entry in history if "loss" in entry or "eval_loss" in entry]


def predicted_peaks(prediction: Any) -> dict[str, int]:
    """Device name ("GPU 0", "CPU") -> bytes, of a Prediction; empty for None."""
    if prediction is None:
        return {}
    names = [f"GPU {device}" if isinstance(device, int) else device.upper() for device in prediction.devices]
    return dict(zip(names, prediction.peak_bytes, strict=True))


def gpus_of(model: Any) -> list[int]:
    """Indices of the GPUs that hold parameters of a model; none for None."""
    places = {parameter.device for parameter in model.parameters()} if model is not None else set()
    return sorted(place.index for place in places if place.type == "cuda")


def gpu_peaks(gpus: Iterable[int]) -> dict[str, int]:
    """Device name ("GPU 0") -> most bytes in tensors since the last reset."""
    return {f"GPU {index}": torch.cuda.max_memory_allocated(index) for index in gpus}


def reset_gpu_peaks() -> None:
    """Forget the peaks so far, such as that of loading."""
    if not torch.cuda.is_initialized():
        return  # nothing was allocated, and the call below would fail
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)


def in_live_notebook() -> bool:
    """Whether somebody can see a figure grow: a kernel, and moving output is not switched off by TQDM_DISABLE."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    # Colab's shell is a subclass with a name of its own.
    names = {kind.__name__ for kind in type(shell).__mro__}
    return "ZMQInteractiveShell" in names and os.environ.get("TQDM_DISABLE", "") in ("", "0")
