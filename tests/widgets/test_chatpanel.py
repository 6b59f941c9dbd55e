"""The chat window without a browser: what its controls do, what it shows, what it survives."""

import threading
import time

import ipywidgets
import pytest

from glmhelpers.inference.chat import Answer, ChatSession, Generation
from glmhelpers.widgets.chat_panel import ChatPanel, turn_html
from tests.helpers.reference import adapted_model, model, tokenizer


def panel_of(net=None, **settings):
    return ChatPanel(
        ChatSession(
            net or model(), tokenizer(), settings=Generation(**{"temperature": 0, "max_new_tokens": 8, **settings})
        )
    )


@pytest.fixture(scope="module")
def adapted():
    return adapted_model()


def writing_panel():
    """A panel in the middle of a long answer that another thread writes."""
    panel = panel_of(max_new_tokens=2000)
    panel.text.value = "你好"
    panel.send_button.click()
    deadline = time.monotonic() + 60
    while not (panel._growing and panel._growing.new_tokens) and time.monotonic() < deadline:
        time.sleep(0.01)
    return panel


def enter(panel, text, order="first Enter"):
    """What the browser sends for a typed text and Enter: two messages, in either order."""
    if order == "first text":
        panel.text.value = text
    panel.text._handle_string_msg(panel.text, {"event": "submit"}, [])
    panel.text.value = text
    deadline = time.monotonic() + 60
    while panel._worker is None and time.monotonic() < deadline:
        time.sleep(0.01)
    panel.wait(60)


@pytest.mark.parametrize("order", ["first Enter", "first text"])
def test_typing_and_enter_gives_an_answer_with_figures(order):
    panel = panel_of()
    enter(panel, "你好", order)
    (answer,) = panel.answers
    assert answer.text == panel_of().ask("你好").text
    assert panel.text.value == ""
    assert answer.text in panel.window.value
    assert answer.figures in panel.window.value
    assert "▌" not in panel.window.value
    assert str(panel) == f"> 你好\nbase: {answer.text}\n    [{answer.figures}]"
    assert (panel.send_button.disabled, panel.stop_button.disabled) == (False, True)


@pytest.mark.parametrize("order", ["first Enter", "first text"])
def test_an_answer_can_be_waited_for_while_its_thread_is_being_started(monkeypatch, order):
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: (time.sleep(0.1), start(thread)))
    panel = panel_of()
    enter(panel, "你好", order)
    assert len(panel.answers) == 1


def test_two_that_send_at_once_send_one_question(monkeypatch):
    """The timer of Enter and the text that came behind it."""
    panel, both = panel_of(), threading.Barrier(2)
    panel.text.value = "你好"
    panel._expected.set()
    senders = [threading.Thread(target=lambda: (both.wait(60), panel._send(if_expected=True))) for _ in range(2)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join(60)
    panel.wait(60)
    assert [answer.question for answer in panel.answers] == ["你好"]
    assert "Write a question first" not in panel.message.value


def test_leaving_the_box_sends_nothing():
    panel = panel_of()
    panel.text.value = "half a que"  # what comes when the box loses the focus
    assert panel._worker is None
    assert panel.text.value == "half a que"


def test_the_window_grows_while_the_answer_is_written(monkeypatch):
    monkeypatch.setattr("glmhelpers.widgets.chat_panel.REFRESH_SECONDS", 0)
    monkeypatch.setattr("glmhelpers.widgets.chat_panel.CHARACTERS_A_SECOND", 10**12)
    panel, seen = panel_of(), []
    panel.window.observe(lambda change: seen.append(change["new"]), "value")
    panel.ask("你好")
    growing = [html for html in seen if "▌" in html]
    assert len(growing) >= 5
    assert len(set(growing)) == len(growing)
    assert panel.stop_button.disabled


def test_a_long_conversation_is_redrawn_less_often(monkeypatch):
    monkeypatch.setattr("glmhelpers.widgets.chat_panel.REFRESH_SECONDS", 0)
    counts = []
    for rate in (10**12, 1e-3):  # no limit at all, and one that nothing can keep
        monkeypatch.setattr("glmhelpers.widgets.chat_panel.CHARACTERS_A_SECOND", rate)
        panel, seen = panel_of(), []
        panel.ask("你好")
        panel.session.clear()
        panel.window.observe(lambda change, seen=seen: seen.append(change["new"]), "value")
        panel.ask("你好")
        counts.append(sum("▌" in html for html in seen))
        assert "▌" not in panel.window.value
    assert counts[0] >= 5 > counts[1]


def test_stop_button_ends_the_answer_and_the_kernel_stays_free():
    panel = writing_panel()
    assert panel.send_button.disabled
    panel.text.value = "again"
    panel.send_button.click()  # pressed a second time: nothing is lost, nothing started
    assert panel.text.value == "again"
    panel.stop_button.click()
    panel.wait(60)
    (answer,) = panel.answers
    assert answer.ended == "stopped"
    assert ", stopped" in panel.window.value


def test_stop_is_heard_before_the_answer_begins(monkeypatch):
    """The session forgets what was said before it began: the window has to say it again."""
    panel = panel_of(max_new_tokens=2000)
    began, may_begin, stream = threading.Event(), threading.Event(), panel.session.stream

    def late(question):
        began.set()
        may_begin.wait(60)
        yield from stream(question)

    monkeypatch.setattr(panel.session, "stream", late)
    panel.text.value = "你好"
    panel.send_button.click()
    began.wait(60)
    panel.stop_button.click()
    may_begin.set()
    panel.wait(60)
    assert panel.answers[0].ended == "stopped"
    assert panel.answers[0].new_tokens <= 2
    panel.clear()
    panel.session.change(max_new_tokens=4)
    assert panel.ask("你好").new_tokens == 4, "a stop counts for one answer"


def test_asking_while_an_answer_is_written_leaves_that_answer_alone():
    panel = writing_panel()
    with pytest.raises(RuntimeError, match="still writing"):
        panel.ask("again")
    assert not panel.stop_button.disabled
    panel.stop()
    panel.wait(60)
    assert [answer.question for answer in panel.answers] == ["你好"]


def test_adapter_switch_counts_for_the_next_answer(adapted):
    panel = panel_of(adapted)
    assert panel.which.value == "tuned"
    tuned = panel.ask("你好")
    panel.which.value = "base"
    assert "next answer comes from the base model" in panel.message.value
    panel.session.clear()
    base = panel.ask("你好")
    assert (tuned.adapter, base.adapter) == (True, False)
    assert base.text == panel_of().ask("你好").text != tuned.text
    assert "answer tuned" in panel.window.value
    assert "answer base" in panel.window.value


def test_without_an_adapter_there_is_nothing_to_switch():
    assert panel_of().which.options == ("base",)


def test_sliders_change_the_settings():
    panel = panel_of()
    panel.temperature.value, panel.top_p.value = 1.5, 0.3
    assert (panel.session.settings.temperature, panel.session.settings.top_p) == (1.5, 0.3)


def test_sliders_show_the_settings_as_they_are():
    panel = panel_of(temperature=3.0, top_p=0.01)
    assert (panel.temperature.value, panel.top_p.value) == (3.0, 0.01)


def test_clear_forgets_window_and_conversation():
    panel = panel_of()
    panel.ask("你好")
    panel.clear_button.click()
    assert (panel.answers, panel.session.history) == ([], [])
    assert "figures" not in panel.window.value
    assert str(panel) == "(nothing has been said yet)"


def test_errors_are_shown_and_the_panel_goes_on():
    panel = panel_of()
    panel._send()
    assert "Write a question first" in panel.message.value
    enter(panel, "长" * 5000)
    assert "ValueError: the question has 50" in panel.message.value
    assert panel.text.value == "长" * 5000, "so it can be shortened"
    assert panel.ask("你好").text
    assert "ValueError" not in panel.message.value


def test_text_cannot_become_markup():
    html = turn_html(Answer("<script>a</script>", text="<b>&", ended="eop", notices=("<i>",)))
    assert "<script>" not in html
    assert "<b>" not in html
    assert "&lt;b&gt;&amp;" in html


def test_text_and_widget_for_every_frontend():
    panel = panel_of()
    bundle = panel._repr_mimebundle_()
    assert bundle["text/plain"] == str(panel)
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.box.model_id
    assert isinstance(panel.box, ipywidgets.VBox)
