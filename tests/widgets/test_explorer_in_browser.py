"""Notebook 03's explorer in a real JupyterLab: sliders, buttons, pictures, and the dict in the next cell."""

import re

import nbformat
import pytest

from tests.helpers.lab import (
    PROJECT,
    LabPage,
    lab_command,
    make_folder,
    need_browser,
    run_command,
    running_browser,
    running_lab,
)

pytestmark = pytest.mark.browser
READ = (
    "print('MAP', [explorer.device_map[f'transformer.layers.{n}'] for n in range(28)])\n"
    "print('CHOSEN', type(explorer.chosen).__name__, explorer.chosen == explorer.device_map)"
)

MONITOR = """import time
from pathlib import Path
from glmhelpers.widgets.monitor import Monitor, Reading

counts = iter(range(1, 10_000))
with Monitor(0.2, lambda: [Reading("GPU 0", next(counts) * 2**30, 0, 0, 2**40, 0)]):
    while not Path("seen").exists():
        time.sleep(0.1)
"""
"""Each reading is 1 GiB larger than the one before; ends when the test has seen enough of them."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    need_browser()
    command = lab_command()
    folder = tmp_path_factory.mktemp("lab")
    cells = nbformat.read(PROJECT / "notebooks" / "03_device_map.ipynb", 4).cells
    place = next(number for number, cell in enumerate(cells) if cell.source.rstrip().endswith("\nexplorer"))
    shown = [cell for cell in cells[: place + 1] if cell.cell_type == "code"]
    for cell in shown:
        cell.outputs = []
    make_folder(folder, [*shown, *map(nbformat.v4.new_code_cell, (MONITOR, READ))])
    with running_lab(folder, command) as address, running_browser(folder) as driver:
        seen = folder / "work" / "notebooks" / "seen"
        seen.touch()
        driver.get(f"{address}/lab/tree/notebooks/test.ipynb")
        page = ExplorerPage(driver)
        page.seen = seen
        yield page


class ExplorerPage(LabPage):
    """The explorer as a learner sees it."""

    def html(self) -> str:
        """What the explorer's pictures and texts show now."""
        return "".join(
            self.driver.execute_script("return [...document.querySelectorAll('.widget-html')].map(e => e.innerHTML)")
        )

    def totals(self) -> list[str]:
        return re.findall(r'class="total"[^>]*>([^<]*)<', self.html())

    def changed(self, before: str) -> str:
        self.until(lambda: self.html() != before)
        return self.html()

    def slide(self, label: str, keys: list[str]) -> None:
        slider = next(each for each in self.all(".widget-hslider") if each.text.startswith(label))
        handle = self.driver.execute_script(
            "return arguments[0].querySelector('.noUi-handle, .ui-slider-handle')", slider
        )
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].focus()", handle)
        for key in keys:
            handle.send_keys(key)

    def all(self, selector: str) -> list:
        from selenium.webdriver.common.by import By

        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def height_of(self, selector: str) -> float:
        """How far the lowest of these reaches below the top of the picture, in pixels."""
        script = (
            "const top = document.querySelector('.widget-html svg').getBoundingClientRect().top;"
            "return Math.max(...[...document.querySelectorAll(arguments[0])].map("
            "  e => e.getBoundingClientRect().bottom)) - top"
        )
        return self.driver.execute_script(script, selector)

    def use_theme(self, name: str) -> None:
        script = (
            "const done = arguments[1]; window.jupyterapp.commands.execute("
            "  'apputils:change-theme', {theme: arguments[0]}).then(() => done(), done)"
        )
        self.driver.execute_async_script(script, f"JupyterLab {name}")
        self.until(lambda: self.driver.execute_script("return document.body.dataset.jpThemeName").endswith(name))

    def picture(self, name: str) -> None:
        self.driver.execute_script("document.querySelector('.widget-html svg').scrollIntoView({block: 'start'})")
        super().picture(name)


def test_the_explorer_answers_to_sliders_and_buttons(lab):
    from selenium.webdriver.common.keys import Keys

    run_command(lab.driver, "notebook:run-all-cells")
    lab.wait("return document.querySelectorAll('.widget-hslider').length > 5")
    lab.wait("return document.querySelectorAll('.widget-html text.total').length == 2")
    start = lab.html()
    assert "This plan fits" in start
    assert "Best plan for speed" in start
    first = lab.totals()
    lab.picture("1-start")

    lab.slide("cut 1", [Keys.ARROW_RIGHT] * 6)
    lab.changed(start)
    lab.until(lambda: '"transformer.layers.20" to ".27": 1' in lab.html().replace("&quot;", '"'))
    assert lab.totals() != first
    assert float(lab.totals()[0].split()[0]) > float(first[0].split()[0])
    lab.picture("2-cut-moved")

    moved = lab.html()
    lab.slide("length", [Keys.END])
    lab.changed(moved)
    lab.slide("batch", [Keys.END])
    lab.wait("return document.body.innerText.includes('does NOT fit')")
    lab.picture("3-does-not-fit")
    lab.slide("batch", [Keys.HOME] + [Keys.ARROW_RIGHT] * 3)
    lab.slide("length", [Keys.HOME] + [Keys.ARROW_RIGHT] * 15)
    lab.wait("return document.body.innerText.includes('This plan fits')")

    before = lab.html()
    lab.find("button", "best plan").click()
    lab.changed(before)
    lab.wait("return document.body.innerText.includes('This is the best plan for speed')")
    lab.find("button", "use this map").click()
    lab.wait("return document.body.innerText.includes('explorer.chosen')")
    lab.picture("4-best-plan")

    text = lab.run_last()
    assert "CHOSEN dict True" in text
    places = re.search(r"MAP \[([\d, \n]+)\]", text)[1].replace("\n", " ").split(",")
    assert len(places) == 28
    cut = re.search(r'"transformer\.layers\.0" to "\.(\d+)": 0', lab.html().replace("&quot;", '"'))
    assert [int(place) for place in places].count(0) == int(cut[1]) + 1


@pytest.mark.parametrize("theme", ["Light", "Dark"])
@pytest.mark.parametrize("width", [1400, 700])
def test_pictures_come_first_and_need_no_ground_of_their_own(lab, theme, width):
    """Runs after the test above. Four GPUs are the tallest picture."""
    from selenium.webdriver.common.keys import Keys

    lab.use_theme(theme)
    if lab.driver.execute_script("return document.querySelector('#jp-left-stack').offsetWidth > 0"):
        run_command(lab.driver, "application:toggle-left-area")
    lab.driver.set_window_size(width, 900)
    lab.slide("GPUs", [Keys.END])
    lab.wait("return document.querySelectorAll('.widget-html text.total').length == 4")
    lab.picture(f"5-{theme}-{width}-four")
    seen = lab.driver.execute_script(
        "return document.querySelector('.jp-WindowedPanel-outer, .jp-Notebook').clientHeight"
    )
    assert lab.height_of(".widget-html .verdict") < 0.75 * seen, "the whole picture, with room for a slider below it"
    assert lab.height_of(".widget-html svg") < lab.height_of(".widget-hslider")
    letters, ground = lab.driver.execute_script(
        "const css = name => getComputedStyle(document.querySelector(name));"
        "return [css('.widget-html svg text.total').fill, css('.widget-html svg').backgroundColor]"
    )
    assert ground == "rgba(0, 0, 0, 0)"
    bright = [int(part) for part in re.findall(r"\d+", letters)[:3]]
    assert min(bright) > 150 if theme == "Dark" else max(bright) < 110
    lab.slide("GPUs", [Keys.HOME, Keys.ARROW_RIGHT])
    lab.wait("return document.querySelectorAll('.widget-html text.total').length == 2")
    lab.picture(f"5-{theme}-{width}-two")


def test_the_monitor_moves_while_its_cell_runs(lab):
    """Runs after the tests above, in the same notebook: the last cell but one, without waiting for its end."""
    lab.seen.unlink()
    lab.driver.execute_script(
        "const nb = window.jupyterapp.shell.currentWidget.content; nb.activeCellIndex = nb.widgets.length - 2;"
        "window.seen = new Set(); window.watching = setInterval(() => {"
        "  const text = nb.widgets[nb.widgets.length - 2].node.querySelector('.jp-Cell-outputArea').innerText;"
        "  const found = text.match(/allocated +([0-9.]+)/); if (found) window.seen.add(found[1]); }, 50);"
        "window.ended = false;"
        "window.jupyterapp.commands.execute('notebook:run-cell').then(() => { window.ended = true; })"
    )
    try:
        lab.wait("return window.seen.size > 2")
    finally:
        lab.seen.touch()
    lab.wait("return window.ended")
    seen = [
        float(size) for size in lab.driver.execute_script("clearInterval(window.watching); return [...window.seen]")
    ]
    lines = lab.driver.execute_script(
        "const nb = window.jupyterapp.shell.currentWidget.content;"
        "return nb.widgets[nb.widgets.length - 2].node.querySelector('.jp-Cell-outputArea').innerText"
    )
    assert lines.count("allocated") == 1, lines
    assert float(re.search(r"allocated +([0-9.]+)", lines)[1]) >= max(seen)
