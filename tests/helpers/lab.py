"""A real JupyterLab and a real Chromium for one notebook.

chromium  <--selenium-->  JupyterLab server  <-->  kernel: this Python, with this project
                          (this environment's, or another one's for old ipywidgets)
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import ipywidgets
import nbformat
import pytest

PROJECT = Path(__file__).resolve().parents[2]
PICTURES = PROJECT / "build" / "browser"
CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
CHROMIUM_OPTIONS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1500,1400",
]
SETTINGS = {
    # Cells out of sight are not drawn otherwise, and could not be found.
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {
        "fetchNews": "false",
        "checkForUpdates": False,
    },
}


def lab_command() -> list[str]:
    """The JupyterLab that belongs to this environment's ipywidgets; skips, with the reason, where there is none."""
    if not ipywidgets.__version__.startswith("7."):
        return [sys.executable, "-m", "jupyterlab"]
    lab3 = os.environ.get("GLM_LAB3", "")
    if not lab3 or not Path(lab3, "bin", "python").exists():
        pytest.skip("ipywidgets 7 needs JupyterLab 3 of its own environment: set GLM_LAB3 to its folder")
    return [str(Path(lab3).resolve() / "bin" / "python"), "-m", "jupyterlab"]


def need_browser() -> None:
    """Skip where there is no browser."""
    pytest.importorskip("selenium", reason="selenium is not installed")
    for program in (CHROMIUM, DRIVER):
        if not program.exists():
            pytest.skip(f"{program} is not there: apt-get install chromium chromium-driver")


def make_folder(folder: Path, cells: list) -> None:
    """A folder that looks like the project, with `cells` as notebooks/test.ipynb, and the kernel of this Python."""
    for name in ("glmhelpers", "thuglm", "data", "benchmarks", "pyproject.toml"):
        (folder / "work" / name).parent.mkdir(exist_ok=True)
        (folder / "work" / name).symlink_to(PROJECT / name)
    kernel = folder / "share" / "kernels" / "project"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "project", "language": "python", "env": {"OMP_NUM_THREADS": "1"}}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "project", "display_name": "project", "language": "python"}
    (folder / "work" / "notebooks").mkdir()
    nbformat.write(notebook, folder / "work" / "notebooks" / "test.ipynb")
    for name, values in SETTINGS.items():
        path = folder / "settings" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))


@contextmanager
def running_lab(folder: Path, command: list[str]):
    """Start the server on a free port of this machine; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [
        "--no-browser",
        "--allow-root",
        "--expose-app-in-browser",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--ServerApp.token=",
        "--ServerApp.password=",
        f"--ServerApp.root_dir={folder / 'work'}",
    ]
    env = {
        **os.environ,
        "JUPYTER_PATH": str(folder / "share"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "GLM_OUTPUT": str(folder / "outputs"),
        "HF_HUB_OFFLINE": "1",
    }
    log = (folder / "server.log").open("w")
    server = subprocess.Popen([*command, *options], cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=2)
                break
            except OSError:
                if server.poll() is not None:
                    raise RuntimeError((folder / "server.log").read_text()) from None
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(30)
        log.close()


@contextmanager
def running_browser(folder: Path):
    """Start Chromium with an empty profile; yields the driver."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for option in [*CHROMIUM_OPTIONS, f"--user-data-dir={folder / 'profile'}"]:
        options.add_argument(option)
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    driver.set_script_timeout(300)
    try:
        yield driver
    finally:
        driver.quit()
        shutil.rmtree(folder / "profile", ignore_errors=True)


def run_command(driver, command: str) -> None:
    """Run one of JupyterLab's commands and wait until it is done."""
    script = "const done = arguments[1]; window.jupyterapp.commands.execute(arguments[0]).then(() => done(), done);"
    driver.execute_async_script(script, command)


class LabPage:
    """One notebook open in JupyterLab, and what a visitor does with it."""

    def __init__(self, driver):
        self.driver = driver
        self.wait("return window.jupyterapp !== undefined")
        self.wait(
            "const p = window.jupyterapp.shell.currentWidget;"
            "return p && p.sessionContext && p.sessionContext.session && p.sessionContext.session.kernel"
            " && p.sessionContext.session.kernel.status == 'idle'"
        )

    def wait(self, script: str, seconds: int = 240):
        return self.until(lambda: self.driver.execute_script(script), seconds)

    def until(self, condition, seconds: int = 60):
        """Wait for `condition()`: the page answers some time after a key or a click."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds).until(lambda _: condition())

    def find(self, selector: str, text: str = ""):
        from selenium.webdriver.common.by import By

        found = [e for e in self.driver.find_elements(By.CSS_SELECTOR, selector) if text in e.text]
        assert found, f"nothing like {selector} with the text {text!r} on the page"
        return found[0]

    def show(self, element) -> None:
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)

    def picture(self, name: str) -> None:
        """A screenshot for people to look at: build/browser/ipywidgets-VERSION-NAME.png."""
        PICTURES.mkdir(parents=True, exist_ok=True)
        assert self.driver.save_screenshot(str(PICTURES / f"ipywidgets-{ipywidgets.__version__}-{name}.png"))

    def run_last(self) -> str:
        """Run the last cell and return its text."""
        self.driver.execute_script(
            "const nb = window.jupyterapp.shell.currentWidget.content; nb.activeCellIndex = nb.widgets.length - 1"
        )
        run_command(self.driver, "notebook:run-cell")
        return self.driver.execute_script(
            "const nb = window.jupyterapp.shell.currentWidget.content;"
            "return nb.widgets[nb.widgets.length - 1].node.querySelector('.jp-Cell-outputArea').innerText"
        )
