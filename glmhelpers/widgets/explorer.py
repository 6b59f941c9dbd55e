"""Play with a device map: the explorer (the live monitor of the GPUs is `Monitor`, from monitor.py).

    +-----------------------------+-------------------------------------+
    | GPUs      [T4] x 2          |  GPU 0  ######======--        |     |
    | cut 1     ----o-------      |  GPU 1  #####====---          |     |
    | batch     -o----------      |                                     |
    | length    --------o---      |  FFFF      BBBBBB                   |
    | ...                         |   FFFFBBBBBB                        |
    | [best plan] [use this map]  |  {"transformer.word_embeddings": 1  |
    +-----------------------------+-------------------------------------+

Every change is turned into a state that can exist (cuts stay in order, micro-batches divide the batch) before anything
is drawn. The result is `explorer.device_map`, an ordinary dict; "use this map" copies it to `explorer.chosen`.
Works with ipywidgets 7.7 and 8.1; where no widgets run, `explorer.picture()` and `print(explorer)` show the same.
"""

from collections.abc import Callable
from html import escape
from typing import Any

import ipywidgets as ui

from glmhelpers.cost_model.sizes import LORA_TARGETS, divisors
from glmhelpers.plots.memory_figure import draw_plan
from glmhelpers.utils.units import GIB
from glmhelpers.widgets.explorer_state import CHOICES, LENGTH_STEP, MAX_BATCH, MAX_GPUS, RANKS, Explored
from glmhelpers.widgets.explorer_svg import bars_svg, schedule_svg
from glmhelpers.widgets.monitor import Monitor

__all__ = ["Explorer", "Monitor", "compact_map"]


class Explorer:
    """The device map explorer; show it by naming it on the last line of a cell.

    Args:
        config: ChatGLMConfig, or a dict with its keys.
        gpu: a name of the catalogue.
        count: number of GPUs, 1 to 4.
        batch_size: rows in a step.
        seq_length: tokens in a row.

    Attributes:
        state: the current settings, always valid.
        plan: the current plan with its prediction.
        chosen: the dict of the moment "use this map" was last pressed, or None.
    """

    def __init__(self, config: Any, gpu: str = "T4", count: int = 2, batch_size: int = 4, seq_length: int = 1024):
        self.state = Explored.start(config, gpu, count, batch_size, seq_length)
        self.chosen: dict[str, int | str] | None = None
        self._quiet = False
        self._make_controls()
        self.bars, self.gantt, self.text, self.message = ui.HTML(), ui.HTML(), ui.HTML(), ui.HTML()
        pictures = ui.VBox(
            [self.message, self.bars, self.gantt, self.text], layout=ui.Layout(flex="1 1 480px", min_width="480px")
        )
        self.box = ui.HBox([ui.VBox(self._column()), pictures], layout=ui.Layout(flex_flow="row wrap"))
        self._show("")

    @property
    def plan(self) -> Any:
        """The current plan; fresh after every change."""
        return self.state.plan

    @property
    def device_map(self) -> dict[str, int | str]:
        """The current map: module name -> GPU index, or "cpu"."""
        return dict(self.plan.device_map)

    def picture(self) -> Any:
        """The current bars as a static figure; returns the axes."""
        return draw_plan(self.plan)

    def __str__(self) -> str:
        """The current plan in words."""
        return str(self.plan)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """The widget for frontends that run it, and the same picture as HTML and text for those that do not."""
        view = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}
        return {
            "application/vnd.jupyter.widget-view+json": view,
            "text/html": f"<div>{self.bars.value}<br>{self.gantt.value}<pre>{escape(str(self))}</pre></div>",
            "text/plain": str(self),
        }

    def set(self, **changes: Any) -> None:
        """Change settings from code, as moving the controls does; names as in explored.Explored."""
        self.state = self.state.changed(**changes)
        self._show("")

    def _make_controls(self) -> None:
        state = self.state

        def slider(name: str, low: int, high: int, step: int = 1) -> ui.IntSlider:
            return ui.IntSlider(getattr(state, name), low, high, step, description=_LABELS[name], style=_WIDE)

        def choice(name: str, options: Any, kind: type = ui.Dropdown, **more: Any) -> Any:
            value = getattr(state, name)
            return kind(options=options, value=value, description=_LABELS[name], style=_WIDE, **more)

        self.controls: dict[str, Any] = {
            "gpu": choice("gpu", CHOICES["gpu"]),
            "count": slider("count", 1, MAX_GPUS),
            "batch_size": slider("batch_size", 1, MAX_BATCH),
            "seq_length": slider("seq_length", *state.limits()["seq_length"], LENGTH_STEP),
            "micro_batches": choice("micro_batches", divisors(state.batch_size), ui.SelectionSlider),
            "checkpointed": slider("checkpointed", 0, state.shape.layers),
            "lora_rank": choice("lora_rank", RANKS, ui.SelectionSlider),
            "lora_targets": choice("lora_targets", LORA_TARGETS, ui.SelectMultiple, rows=4),
            "embedding": choice("embedding", [("first GPU", "first"), ("tied, last GPU", "tied"), ("CPU", "cpu")]),
            "dtype": choice("dtype", CHOICES["dtype"]),
            "base_bits": choice("base_bits", CHOICES["base_bits"]),
        }
        for name, control in self.controls.items():
            control.observe(self._observer(name), "value")
        self.cuts = [
            ui.IntSlider(0, 0, state.shape.layers, description=f"cut {number + 1}", style=_WIDE)
            for number in range(MAX_GPUS - 1)
        ]
        for number, cut in enumerate(self.cuts):
            cut.observe(self._cut_observer(number), "value")
        self.objective = ui.Dropdown(options=["speed", "memory"], description="best for", style=_WIDE)
        self.best_button = ui.Button(description="best plan", button_style="primary")
        self.use_button = ui.Button(description="use this map", button_style="success")
        self.best_button.on_click(lambda _: self.best())
        self.use_button.on_click(lambda _: self.use())

    def _column(self) -> list[Any]:
        names = list(self.controls)
        first, rest = names[:2], names[2:]
        return [
            *[self.controls[name] for name in first],
            *self.cuts,
            *[self.controls[name] for name in rest],
            ui.HBox([self.objective]),
            ui.HBox([self.best_button, self.use_button]),
        ]

    def _observer(self, name: str) -> Callable:
        def changed(change: Any) -> None:
            if not self._quiet:
                self.set(**{name: change["new"]})

        return changed

    def _cut_observer(self, number: int) -> Callable:
        def changed(change: Any) -> None:
            if not self._quiet:
                self.state = self.state.with_cut(number, change["new"])
                self._show("")

        return changed

    def best(self) -> None:
        """What the button "best plan" does: let the planner choose cuts, embedding, micro-batches and checkpointing."""
        try:
            self.state = self.state.best(self.objective.value)
        except ValueError as error:
            self._show(escape(str(error)))
        else:
            self._show(f"Best plan for {self.objective.value}.")

    def use(self) -> None:
        """What the button "use this map" does: put the current map into `explorer.chosen`."""
        self.chosen = self.device_map
        self._show("Chosen: the dict is in <code>explorer.chosen</code>.")

    def _show(self, message: str) -> None:
        """Bring controls and pictures in line with the state; controls do not call back meanwhile."""
        self._quiet = True
        try:
            for name, control in self.controls.items():
                if name == "micro_batches":
                    control.options = divisors(self.state.batch_size)
                control.value = getattr(self.state, name)
            for number, cut in enumerate(self.cuts):
                used = number < self.state.count - 1
                cut.layout.display = "" if used else "none"
                cut.value = self.state.cuts[number] if used else cut.max
        finally:
            self._quiet = False
        plan = self.plan
        names = [f"GPU {index} {gpu.name}" for index, gpu in enumerate(plan.gpus)]
        self.bars.value = bars_svg(plan.with_outside, names, plan.usable_bytes)
        busy = [name for name, terms in zip(names, plan.breakdown, strict=True) if any(terms.values())]
        self.gantt.value = schedule_svg(plan.schedule, busy)
        self.text.value = f"<pre style='line-height:1.2'>{escape(compact_map(plan.device_map))}</pre>"
        pairs = zip(names, plan.total_bytes, plan.usable_bytes, strict=True)
        short = [f"{name} lacks {(total - usable) / GIB:.2f} GiB" for name, total, usable in pairs if total > usable]
        verdict = f"does NOT fit: {', '.join(short)}" if short else "fits"
        self.message.value = f"<b class='verdict'>This plan {escape(verdict)}.</b> {message}"


def compact_map(device_map: dict[str, int | str]) -> str:
    """A device map as Python text with runs of blocks on one line each."""
    lines, start, layers = [], 0, sum(".layers." in name for name in device_map)
    for layer in range(layers):
        here = device_map[f"transformer.layers.{layer}"]
        if layer + 1 == layers or device_map[f"transformer.layers.{layer + 1}"] != here:
            lines.append(f'  "transformer.layers.{start}" to ".{layer}": {here!r},')
            start = layer + 1
    names = ["transformer.word_embeddings", "transformer.final_layernorm", "lm_head"]
    ends = [f'  "{name}": {device_map[name]!r},' for name in names]
    return "\n".join(["{", ends[0], *lines, *ends[1:], "}"])


_WIDE = {"description_width": "100px"}
"""Room for the longest label."""

_LABELS = {
    "gpu": "GPU",
    "count": "GPUs",
    "batch_size": "batch",
    "seq_length": "length",
    "micro_batches": "micro-batches",
    "checkpointed": "checkpointed",
    "lora_rank": "LoRA rank",
    "lora_targets": "LoRA on",
    "embedding": "embedding",
    "dtype": "dtype",
    "base_bits": "base bits",
}
