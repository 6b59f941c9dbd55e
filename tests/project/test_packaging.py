"""The files that describe the project agree with each other, and the committed files are fit for readers."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import first_cell
import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((PROJECT / "pyproject.toml").read_text())
PACKAGES = SETTINGS["project"]["dependencies"]
FOR_TESTS = SETTINGS["project"]["optional-dependencies"]["test"]
AT_LOWER_BOUND = ("transformers", "peft", "accelerate", "ipywidgets")
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("**/*.ipynb"))


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
    assert [line for line in lines if line.startswith("-")] == ["-c constraints.txt", "-e .[test]"]


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


def test_readme_gives_the_figures_of_the_planner():
    from glmhelpers.devicemap.plan import largest_batch, plan_device_map
    from glmhelpers.utils.units import GIB
    from thuglm import ChatGLMConfig

    readme, config = " ".join((PROJECT / "README.md").read_text().split()), ChatGLMConfig()
    plan = plan_device_map(config, ["T4", "T4"], 4, 1024, objective="memory")
    first, second = (f"{total / GIB:.2f}" for total in plan.total_bytes)
    decimal = " and ".join(f"{total / 1e9:.2f}" for total in plan.total_bytes)
    assert f"need {first} and {second} GiB ({decimal} GB)" in readme
    rows = [largest_batch(config, cards, 1024) for cards in (["T4"], ["T4", "T4"])]
    assert f"With one, {rows[0]} rows of 1024 tokens fit; with two, {rows[1]}" in readme
    assert f"up to {largest_batch(config, ['T4', 'T4'], 1024)} rows fit" in readme
    alone = plan_device_map(config, ["T4"], 4, 1024, objective="memory")
    peak, total = alone.peak_bytes[0], alone.total_bytes[0]
    assert f"predicted are {peak / 1e9:.2f} GB at the peak" in readme
    assert f"{total / GIB:.1f} GiB = {total / 1e9:.2f} GB" in readme


def test_readme_gives_the_measured_figures():
    from glmhelpers.training.measure import predict_case
    from thuglm import ChatGLMConfig

    table = (PROJECT / "README.md").read_text().split("## Measured")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    row = {what: here for what, _, here, _ in cells}
    lines = {
        path.stem.removesuffix("_h100"): [json.loads(line) for line in path.read_text().splitlines()]
        for path in (PROJECT / "benchmarks" / "results").glob("*_h100.jsonl")
    }
    placed = {line["batch"]: line for line in lines["two_gpus"] if line["figure"] == "placement"}
    assert row["peaks of two GPUs, 4 x 1024 tokens"] == "{:.2f} and {:.2f} GB".format(
        *(peak / 1e9 for peak in placed[4]["peak_bytes"])
    )
    assert row["rows of 1024 tokens that fit on both"] == str(max(placed))
    memory = lines["train_step_memory"]
    assert row[f"predicted peak against the measured one, {len(memory)} cases"] == "within 0.04 %"
    assert all(abs(predict_case(ChatGLMConfig(), line) / line["peak_bytes"] - 1) <= 0.0004 for line in memory)
    steps = {line["checkpointed"]: line["ms"] for line in reversed(lines["train_step_speed"]) if line["gpus"] == 1}
    whole = next(line for line in lines["train_step_speed"])
    assert row["a step on one GPU, 4 x 1024 tokens, every block checkpointed"] == f"{whole['ms']:.0f} ms"
    assert row["the same, nothing checkpointed"] == f"{steps['none']:.0f} ms"
    stages = " and ".join(f"{line['ms']:.0f}" for line in lines["train_step_planned"])
    assert row["the two stages that the planner chooses for two 15 GiB GPUs, each alone"] == f"{stages} ms"
    (even,) = (line for line in lines["two_gpus"] if line.get("cut") == [14, 14] and line.get("speedup", 1) > 1.6)
    assert even["micro_batches"] == 8
    assert row["two GPUs, 14 blocks each, 8 micro-batches against 1"] == f"{even['speedup']} times as fast"
    (alike,) = (
        line for line in lines["rows"] if (line["way"], line["batch"], line["checkpointed"]) == ("alike", 16, "all")
    )
    what = "rows of real lengths, 16 a step: tokens per second against the same rows padded to 1024"
    assert row[what] == f"{alike['times']} times as many"
    packed = " and ".join(f"{line['peak_bytes'] / 1e9:.2f}" for line in lines["packed"][1:3])
    assert row["the base in 8 and in 4 bits, peak on one GPU, 4 x 1024 tokens"] == f"{packed} GB"
    tokens = [line["tokens_per_s"] for line in lines["decode"] if line.get("way") == "graphs" and line["gpus"] == 1]
    assert row["tokens per second of one answer"] == f"{min(tokens):.0f} to {max(tokens):.0f}"


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


def test_readme_names_files_and_folders_that_exist():
    readme = (PROJECT / "README.md").read_text()
    linked = re.findall(r"\]\(([^)#]+)\)", readme)
    folders = re.findall(r"^\| `(\w+/)` \|", readme, flags=re.M)
    commands = re.findall(r"make ([\w-]+)", readme)
    assert linked
    assert len(folders) == 7
    assert [name for name in linked + folders if not (PROJECT / name).exists()] == []
    targets = re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(), flags=re.M)
    assert set(commands) - {"and"} <= set(targets)


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
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_as_make_notebooks_writes_it(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1)), "run `make notebooks`: cells not executed, or not in order"
    assert any(cell.outputs for cell in code)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}, "run `make notebooks`"
