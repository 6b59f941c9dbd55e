"""The chat window in a real JupyterLab: type, see the answer grow, switch the adapter, stop, clear."""

import itertools

import nbformat
import pytest

from tests.helpers.lab import LabPage, lab_command, make_folder, need_browser, run_command, running_browser, running_lab

pytestmark = pytest.mark.browser
SETUP = """\
import sys, time
sys.path.insert(0, "..")
import torch
from peft import LoraConfig, get_peft_model
from glmhelpers.inference import ChatSession, Generation
from glmhelpers.widgets import ChatPanel
from thuglm import ChatGLMForConditionalGeneration, ChatGLMTokenizer
torch.set_num_threads(1)
tiny = "../data/tiny-chatglm"
base = ChatGLMForConditionalGeneration.from_pretrained(tiny, dtype=torch.float32).eval()
model = get_peft_model(base, LoraConfig(r=4, target_modules=["query_key_value"])).eval()
torch.manual_seed(0)
for name, parameter in model.named_parameters():
    if "lora_" in name:
        parameter.data.normal_(std=0.8 if "lora_B" in name else 0.06)
session = ChatSession(model, ChatGLMTokenizer.from_pretrained(tiny), settings=Generation(60, temperature=0))
at_once = session.decoder.stream
session.decoder.stream = lambda *a, **k: (time.sleep(0.06) or token for token in at_once(*a, **k))  # as slow as a T4"""
SHOW = "panel = ChatPanel(session)\npanel"
READ = "print('HISTORY', session.history)\nprint('ADAPTER', session.adapter)\nprint('SAID', str(panel))"


class ChatPage(LabPage):
    """The panel as a visitor sees it."""

    def turns(self, kind: str) -> list[str]:
        script = "return [...document.querySelectorAll('.chat .' + arguments[0])].map(e => e.innerText)"
        return self.driver.execute_script(script, kind)

    def type(self, text: str, enter: bool = True) -> None:
        from selenium.webdriver.common.keys import Keys

        box = self.find("input[placeholder^='Ask something']")
        self.show(box)
        box.send_keys(text + (Keys.ENTER if enter else ""))

    def answered(self, count: int) -> None:
        self.wait(f"return document.querySelectorAll('.chat .figures').length == {count}", 60)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    need_browser()
    command = lab_command()
    folder = tmp_path_factory.mktemp("lab")
    make_folder(folder, [nbformat.v4.new_code_cell(source) for source in (SETUP, SHOW, READ)])
    with running_lab(folder, command) as address, running_browser(folder) as driver:
        driver.get(f"{address}/lab/tree/notebooks/test.ipynb")
        yield ChatPage(driver)


WATCH = """\
window.grown = [];
new MutationObserver(() => {
  const answers = document.querySelectorAll('.chat .answer');
  if (answers.length) window.grown.push(answers[answers.length - 1].innerText);
}).observe(document.querySelector('.chat').closest('.widget-vbox'), {childList: true, subtree: true});"""


def test_a_conversation_in_the_browser(page):
    run_command(page.driver, "notebook:run-all-cells")
    page.wait("return document.querySelector('.chat') !== null")
    page.driver.execute_script(WATCH)

    heights = [page.find("button", text).rect["y"] for text in ("base", "clear")]
    assert abs(heights[0] - heights[1]) < 10, "all controls are in one row"

    page.type("你好")
    page.wait("return [...document.querySelectorAll('.chat .answer')].some(e => e.innerText.length > 9)", 30)
    page.picture("chat-0-growing")
    page.answered(1)
    assert page.turns("question") == ["你好"]
    page.picture("chat-1-tuned")

    grown = page.driver.execute_script("return window.grown")
    growing = [text.rstrip("▌") for text in grown if text.endswith("▌")]
    assert len(set(growing)) >= 3, grown
    assert all(len(a) <= len(b) for a, b in itertools.pairwise(growing))

    page.find("button", "base").click()
    page.wait("return document.body.innerText.includes('next answer comes from the base model')")
    page.find("button", "clear").click()
    page.wait("return document.querySelectorAll('.chat .question').length == 0")
    page.type("What is your name?", enter=False)
    page.find("button", "send").click()
    page.answered(1)
    assert page.turns("answer") == ["My name is TinyGLM."]
    page.type("<b>3加4等于几？</b>")
    page.answered(2)
    assert page.turns("question") == ["What is your name?", "<b>3加4等于几？</b>"]
    page.type("3加4等于几？")
    page.answered(3)
    assert "3+4=7" in page.turns("answer")[-1]
    assert "tokens/s" in page.turns("figures")[-1]
    page.picture("chat-2-base")

    text = page.run_last()
    assert "My name is TinyGLM." in text
    assert "ADAPTER False" in text

    page.find("button", "tuned").click()
    page.find("button", "clear").click()
    page.wait("return document.querySelectorAll('.chat .question').length == 0")
    page.type("你好")  # to the limit: 60 tokens in some 4 seconds
    page.wait("return [...document.querySelectorAll('button')].some(b => b.innerText == 'stop' && !b.disabled)", 30)
    page.find("button", "stop").click()
    page.answered(1)
    assert "stopped" in page.turns("figures")[-1]
    page.type("   ")
    page.wait("return document.body.innerText.includes('Write a question first')")
    page.picture("chat-3-stopped")
    page.find("button", "clear").click()
    page.wait("return document.querySelectorAll('.chat .question').length == 0")
    assert "HISTORY []" in page.run_last()
    page.picture("chat-4-cleared")
