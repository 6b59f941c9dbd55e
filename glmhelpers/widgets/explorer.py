"""Play with a device map: the picture, the buttons under it, and the controls in three groups.

    +-------------------------------------------------------+
    | |embed|0|1|...|13|14|...|27|head|    blocks           |
    | GPU 0 ####==/|.       | 6.54 of 14.75                 |
    | GPU 1 ###==//|..      | 6.77 of 14.75                 |
    | GPU 0  FFFF   BBBBBB                                  |
    | This plan fits. Best plan for speed: ...              |
    | (speed | memory) [best plan] [measured] [use this map]|
    | the plan        | the step          | the adapter     |
    | cut 1 ---o----  | batch  -o-------  | rank  --o----   |
    +-------------------------------------------------------+

Every change is turned into a state that can exist (cuts stay in order, micro-batches divide the batch) before anything
is drawn. The planner may need a second for the best plan: a thread asks it, and its outline comes when it is found.
The result is `explorer.device_map`, an ordinary dict; "use this map" copies it to `explorer.chosen`.
Works with ipywidgets 7.7 and 8.1; where no widgets run, `explorer.picture()` and `print(explorer)` show the same.
"""

import gc
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from html import escape
from threading import RLock
from typing import Any

import ipywidgets as ui
from IPython.display import SVG

from glmhelpers.cost_model.gpus import GPU
from glmhelpers.cost_model.sizes import LORA_TARGETS, divisors
from glmhelpers.cost_model.step_memory import stage_terms
from glmhelpers.devicemap.plan import DoesNotFit, Plan
from glmhelpers.widgets.explorer_state import CHOICES, LENGTH_STEP, MAX_BATCH, MAX_GPUS, RANKS, Explored
from glmhelpers.widgets.explorer_svg import plan_svg
from glmhelpers.widgets.explorer_words import Measured, against_measured, compact_map, compare, is_same, verdict

PATIENCE = 0.02
"""Seconds that a picture waits for the planner: it is drawn once where the best plan is found by then."""


class Explorer:
    """The device map explorer; show it by naming it on the last line of a cell.

    Args:
        config: ChatGLMConfig, or a dict with its keys.
        gpu: a name of the catalogue, or a card of this machine.
        count: number of GPUs, 1 to 4.
        batch_size: rows in a step.
        seq_length: tokens in a row.
        measured: what was measured of some plan: laid over the picture where the controls stand at that plan.

    Attributes:
        state: the current settings, always valid.
        plan: the current plan with its prediction.
        chosen: the dict of the moment "use this map" was last pressed, or None.
    """

    def __init__(
        self,
        config: Any,
        gpu: str | GPU = "T4",
        count: int = 2,
        batch_size: int = 4,
        seq_length: int = 1024,
        measured: Measured | None = None,
    ):
        self.state = Explored.start(config, gpu, count, batch_size, seq_length)
        self.measured = measured
        self.chosen: dict[str, int | str] | None = None
        self._quiet, self._lock, self._planner = False, RLock(), ThreadPoolExecutor(1)
        self._answers: dict[tuple[Explored, str], Future] = {}
        self._awaited: set[Future] = set()
        self._words = ""
        self._make_controls()
        self.drawing, self.message, self.text = ui.HTML(), ui.HTML(), ui.HTML()
        self.box = ui.VBox([self.drawing, self.message, self._buttons(), self._groups(), self.text])
        self._show(seconds=None)

    @property
    def plan(self) -> Plan:
        """The current plan; fresh after every change."""
        return self.state.plan

    @property
    def device_map(self) -> dict[str, int | str]:
        """The current map: module name -> GPU index, or "cpu"."""
        return dict(self.plan.device_map)

    def picture(self) -> SVG:
        """The current picture with its words, black on white, for pages without widgets."""
        return SVG(plan_svg(self.plan, *self._seen(None), page=True))

    def __str__(self) -> str:
        """The current plan in words."""
        return str(self.plan)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """The widget for frontends that run it, and the same picture as SVG and text for those that do not."""
        view = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}
        return {
            "application/vnd.jupyter.widget-view+json": view,
            "image/svg+xml": self.picture().data,
            "text/plain": str(self),
        }

    def set(self, **changes: Any) -> None:
        """Change settings from code, as moving the controls does; names as in explored.Explored."""
        self.state = self.state.changed(**changes)
        self._show(seconds=None)

    def _make_controls(self) -> None:
        state = self.state

        def look() -> dict[str, Any]:
            return {"style": {"description_width": "96px"}, "layout": ui.Layout(width="auto")}

        def slider(name: str, low: int, high: int, step: int = 1) -> ui.IntSlider:
            return ui.IntSlider(getattr(state, name), low, high, step, description=_LABELS[name], **look())

        def choice(name: str, options: Any, kind: type = ui.Dropdown, **more: Any) -> Any:
            return kind(options=options, value=getattr(state, name), description=_LABELS[name], **look(), **more)

        own = [(f"{state.gpu.name} of this machine", state.gpu)] if isinstance(state.gpu, GPU) else []
        if self.measured and isinstance(card := Explored.of(self.measured.plan).gpu, GPU) and card != state.gpu:
            own.append((f"{card.name} as measured", card))
        self.controls: dict[str, Any] = {
            "gpu": choice("gpu", [*((name, name) for name in CHOICES["gpu"]), *own]),
            "count": slider("count", 1, MAX_GPUS),
            "batch_size": slider("batch_size", 1, MAX_BATCH),
            "seq_length": slider("seq_length", *state.limits()["seq_length"], LENGTH_STEP),
            "micro_batches": choice("micro_batches", divisors(state.batch_size), ui.SelectionSlider),
            "in_flight": choice("in_flight", [(str(flying or "all"), flying) for flying in CHOICES["in_flight"]]),
            "checkpointed": slider("checkpointed", 0, state.shape.layers),
            "lora_rank": choice("lora_rank", RANKS, ui.SelectionSlider),
            "lora_targets": choice("lora_targets", LORA_TARGETS, ui.SelectMultiple, rows=4),
            "embedding": choice("embedding", [("first GPU", "first"), ("tied, last GPU", "tied"), ("CPU", "cpu")]),
            "dtype": choice("dtype", CHOICES["dtype"]),
            "base_bits": choice("base_bits", CHOICES["base_bits"]),
        }
        for name, control in self.controls.items():
            control.observe(partial(self._setting_moved, name), "value")
        self.cuts = [
            ui.IntSlider(0, 0, state.shape.layers, description=f"cut {number + 1}", **look())
            for number in range(MAX_GPUS - 1)
        ]
        for number, cut in enumerate(self.cuts):
            cut.observe(partial(self._cut_moved, number), "value")

    def _setting_moved(self, name: str, change: Any) -> None:
        if not self._quiet:
            self._go(self.state.changed(**{name: change["new"]}))

    def _cut_moved(self, number: int, change: Any) -> None:
        if not self._quiet:
            self._go(self.state.with_cut(number, change["new"]))

    def _go(self, state: Explored) -> None:
        if state != self.state:
            self.state = state
            self._show()

    def _buttons(self) -> ui.HBox:
        self.objective = ui.ToggleButtons(options=["speed", "memory"], style={"button_width": "100px"})
        self.objective.observe(lambda _: self._show(), "value")
        self.best_button = ui.Button(description="best plan")
        self.measured_button = ui.Button(description="measured")
        self.use_button = ui.Button(description="use this map")
        for button, press in (
            (self.best_button, self.best), (self.measured_button, self.show_measured), (self.use_button, self.use),
        ):  # fmt: skip
            button.layout.width = "132px"
            button.on_click(lambda _, press=press: press())
        self.measured_button.layout.display = "" if self.measured else "none"
        buttons = [ui.Label("best for"), self.objective, self.best_button, self.measured_button, self.use_button]
        return ui.HBox(buttons, layout=ui.Layout(flex_flow="row wrap", align_items="center"))

    def _groups(self) -> ui.HBox:
        groups = {
            "the plan": [
                *self.cuts,
                *(self.controls[name] for name in ("micro_batches", "in_flight", "checkpointed", "embedding")),
            ],
            "the step": [self.controls[name] for name in ("gpu", "count", "batch_size", "seq_length")],
            "the adapter": [self.controls[name] for name in ("lora_rank", "lora_targets", "dtype", "base_bits")],
        }
        boxes = [
            ui.VBox([ui.HTML(f"<b>{name}</b>"), *controls], layout=ui.Layout(flex="1 1 250px", max_width="420px"))
            for name, controls in groups.items()
        ]
        return ui.HBox(boxes, layout=ui.Layout(flex_flow="row wrap"))

    def best(self) -> None:
        """What the button "best plan" does: let the planner choose cuts, embedding, micro-batches and checkpointing."""
        best = self._best(None)
        if isinstance(best, Explored):
            self.state = best
        self._show(str(best) if isinstance(best, DoesNotFit) else "", None)

    def show_measured(self) -> None:
        """What the button "measured" does: go to the plan that was measured."""
        if self.measured:
            self.state = Explored.of(self.measured.plan)
            self._show(seconds=None)

    def use(self) -> None:
        """What the button "use this map" does: put the current map into `explorer.chosen`."""
        self.chosen = self.device_map
        self._show("Chosen: the dict is in explorer.chosen.")

    def _best(self, seconds: float | None) -> Explored | DoesNotFit | None:
        """The best state for these settings, or why there is none; None where the planner needs longer than that."""
        question = (self.state.question(), self.objective.value)
        if question not in self._answers:
            for each in [each for each, other in self._answers.items() if other.cancel()]:
                del self._answers[each]  # it was never begun, and the controls stand elsewhere now
            self._answers[question] = self._planner.submit(_ask, *question)
        answer = self._answers[question]
        if not wait([answer], seconds).done:
            if answer not in self._awaited:
                self._awaited.add(answer)
                answer.add_done_callback(self._found)
            return None
        error = answer.exception()
        if error is not None and not isinstance(error, DoesNotFit):
            raise error
        return error or answer.result()

    def _found(self, answer: Future) -> None:
        if not answer.cancelled():
            self._draw()

    def _show(self, words: str = "", seconds: float | None = PATIENCE) -> None:
        """Bring controls and picture in line with the state; controls do not call back meanwhile."""
        self._quiet = True
        try:
            if tuple(self.controls["micro_batches"].options) != tuple(divisors(self.state.batch_size)):
                self.controls["micro_batches"].options = divisors(self.state.batch_size)
            for name, control in self.controls.items():
                control.value = getattr(self.state, name)
            for number, cut in enumerate(self.cuts):
                used = number < self.state.count - 1
                cut.layout.display = "" if used else "none"
                cut.value = self.state.cuts[number] if used else cut.max
        finally:
            self._quiet = False
        self._words = words
        self._draw(seconds)

    def _seen(self, seconds: float | None) -> tuple[Plan | None, Measured | None, list[str]]:
        """What is drawn beside the plan, and what is said about it."""
        plan, answer = self.plan, self._best(seconds)
        best = answer.plan if isinstance(answer, Explored) else None
        measured = self.measured if self.measured and is_same(plan, self.measured.plan) else None
        said = [verdict(plan)]
        if answer:
            said.append(
                compare(best, plan, self.objective.value)
                if best
                else "No plan fits these settings; the button says why."
            )
        if measured:
            said.append(against_measured(measured))
        return best, measured, said

    def _draw(self, seconds: float | None = 0) -> None:
        with self._lock:  # the planner's thread draws too, and the picture must be of the newest state
            plan, (best, measured, said) = self.plan, self._seen(seconds)
            self.drawing.value = plan_svg(plan, best, measured, said)
            lines = "<br>".join(escape(line) for line in [*said[1:], self._words] if line)
            self.message.value = (
                f"<div style='min-height:4.2em;line-height:1.4'><b class='verdict'>{escape(said[0])}</b> {lines}</div>"
            )
            self.text.value = f"<pre style='line-height:1.2'>{escape(compact_map(plan.device_map))}</pre>"
            for button, on in (
                (self.best_button, is_same(plan, best)),
                (self.measured_button, measured is not None),
                (self.use_button, self.chosen == self.device_map),
            ):
                button.icon, button.button_style = ("check", "success") if on else ("", "")
            self.objective.icons = ["check" if name == self.objective.value else "" for name in self.objective.options]


def _ask(question: Explored, objective: str) -> Explored:
    """The planner's answer. Its search makes so many objects that collecting garbage meanwhile would stop the picture,
    which is another thread's, for a second: they go when it is done."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return question.best(objective)
    finally:
        stage_terms.cache_clear()
        if collects:
            gc.enable()


_LABELS = {
    "gpu": "GPU",
    "count": "GPUs",
    "batch_size": "batch",
    "seq_length": "length",
    "micro_batches": "micro-batches",
    "in_flight": "in flight",
    "checkpointed": "checkpointed",
    "lora_rank": "LoRA rank",
    "lora_targets": "LoRA on",
    "embedding": "embedding",
    "dtype": "dtype",
    "base_bits": "base bits",
}
