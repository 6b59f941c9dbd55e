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

PROJECT = Path(__file__).resolve().parents[2]
DEPENDENCIES = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]

# Stands before the cell: some packages seem to be missing or of another version, and pip is only recorded.
PRETEND = """\
import importlib.metadata, json, subprocess
versions = {versions}
real_distributions, real_version = importlib.metadata.distributions, importlib.metadata.version
class Found:
    def __init__(self, version):
        self.version = version
def distributions(name):
    if name in versions:
        return iter([Found(versions[name])] if versions[name] else [])
    return real_distributions(name=name)
def version(name):
    if name in versions and not versions[name]:
        raise importlib.metadata.PackageNotFoundError(name)
    return versions.get(name) or real_version(name)
importlib.metadata.distributions, importlib.metadata.version = distributions, version
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


def run_cell(folder, before="", root=None, fork=None):
    source = first_cell.SOURCE
    if root is not None:
        assert source.count('Path("/")') == 1
        source = source.replace('Path("/")', f"Path({str(root)!r})")
    if fork is not None:
        assert source.count('FORK = ""') == 1
        source = source.replace('FORK = ""', f"FORK = {str(fork)!r}")
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
    assert last.startswith("FileNotFoundError: The project is not here: write your fork's address into FORK")


@pytest.fixture
def bare(project, tmp_path):
    """The project as a bare repository, as a fork's address would give it: two commits."""
    repository = tmp_path / "fork with blanks; echo.git"
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@x"]
    (project / "thuglm" / "__init__.py").touch()  # git keeps no empty folders
    subprocess.run([*git, "init", "-q"], cwd=project, check=True)
    for message in ("one", "two"):
        subprocess.run([*git, "add", "."], cwd=project, check=True)
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", message], cwd=project, check=True)
    subprocess.run([*git, "clone", "-q", "--bare", project, repository], check=True)
    shutil.rmtree(project)
    return repository


@pytest.mark.parametrize(
    ("clouds", "expected"),
    [
        (["kaggle/working", "content"], "root/kaggle/working/course"),
        (["content"], "root/content/course"),
        ([], "elsewhere/course"),
    ],
)
def test_a_fork_is_cloned_where_the_project_is_missing(bare, tmp_path, clouds, expected):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (elsewhere, *(root / cloud for cloud in clouds)):
        folder.mkdir(parents=True)
    first = run_cell(elsewhere, root=root, fork=bare.as_uri())
    there = tmp_path / expected
    assert first.stdout == f"preflight of {there}/glmhelpers/runtime.py\n", first.stderr
    count = subprocess.run(["git", "rev-list", "--count", "HEAD"], cwd=there, capture_output=True, text=True)
    assert count.stdout == "1\n"  # only the newest commit
    for folder in (elsewhere, there):  # in the next notebook the clone is found, and nothing is cloned
        again = run_cell(folder, root=root, fork="/no/such/repository")
        assert again.stdout == first.stdout, again.stderr


def test_a_fork_is_not_cloned_where_the_project_is(project):
    done = run_cell(project / "notebooks", before=PRETEND.format(versions={}), fork="https://example.org/fork")
    assert done.stdout == f"preflight of {project}/glmhelpers/runtime.py\n", done.stderr


def test_a_wrong_fork_is_git_s_error_with_the_address(tmp_path):
    done = run_cell(tmp_path, root=tmp_path, fork=tmp_path / "no-such.git")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "no-such.git' does not exist" in done.stderr
    assert not (tmp_path / "course").exists()


def recorded(done):
    assert done.returncode == 0, done.stderr
    return [json.loads(line.removeprefix("CALL ")) for line in done.stdout.splitlines() if line.startswith("CALL")]


@pytest.mark.parametrize(
    ("versions", "names"),
    [
        ({"peft": None, "ipywidgets": None, "jupyterlab": None}, ["peft", "ipywidgets"]),  # missing
        ({"peft": "0.19.1", "transformers": "4.57.3"}, ["transformers", "peft"]),  # older than the lower bound
        ({"huggingface_hub": "0.36.0", "jupyterlab": "3.6.8"}, ["huggingface_hub"]),
        ({"transformers": "5.15.0.dev0", "ipywidgets": "7.7"}, ["transformers", "ipywidgets"]),
        ({"torch": "2.4.1+cu121", "datasets": None}, ["datasets"]),  # an old torch stays
    ],
)
def test_installs_only_what_is_missing_or_too_old_and_keeps_torch(project, versions, names):
    done = run_cell(project, before=PRETEND.format(versions=versions))
    ranges = [need for need in DEPENDENCIES if re.match(r"\w+", need)[0] in names]
    assert len(ranges) == len(names)
    keep = f"torch=={versions.get('torch') or metadata.version('torch')}"
    assert recorded(done) == [[[sys.executable, "-m", "pip", "install", "--quiet", keep, *ranges], {"check": True}]]
    assert "preflight of" in done.stdout


@pytest.mark.parametrize(
    "versions",
    [
        {},
        {"torch": "2.4.1"},  # too old, but never touched: the pre-flight says so
        {"torch": "2.11.0a0+nv26.1"},
        {"jupyterlab": None},
        {"ipywidgets": "7.7.1", "transformers": "5.15.0", "peft": "0.20"},  # the bounds themselves
        {"ipywidgets": "9.0", "transformers": "6.0"},  # newer than tested: the pre-flight says so, no downgrade
    ],
)
def test_nothing_is_installed_where_nothing_is_missing_or_too_old(project, versions):
    done = run_cell(project, before=PRETEND.format(versions=versions))
    assert recorded(done) == []
    assert "preflight of" in done.stdout


def test_an_upgrade_of_an_imported_package_asks_for_a_new_kernel(project):
    before = PRETEND.format(versions={"peft": "0.10", "datasets": "1.0"}) + "import sys\nsys.modules['peft'] = sys\n"
    done = run_cell(project, before=before)
    assert done.returncode == 1
    assert done.stdout.startswith("CALL")
    assert "preflight" not in done.stdout
    assert done.stderr.splitlines()[-1].startswith("AssertionError: Restart the kernel")


def test_missing_torch_is_said_and_never_installed(project):
    done = run_cell(project, before=PRETEND.format(versions={"torch": None, "peft": None}))
    assert done.returncode == 1
    assert "PackageNotFoundError: No package metadata was found for torch" in done.stderr
    assert done.stdout == ""
    # The traceback of a notebook shows the line, and the line says what to do.
    assert [line for line in first_cell.SOURCE.splitlines() if 'version("torch")' in line and "pytorch.org" in line]


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
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 115


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
