"""What the first cell installs and when it stops: `glmhelpers/first_cell.py` with a pip that only records."""

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest

from glmhelpers.first_cell import NOT_NEEDED
from tests.helpers.first_cell_case import PROJECT, preflight_of, pretend, put_project, run_cell, stopped

SETTINGS = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
EXTRAS = SETTINGS["optional-dependencies"]
DEPENDENCIES = [*SETTINGS["dependencies"], *EXTRAS["notebooks"], *EXTRAS["scores"]]
PINS = [line for line in (PROJECT / "constraints.txt").read_text().splitlines() if "==" in line]


@pytest.fixture
def project(tmp_path):
    """A folder that looks like the project; its `preflight` only tells which copy was imported."""
    return put_project(tmp_path / "cloud" / "my-fork")


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
        ({"safetensors": "0.5rc1"}, ["safetensors"]),
        ({"torch": "2.12.1+cu121", "matplotlib": None}, ["matplotlib"]),
    ],
)
def test_installs_only_what_is_missing_or_too_old_and_keeps_torch(project, versions, names):
    done = run_cell(project, before=pretend(**versions))
    pinned = [line for name in names for line in PINS if line.split("==")[0] == name]
    assert len(pinned) == len(names)
    keep = f"torch=={versions.get('torch') or metadata.version('torch')}"
    assert recorded(done) == [[sys.executable, "-m", "pip", "install", "--quiet", keep, *pinned]]
    assert f"installing {', '.join(names)} ...\n" in done.stdout
    assert preflight_of(done) == project


@pytest.mark.parametrize(
    ("notebook", "wanted"),
    [("01_x", set()), ("03_x", set()), ("04_x", {"datasets"}), ("05_x", {"datasets", "nltk", "jieba"})],
)
def test_what_only_another_notebook_needs_is_not_installed(project, notebook, wanted):
    done = run_cell(project, before=pretend(nltk=None, jieba=None, datasets=None), notebook=notebook)
    asked = {need.split("==")[0] for call in recorded(done) for need in call[6:]}
    assert asked == wanted


@pytest.mark.parametrize(
    "versions",
    [
        {},
        {"torch": "2.11.0.post1"},
        {"jupyterlab": None},
        {"ipywidgets": "7.7.1", "transformers": "5.15.0", "peft": "0.20"},  # the bounds themselves
        {"ipywidgets": "9.0", "transformers": "6.0"},  # newer than tested: the pre-flight says so, no downgrade
    ],
)
def test_nothing_is_installed_where_nothing_is_missing_or_too_old(project, versions):
    done = run_cell(project, before=pretend(**versions), notebook="05")
    assert recorded(done) == []
    assert preflight_of(done) == project


def test_an_upgrade_of_an_imported_package_asks_for_a_new_kernel(project):
    before = pretend(peft="0.10", matplotlib="1.0") + "import sys\nsys.modules['peft'] = sys\n"
    done = run_cell(project, before=before)
    assert stopped(done) == "new packages were installed: restart the kernel, then run this again"


NO_NETWORK = """\
WARNING: Retrying (Retry(total=0, ...)) after connection broken by 'NewConnectionError': /simple/nltk/
ERROR: Could not find a version that satisfies the requirement nltk>=3.9 (from versions: none)
ERROR: No matching distribution found for nltk>=3.9
"""


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        (
            NO_NETWORK,
            "switch the internet on (Kaggle: Settings > Internet > On) or name a mirror (%env PIP_INDEX_URL=https://...), then run this again",
        ),
        ("ERROR: No space left on device\n", "(No space left on device): type !pip install nltk to see why"),
        ("", "no reason was given"),
    ],
)
def test_pip_that_fails_is_one_sentence(project, errors, words):
    sentence = stopped(run_cell(project, before=pretend((1, "", errors), nltk=None), notebook="05"))
    assert sentence.startswith("nltk could not be installed (")
    assert words in sentence


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (None, "torch is not installed: "),
        ("2.4.1+cu121", "torch 2.4.1+cu121 is too old, 2.11 is needed: "),
        ("2.11.0a0+nv26.1", "torch 2.11.0a0+nv26.1 is too old"),
    ],
)
def test_torch_that_is_missing_or_too_old_stops_and_is_never_installed(project, version, words):
    done = run_cell(project, before=pretend(torch=version, peft=None))
    assert stopped(done).startswith(words)
    assert "pytorch.org" in stopped(done)
    assert "CALL" not in done.stdout


def test_another_copy_in_the_same_kernel_is_refused(project, tmp_path):
    other = put_project(tmp_path / "other")
    done = run_cell(project, before=f"import sys\nsys.path.insert(0, {str(other)!r})\nimport glmhelpers\n")
    assert stopped(done).startswith(f"this kernel already runs the copy in {other}: restart the kernel")


def test_a_folder_of_outputs_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    before = f"import os; os.environ['GLM_OUTPUT'] = {str(tmp_path / 'file' / 'out')!r}"
    sentence = stopped(run_cell(PROJECT / "notebooks", before=before))
    assert "file/out cannot be written (" in sentence
    assert "%env GLM_OUTPUT=/a/folder" in sentence


def test_every_dependency_is_importable_under_its_own_name():
    # A requirement is cut at ">=", and what is left is looked for among the imported modules.
    for need in DEPENDENCIES:
        name, bound = need.split(">=", 1)
        assert re.fullmatch(r"\w+", name), need
        assert re.fullmatch(r"[\d.]+(,<[\d.]+)?", bound), need
    known = {need.split(">=")[0] for need in DEPENDENCIES}
    assert all(names < known for names in NOT_NEEDED.values())


def test_only_the_standard_library_is_needed_before_packages_are_there(project):
    lines = f"import sys; sys.path.insert(0, {str(project)!r}); import glmhelpers.first_cell, glmhelpers.utils.folders"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", lines], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
