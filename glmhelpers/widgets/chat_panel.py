"""A chat window in the notebook, on ipywidgets 7.7 and 8.1.

    +--------------------------------------------------+
    | 你是谁？                                           |
    |        tuned · 我是小星，一个小小的语言模型。▌         |
    |        5 tokens read, 13 written, ...             |
    +--------------------------------------------------+
    | [ type here                        ] [send] [stop]|
    | (base | tuned)  temperature o--  top-p --o [clear]|
    +--------------------------------------------------+

The answer is written by a thread, so that the kernel stays free to hear the stop button. Where no widgets run,
`panel.ask("...")` does what typing does, and the panel shows itself as text.
"""

import contextlib
import threading
import time
import warnings
from html import escape
from typing import Any

import ipywidgets as ui

from glmhelpers.inference.chat import Answer, ChatSession

REFRESH_SECONDS = 0.05
"""The window is redrawn at most so often while an answer grows; every redraw is a message to the browser."""

CHARACTERS_A_SECOND = 200_000
"""So much HTML is sent at most while an answer grows: the whole conversation is in every message."""

LATE_SECONDS = 0.5
"""How long after Enter the text may come."""

WINDOW = (
    "height:340px;overflow-y:auto;display:flex;flex-direction:column-reverse;"
    "border:1px solid #999;border-radius:4px;padding:8px;line-height:1.45"
)
BUBBLE = (
    "white-space:pre-wrap;overflow-wrap:anywhere;padding:4px 10px;border-radius:8px;max-width:80%;width:fit-content;"
)
QUESTION = f"{BUBBLE}background:#0072B2;color:#fff;margin:8px 0 4px auto"
ANSWER = f"{BUBBLE}background:#eee;color:#000;margin:4px auto 0 0"
SMALL = "font-size:85%;opacity:.75;margin:0 0 0 10px"


class ChatPanel:
    """The window; show it by naming it on the last line of a cell.

    Args:
        session: the conversation; `session.settings` and `session.adapter` follow the controls.

    Attributes:
        answers: what has been answered since the window was last cleared, oldest first.
    """

    def __init__(self, session: ChatSession):
        self.session = session
        self.answers: list[Answer] = []
        self._growing: Answer | None = None
        self._worker: threading.Thread | None = None
        self._expected, self._stopping = threading.Event(), threading.Event()
        self._sending = threading.Lock()  # the late timer of Enter and the browser's message may both come to send
        self.window, self.message = ui.HTML(), ui.HTML()
        self.text = ui.Text(
            placeholder="Ask something, then Enter",
            continuous_update=False,
            layout=ui.Layout(flex="1 1 auto", width="auto"),
        )
        self.send_button = ui.Button(description="send", button_style="primary", layout=ui.Layout(width="80px"))
        self.stop_button = ui.Button(description="stop", disabled=True, layout=ui.Layout(width="80px"))
        self.clear_button = ui.Button(description="clear", layout=ui.Layout(width="80px"))
        self.which = ui.ToggleButtons(
            options=["base", "tuned"] if session.has_adapter else ["base"],
            value="tuned" if session.adapter else "base",
            style={"button_width": "70px"},
        )
        settings = session.settings
        # With the usual 300 px the row does not fit under ipywidgets 7.
        whole, narrow = {"description_width": "initial"}, ui.Layout(width="270px")
        self.temperature = ui.FloatSlider(
            settings.temperature,
            min=0,
            max=max(2, settings.temperature),
            step=0.05,
            description="temperature",
            style=whole,
            layout=narrow,
        )
        self.top_p = ui.FloatSlider(
            settings.top_p,
            min=min(0.05, settings.top_p),
            max=1,
            step=0.05,
            description="top-p",
            style=whole,
            layout=narrow,
        )
        with warnings.catch_warnings():
            # Deprecated, but the only sign of Enter: a change alone also comes when the box is left.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.text.on_submit(lambda _: self._entered())
        self.text.observe(self._typed, "value")
        self.send_button.on_click(lambda _: self._send() if self.text.value.strip() else self._entered())
        self.stop_button.on_click(lambda _: self.stop())
        self.clear_button.on_click(lambda _: self.clear())
        self.which.observe(self._switched, "value")
        self.temperature.observe(lambda change: session.change(temperature=change["new"]), "value")
        self.top_p.observe(lambda change: session.change(top_p=change["new"]), "value")
        self.box = ui.VBox(
            [
                self.window,
                ui.HBox([self.text, self.send_button, self.stop_button]),
                ui.HBox(
                    [self.which, self.temperature, self.top_p, self.clear_button],
                    layout=ui.Layout(flex_flow="row wrap", align_items="center", grid_gap="0 12px"),
                ),
                self.message,
            ],
            layout=ui.Layout(max_width="900px"),
        )
        self._show()

    def ask(self, question: str) -> Answer:
        """What typing a question and waiting does: the finished answer, which the window shows too.

        Raises:
            RuntimeError: the previous answer is still being written.
            ValueError, FloatingPointError: see `ChatSession.stream`.
        """
        if self._worker is not None and self._worker.is_alive():
            raise RuntimeError("the window is still writing the previous answer: wait() for it, or stop() it")
        self._stopping.clear()
        self._follow(question)
        return self.answers[-1]

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the answer that is being written."""
        if self._worker is not None:
            self._worker.join(seconds)

    def stop(self) -> None:
        """What the button "stop" does: the answer ends after its next token, also if it has not begun yet."""
        self._stopping.set()
        self.session.stop()

    def clear(self) -> None:
        """What the button "clear" does: stop, forget the conversation, empty the window."""
        self.stop()
        self.wait()
        self.session.clear()
        self.answers = []
        self._say("")
        self._show()

    def _entered(self) -> None:
        """Enter was pressed. The browser says so before it sends the text, unless that has not changed since."""
        self._expected.set()
        late = threading.Timer(LATE_SECONDS, self._send, kwargs={"if_expected": True})
        late.daemon = True
        late.start()

    def _typed(self, _: dict[str, Any]) -> None:
        if self.text.value:
            self._send(if_expected=True)

    def _send(self, if_expected: bool = False) -> None:
        with self._sending:
            if if_expected and not self._expected.is_set():  # the other one came first
                return
            self._expected.clear()
            question = self.text.value
            if not question.strip():
                self._say("Write a question first.")
            elif self._worker is None or not self._worker.is_alive():
                self.text.value = ""
                self._stopping.clear()
                worker = threading.Thread(target=self._follow_and_report, args=(question,), daemon=True)
                worker.start()
                self._worker = worker  # only now: who waits for it may not meet a thread that has not begun

    def _switched(self, change: dict[str, Any]) -> None:
        self.session.adapter = change["new"] == "tuned"
        self._say(f"The next answer comes from the {change['new']} model.")

    def _follow_and_report(self, question: str) -> None:
        try:
            self._follow(question)
        except Exception as error:  # in a thread nobody would see it
            self.text.value = self.text.value or question  # to be mended and sent again
            self._say(f"<span style='color:#D55E00'>{type(error).__name__}: {escape(str(error))}</span>")

    def _follow(self, question: str) -> None:
        self._say("")
        self.send_button.disabled, self.stop_button.disabled = True, False
        shown = 0.0
        self._growing = Answer(question, adapter=self.session.adapter)
        try:
            with contextlib.closing(self.session.stream(question)) as stream:
                for answer in stream:
                    self._growing = answer
                    if self._stopping.is_set():  # the session hears only what comes while it answers
                        self.session.stop()
                    pause = max(REFRESH_SECONDS, len(self.window.value) / CHARACTERS_A_SECOND)
                    if time.monotonic() - shown >= pause:
                        self._show()
                        shown = time.monotonic()
            self.answers.append(answer)
        finally:
            self._growing = None
            self.send_button.disabled, self.stop_button.disabled = False, True
            self._show()

    def _say(self, html: str) -> None:
        self.message.value = f"<div style='min-height:1.5em'>{html}</div>"

    def _show(self) -> None:
        growing = [self._growing] if self._growing is not None else []
        turns = "".join(turn_html(answer) for answer in [*self.answers, *growing])
        self.window.value = f"<div class='chat' style='{WINDOW}'><div>{turns}</div></div>"

    def __str__(self) -> str:
        """The conversation as text."""
        lines = []
        for answer in self.answers:
            who = "tuned" if answer.adapter else "base"
            lines += [f"> {answer.question}", f"{who}: {answer.text}", f"    [{answer.figures}]"]
        return "\n".join(lines) or "(nothing has been said yet)"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """The widget for frontends that run it, and the conversation as text for those that do not."""
        view = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}
        return {"application/vnd.jupyter.widget-view+json": view, "text/plain": str(self)}


def turn_html(answer: Answer) -> str:
    """A question and its answer, with the figures below as soon as it is finished; a cursor until then."""
    who = "tuned" if answer.adapter else "base"
    notices = "".join(f"<div style='{SMALL}'>{escape(notice)}</div>" for notice in answer.notices)
    text = escape(answer.text) if answer.text or not answer.ended else "<i>(an empty answer)</i>"
    cursor = "" if answer.ended else "▌"
    figures = f"<div class='figures' style='{SMALL}'>{who} · {escape(answer.figures)}</div>" if answer.ended else ""
    return (
        f"<div class='question' style='{QUESTION}'>{escape(answer.question)}</div>{notices}"
        f"<div class='answer {who}' style='{ANSWER}'>{text}{cursor}</div>{figures}"
    )
