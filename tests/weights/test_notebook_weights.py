"""Notebook 01 on other weights than the tiny ones that it is committed with."""

import shutil
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from glmhelpers.weights.convert import convert_to_safetensors
from glmhelpers.weights.manifest import MEMORY_NAME

ROOT = Path(__file__).resolve().parents[2]


def test_every_check_holds_for_safetensors_in_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "data" / "tiny-chatglm", tmp_path / "bin")
    folder = convert_to_safetensors(tmp_path / "bin", tmp_path / "input", progress=False)
    # Nothing can be written under this name, also not by root, as in a Kaggle input data set.
    (folder / MEMORY_NAME).unlink()
    (folder / MEMORY_NAME).mkdir()
    for name, value in {"WEIGHTS": folder, "DEVICES": "cpu", "OUTPUT": tmp_path / "out"}.items():
        monkeypatch.setenv(f"GLM_{name}", str(value))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notebook = nbformat.read(ROOT / "notebooks" / "01_download_weights.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert f"ChatGLM-6B from {folder} on cpu" in printed
    assert "RESULT files=8" in printed
