"""Notebooks as single files in an imitation of Kaggle and Colab: the project comes from a local git address.

    <root>/kaggle/working    the working folder of Kaggle; papermill runs the notebook, as Kaggle does
    <root>/kaggle/input      what is attached: notebooks/<owner>/<slug>/outputs of an earlier session
    <root>/content           the working folder of Colab, drive/MyDrive in it

The clone differs from this project in one line: clouds lie below <root>. By default 01 runs, and 05 until it has its
adapter; `GLM_CLOUDS=all` runs all five on both clouds (some minutes).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import first_cell
import nbformat
import pytest
import torch
from nbclient import NotebookClient

from glmhelpers.lora import attach_lora, save_adapter
from thuglm import ChatGLMForConditionalGeneration

PROJECT = Path(__file__).resolve().parents[2]
GIT = ["git", "-c", "user.name=n", "-c", "user.email=e@x"]

pytestmark = [
    pytest.mark.skipif(
        not (PROJECT / ".git").exists(), reason="not a git checkout: there is nothing to fetch the project from"
    ),
    pytest.mark.once,
]
slow = pytest.mark.skipif(os.environ.get("GLM_CLOUDS") != "all", reason="takes minutes: GLM_CLOUDS=all runs it")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def fork(root, tmp_path_factory) -> str:
    """A repository with the working tree of this project in it, in which clouds lie below `root`."""
    folder = tmp_path_factory.mktemp("fork")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (PROJECT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, folder / name)
    module = folder / "glmhelpers" / "utils" / "folders.py"
    text = module.read_text()
    assert text.count('ROOT = Path("/")') == 1
    module.write_text(text.replace('ROOT = Path("/")', f"ROOT = Path({str(root)!r})"))
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "fork"]):
        subprocess.run([*GIT, *command], cwd=folder, check=True)
    return folder.as_uri()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("WEIGHTS", "DEVICES", "OUTPUT"):
        monkeypatch.delenv(f"GLM_{name}", raising=False)
    for name, value in {"CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)


def session(root, monkeypatch, cloud) -> Path:
    """A new session: an empty working folder, and the variable that tells which service it is."""
    working = root / {"kaggle": "kaggle/working", "colab": "content"}[cloud]
    for name in ("course", "outputs"):
        shutil.rmtree(working / name, ignore_errors=True)
    working.mkdir(parents=True, exist_ok=True)
    for name in ("KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv({"kaggle": "KAGGLE_KERNEL_RUN_TYPE", "colab": "COLAB_RELEASE_TAG"}[cloud], "x")
    return working


def run_alone(name, working, root, fork, until="") -> str:
    """Run one notebook file in `working` (up to the cell with `until`); everything that it printed."""
    notebook = nbformat.read(PROJECT / "notebooks" / f"{name}.ipynb", as_version=4)
    cell = first_cell.first_code_cell(notebook)
    cell.source = cell.source.replace('FORK = ""', f"FORK = {fork!r}").replace('"/kaggle"', repr(f"{root}/kaggle"))
    if until:
        last = next(i for i, c in enumerate(notebook.cells) if c.cell_type == "code" and until in c.source)
        del notebook.cells[last + 1 :]
    if "kaggle" in working.parts:
        pytest.importorskip("papermill", reason="papermill, which Kaggle runs notebooks with, is not installed")
        nbformat.write(notebook, root / "in.ipynb")
        command = [sys.executable, "-m", "papermill", "--no-progress-bar", "-k", "python3"]
        done = subprocess.run(
            [*command, root / "in.ipynb", root / "out.ipynb"], cwd=working, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        notebook = nbformat.read(root / "out.ipynb", as_version=4)
    else:
        NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(working)}}).execute()
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def put_adapter(folder: Path) -> Path:
    torch.manual_seed(0)
    base = ChatGLMForConditionalGeneration.from_pretrained(PROJECT / "data" / "tiny-chatglm", dtype=torch.float32)
    model = attach_lora(base)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return Path(save_adapter(model, folder, template="chatglm"))


@pytest.mark.parametrize("cloud", ["colab", "kaggle"])
def test_05_finds_the_adapter_of_an_earlier_session(root, fork, monkeypatch, cloud):
    working = session(root, monkeypatch, cloud)
    before = {"kaggle": "kaggle/input/notebooks/owner/training/outputs", "colab": "content/drive/MyDrive/chatglm"}
    folder = put_adapter(root / before[cloud] / "adapter")
    try:
        printed = run_alone("05_inference", working, root, fork, until="find_adapter")
    finally:
        shutil.rmtree(folder)
    assert f"project: {working}/course, commit " in printed
    road = {"kaggle": "the attached input ", "colab": "Drive, "}[cloud]
    assert f"adapter: from {road}{folder}\n" in printed


def test_01_runs_alone_on_colab(root, fork, monkeypatch):
    working = session(root, monkeypatch, "colab")
    assert "RESULT files=9" in run_alone("01_download_weights", working, root, fork)
    assert (working / "course" / "outputs" / "results" / "01_download_weights.json").is_file()


@slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cloud", ["kaggle", "colab"])
def test_all_five_one_session_each(root, fork, monkeypatch, cloud):
    for name in ("01_download_weights", "02_data_conversion", "03_device_map", "04_lora_training", "05_inference"):
        working = session(root, monkeypatch, cloud)
        if cloud == "colab":
            monkeypatch.setenv("GLM_OUTPUT", str(root / "content" / "drive" / "MyDrive" / "chatglm"))
        printed = run_alone(name, working, root, fork)
        assert "RESULT " in printed
        if name.startswith("04") and cloud == "kaggle":  # "Save Version", and its output attached to the next
            shutil.copytree(working / "outputs", root / "kaggle/input/notebooks/owner/lora/outputs")
    road = "attached input" if cloud == "kaggle" else "Drive"
    assert f"adapter: from {'the ' if cloud == 'kaggle' else ''}{road}" in printed
