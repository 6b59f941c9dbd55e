"""The files that describe the project agree with each other, and the committed files are fit for readers."""

import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from pathlib import Path

import first_cell
import make_readme
import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((PROJECT / "pyproject.toml").read_text())
EXTRAS = SETTINGS["project"]["optional-dependencies"]
PACKAGES = [*SETTINGS["project"]["dependencies"], *EXTRAS["notebooks"], *EXTRAS["scores"]]
FOR_TESTS = EXTRAS["test"]
AT_LOWER_BOUND = ("transformers", "peft", "accelerate", "ipywidgets")
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("**/*.ipynb"))
ENGLISH = [path for path in NOTEBOOKS if "zh" not in path.parts]


def committed_files():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, check=True, text=True).stdout
    return [PROJECT / name for name in listed.split("\0") if name and (PROJECT / name).is_file()]


@cache
def texts():
    """Committed text files by their path below the project."""
    found = {}
    for path in committed_files():
        try:
            found[path.relative_to(PROJECT).as_posix()] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights, pictures
    return found


def pins(name):
    lines = [line for line in (PROJECT / name).read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(line.split("==")[0]): Version(line.split("==")[1]) for line in lines}


def lower_bound(requirement):
    (bound,) = [clause.version for clause in requirement.specifier if clause.operator == ">="]
    return Version(bound)


# The descriptions agree


def test_environment_yml_names_the_same_packages_and_ranges():
    conda = yaml.safe_load((PROJECT / "environment.yml").read_text())
    *others, pip = conda["dependencies"]
    assert conda["name"] == SETTINGS["project"]["name"]
    assert others[0].split(",")[0] == "python" + SETTINGS["project"]["requires-python"]
    lines = pip["pip"]
    assert [line for line in lines if not line.startswith("-")] == PACKAGES
    assert [line for line in lines if line.startswith("-")] == ["-c constraints.txt", "-e .[notebooks,scores,test]"]


def test_readme_lists_the_same_packages_and_ranges():
    readme = (PROJECT / "README.md").read_text()
    section = readme.split("## Dependencies")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", section, flags=re.M)
    assert [name for name, _ in rows] == PACKAGES
    assert all(reason.strip() for _, reason in rows)
    for need in FOR_TESTS:
        name = Requirement(need).name
        assert name.split("-")[0] in section or name == "nbformat", f"{name} is for tests and not in the README"


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_pins_satisfy_the_ranges(name):
    pinned = pins(name)
    for need in map(Requirement, [*PACKAGES, *FOR_TESTS, *SETTINGS["build-system"]["requires"]]):
        version = pinned[canonicalize_name(need.name)]
        assert need.specifier.contains(version), f"{name} pins {need.name} {version}, pyproject wants {need.specifier}"


def test_oldest_pins_are_the_lower_bounds():
    pinned = pins("constraints-oldest.txt")
    for need in map(Requirement, PACKAGES):
        if need.name in AT_LOWER_BOUND:
            assert pinned[need.name] == lower_bound(need), need.name


def test_newest_pins_are_not_older_than_the_oldest():
    oldest, newest = pins("constraints-oldest.txt"), pins("constraints.txt")
    assert all(newest[name] >= version for name, version in oldest.items() if name in newest)
    assert all(newest[name] > oldest[name] for name in AT_LOWER_BOUND)


def test_preflight_checks_the_same_ranges():
    from glmhelpers.runtime import SUPPORTED

    ranges = {need.name: need for need in map(Requirement, PACKAGES)}
    for name, (oldest, newest) in SUPPORTED.items():
        assert Version(oldest) == lower_bound(ranges[name]), name
        if newest:
            assert pins("constraints.txt")[name].release[:2] == Version(newest).release[:2], name


def test_made_blocks_of_the_readme_are_fresh():
    assert make_readme.main(["--check"]) == 0
    named = set(re.findall(r"^\| \[\S+\]\((\S+)\) \|", make_readme.files_map(), flags=re.M))
    rooms = {name for name in texts() if re.match(r"(thuglm|glmhelpers)/.*(?<!__init__)\.py$", name)}
    assert rooms <= named
    assert all(make_readme.first_line(PROJECT / name) for name in named), "a file without a first line"


def test_every_import_is_declared():
    optional = {"bitsandbytes", "modelscope", "IPython"}  # imported where they are needed, and there may be none
    readme = (PROJECT / "README.md").read_text()
    declared = {canonicalize_name(Requirement(need).name).replace("-", "_") for need in PACKAGES}
    for name, text in texts().items():
        if not name.startswith(("glmhelpers/", "thuglm/")) or not name.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(text)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for module in {module.split(".")[0] for module in modules}:
                known = module in sys.stdlib_module_names or module in declared or module in ("thuglm", "glmhelpers")
                assert known or module in optional or f"`{module}`" in readme, f"{name} imports {module}"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_documents_name_files_and_commands_that_exist(name):
    text = (PROJECT / name).read_text()
    linked = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in linked if not (PROJECT / link).exists()] == []
    targets = re.findall(r"^([\w.-]+[\w/.-]*):", (PROJECT / "Makefile").read_text(), flags=re.M)
    assert set(re.findall(r"`make ([\w-]+)", text)) <= set(targets)


def test_one_version_everywhere():
    version = SETTINGS["project"]["version"]
    assert yaml.safe_load((PROJECT / "CITATION.cff").read_text())["version"] == version
    assert f"## {version} " in (PROJECT / "CHANGELOG.md").read_text()


def test_public_ci_runs_the_projects_own_script_on_every_python():
    workflow = yaml.safe_load((PROJECT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["course"]
    assert workflow["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert "bash .ci/run" in [step.get("run") for step in workflow["steps"]]


def test_wheel_holds_every_room_and_imports_without_jupyter(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    # A copy: the build leaves folders behind in the tree it is made from.
    for name in ("pyproject.toml", "README.md", "LICENSE", "thuglm", "glmhelpers"):
        place = tmp_path / "tree" / name
        place.parent.mkdir(exist_ok=True)
        (shutil.copytree if (PROJECT / name).is_dir() else shutil.copy)(PROJECT / name, place)
    subprocess.run([*command, str(tmp_path / "tree")], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    modules = {name for name in texts() if name.startswith(("thuglm/", "glmhelpers/")) and name.endswith(".py")}
    assert modules <= inside
    blocked = ["ipywidgets", "jupyterlab", "matplotlib", "IPython", "nltk", "jieba", "rouge_chinese"]
    engine = [
        "weights",
        "data",
        "tokens",
        "cost_model",
        "devicemap",
        "memory",
        "training",
        "lora",
        "inference",
        "runtime",
    ]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import thuglm\n"
    code += "\n".join(f"import glmhelpers.{room}" for room in engine)
    code += f"\nassert glmhelpers.__file__.startswith({str(tmp_path)!r})"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)


# The committed files


def test_modules_are_short():
    long = {
        name: text.count("\n")
        for name, text in texts().items()
        if name.endswith((".py", ".sh")) and "modeling" not in name and text.count("\n") > 400
    }
    assert long == {}


def test_no_path_of_a_developers_machine():
    here = re.compile(r"(?<![\w.])/(work|root|home/\w+|tmp/bash_jobs)[/.\s\"']")
    found = {name: match[0] for name, text in texts().items() if (match := here.search(text))}
    found.pop("tests/test_packaging.py", None)
    assert found == {}


def test_nothing_generated_is_committed():
    generated = ("build/", "outputs/", ".venv", "__pycache__", ".ipynb_checkpoints", ".egg-info")
    names = [path.relative_to(PROJECT).as_posix() for path in committed_files()]
    assert [name for name in names if any(part in f"{name}/" for part in generated)] == []


def test_no_remote_code_and_no_unsafe_loading():
    for name, text in texts().items():
        if not name.endswith(".py") or name.startswith("tests/"):
            continue
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert called not in ("eval", "exec", "os.system"), f"{name}:{node.lineno} calls {called}"
            assert keywords.get("shell") != "True", f"{name}:{node.lineno} starts a shell"
            assert "trust_remote_code" not in keywords, f"{name}:{node.lineno}"
            if called == "torch.load":
                assert keywords.get("weights_only") == "True", f"{name}:{node.lineno} unpickles anything"


# The notebooks


def test_first_cells_are_identical():
    assert first_cell.main(["--check"]) == 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_fit_for_readers(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata, "widget state saved"
    assert "widget-state+json" not in json.dumps(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    too_long = {cell.source.splitlines()[0]: n for cell in code if (n := len(cell.source.splitlines())) > 30}
    assert too_long == {}
    errors = [cell.source for cell in code for output in cell.outputs if output.output_type == "error"]
    assert errors == []
    assert len(notebook.cells) <= 55 or path.stem == "solutions"  # it has a section for each of the others
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")


@pytest.mark.parametrize("path", [path for path in ENGLISH if path.stem[0] == "0"], ids=lambda path: path.stem)
def test_notebook_has_the_shape_of_the_course(path):
    cells = nbformat.read(path, as_version=4).cells
    lines = [len(cell.source.splitlines()) for cell in cells if cell.cell_type == "code"]
    assert max(lines) <= 25
    assert statistics.median(lines) <= 8
    assert "**You are here:**" in cells[0].source
    assert sum(cell.source.count("**Predict first") for cell in cells) >= 2
    recall = next(cell.source for cell in cells if cell.source.startswith("## Recall"))
    assert recall.count("<details>") == 10


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_as_make_notebooks_writes_it(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1)), "run `make notebooks`: cells not executed, or not in order"
    assert any(cell.outputs for cell in code)
    clouds = {"accelerator", "colab", "kaggle"}  # what they ask for: test_badges.py
    assert notebook.metadata.keys() - clouds == {"kernelspec", "language_info"}, "run `make notebooks`"


@pytest.mark.parametrize("path", ENGLISH, ids=lambda path: path.stem)
def test_settings_can_be_given_to_papermill(path):
    """It puts its values behind the cell with the tag: nothing in that cell may use them yet."""
    cells = nbformat.read(path, as_version=4).cells
    after = [cells[at + 1] for at, cell in enumerate(cells) if cell.source.startswith("## Settings")]
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == after
    for cell in tagged:
        for statement in ast.parse(cell.source).body:
            assert isinstance(statement, ast.Assign), statement.lineno
            assert not any(isinstance(node, ast.Call) for node in ast.walk(statement)), statement.lineno
