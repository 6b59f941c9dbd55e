"""The first cell of every notebook, run as a program of its own from many working folders."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import first_cell
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

PROJECT = Path(__file__).resolve().parents[1]
DEPENDENCIES = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]

# Stands before the cell: some packages seem not to be installed, and pip is only recorded.
PRETEND = """\
import importlib.util, json, subprocess
real_find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in {missing} else real_find_spec(name)
subprocess.run = lambda *call, **options: print("CALL", json.dumps([*call, options]))
"""


@pytest.fixture
def project(tmp_path):
    """A folder that looks like the project; its `preflight` only tells which copy was imported."""
    folder = tmp_path / "cloud" / "my-fork"
    for package in ("thuglm", "glmhelpers", "notebooks"):
        (folder / package).mkdir(parents=True)
    (folder / "glmhelpers" / "__init__.py").touch()
    (folder / "glmhelpers" / "runtime.py").write_text("def preflight():\n    print('preflight of', __file__)\n")
    shutil.copy(PROJECT / "pyproject.toml", folder)
    return folder


def run_cell(folder, before="", root=None):
    source = first_cell.SOURCE
    if root is not None:
        assert source.count('Path("/")') == 1
        source = source.replace('Path("/")', f"Path({str(root)!r})")
    return subprocess.run(
        [sys.executable, "-c", f"{before}\n{source}"], cwd=folder, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("below", [".", "notebooks", "notebooks/deeper/still"])
def test_finds_the_project_from_the_working_folder_upwards(project, below):
    folder = project / below
    folder.mkdir(parents=True, exist_ok=True)
    done = run_cell(folder)
    assert done.stdout == f"preflight of {project}/glmhelpers/runtime.py\n", done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize(
    "place", ["content/fork", "kaggle/working/fork", "kaggle/input/fork", "kaggle/input/set/fork", "kaggle/input/a/b/c"]
)
def test_finds_the_project_where_colab_and_kaggle_put_it(project, place, tmp_path):
    there = tmp_path / "root" / place
    there.parent.mkdir(parents=True)
    project.rename(there)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = run_cell(elsewhere, root=tmp_path / "root")
    assert done.stdout == f"preflight of {there}/glmhelpers/runtime.py\n", done.stderr


def test_the_working_folder_wins_over_other_copies(project, tmp_path):
    shutil.copytree(project, tmp_path / "root" / "content" / "older")
    done = run_cell(project / "notebooks", root=tmp_path / "root")
    assert done.stdout == f"preflight of {project}/glmhelpers/runtime.py\n", done.stderr


def test_without_the_project_one_line_says_how_to_get_it(tmp_path):
    done = run_cell(tmp_path, root=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("FileNotFoundError: Get the project first: git clone <your fork's address>")


def test_installs_only_what_is_missing_and_keeps_torch(project):
    done = run_cell(project, before=PRETEND.format(missing=["peft", "ipywidgets", "jupyterlab"]))
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line.removeprefix("CALL ")) for line in done.stdout.splitlines() if line.startswith("CALL")]
    ranges = [need for need in DEPENDENCIES if need.startswith(("peft", "ipywidgets"))]
    keep = f"torch=={metadata.version('torch')}"
    assert calls == [[[sys.executable, "-m", "pip", "install", "--quiet", keep, *ranges], {"check": True}]]
    assert "preflight of" in done.stdout


def test_nothing_is_installed_where_nothing_is_missing(project):
    assert "CALL" not in run_cell(project, before=PRETEND.format(missing=[])).stdout


def test_missing_torch_is_said_and_never_installed(project):
    done = run_cell(project, before=PRETEND.format(missing=["torch", "peft"]))
    assert done.returncode == 1
    assert "ModuleNotFoundError: torch is missing" in done.stderr
    assert done.stdout == ""


def test_every_dependency_is_importable_under_its_own_name():
    # The cell cuts a requirement at ">=" and imports what is left.
    for need in DEPENDENCIES:
        name, bound = need.split(">=", 1)
        assert re.fullmatch(r"\w+", name), need
        assert re.fullmatch(r"[\d.]+(,<[\d.]+)?", bound), need


def test_the_real_project_says_what_is_here():
    done = run_cell(PROJECT / "notebooks", before="import os; os.environ['CUDA_VISIBLE_DEVICES'] = ''")
    assert done.returncode == 0, done.stderr
    assert "[OK]" in done.stdout


def test_is_short_enough_to_be_read():
    lines = first_cell.SOURCE.splitlines()
    assert len(lines) < 25
    assert max(map(len, lines)) <= 110


def test_check_names_and_write_sets_the_cell(tmp_path, capsys):
    right, wrong = new_code_cell(first_cell.SOURCE), new_code_cell("import torch")
    nbformat.write(new_notebook(cells=[new_markdown_cell("# A"), right]), tmp_path / "a.ipynb")
    nbformat.write(new_notebook(cells=[new_markdown_cell("# B"), wrong, new_code_cell("1")]), tmp_path / "b.ipynb")
    arguments = ["--notebooks", str(tmp_path)]

    assert first_cell.main(["--check", *arguments]) == 1
    printed = capsys.readouterr().out
    assert "b.ipynb" in printed
    assert "a.ipynb" not in printed
    untouched = (tmp_path / "a.ipynb").read_bytes()
    assert first_cell.main(["--write", *arguments]) == 0
    assert first_cell.main(["--check", *arguments]) == 0
    assert [cell.source for cell in nbformat.read(tmp_path / "b.ipynb", 4).cells] == ["# B", first_cell.SOURCE, "1"]
    assert (tmp_path / "a.ipynb").read_bytes() == untouched


def test_a_notebook_without_code_cannot_be_set(tmp_path, capsys):
    nbformat.write(new_notebook(cells=[new_markdown_cell("# A")]), tmp_path / "a.ipynb")
    assert first_cell.main(["--write", "--notebooks", str(tmp_path)]) == 1
    assert "a.ipynb" in capsys.readouterr().out


def test_is_the_same_in_every_notebook():
    assert first_cell.main(["--check"]) == 0
