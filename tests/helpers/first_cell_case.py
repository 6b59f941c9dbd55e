"""A stand-in for the project, and the first cell run in front of it as a program of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import first_cell

PROJECT = Path(__file__).resolve().parents[2]

# Stands before the cell: some packages seem to be missing or of another version, and pip is only recorded.
PRETEND = """\
import importlib.metadata, json, subprocess
versions, answer = {versions}, {answer}
real_distributions, real_version, real_run = importlib.metadata.distributions, importlib.metadata.version, subprocess.run
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
def run(call, **options):
    if "pip" not in call:
        return real_run(call, **options)
    print("CALL", json.dumps(call))
    return subprocess.CompletedProcess(call, *answer)
importlib.metadata.distributions, importlib.metadata.version, subprocess.run = distributions, version, run
"""


def pretend(answer=(0, "", ""), **versions):
    return PRETEND.format(versions=versions, answer=answer)


def put_project(folder):
    for package in ("thuglm", "glmhelpers/utils", "notebooks"):
        (folder / package).mkdir(parents=True)
    for name in ("__init__.py", "first_cell.py", "utils/__init__.py", "utils/folders.py"):
        shutil.copy(PROJECT / "glmhelpers" / name, folder / "glmhelpers" / name)
    (folder / "glmhelpers" / "runtime.py").write_text("def preflight():\n    print('preflight of', __file__)\n")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(PROJECT / name, folder)
    (folder / "thuglm" / "__init__.py").touch()  # git keeps no empty folders
    (folder / "notebooks" / "01.ipynb").touch()
    return folder


def cell(root=None, fork=None, notebook="01"):
    source = first_cell.source_for(notebook)
    if root is not None:
        assert source.count('"/kaggle"') == 1
        source = source.replace('"/kaggle"', repr(f"{root}/kaggle"))
    if fork is not None:
        assert source.count('FORK = ""') == 1
        source = source.replace('FORK = ""', f"FORK = {str(fork)!r}")
    return source


def run_cell(folder, before="", root=None, fork=None, notebook="01", path=None):
    return subprocess.run(
        [sys.executable, "-c", f"{before}\n{cell(root, fork, notebook)}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | ({"PATH": path} if path is not None else {}),
    )


def preflight_of(done):
    """The project whose pre-flight ran, and only that."""
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("preflight of ")]
    assert len(lines) == 1, done.stdout
    return Path(lines[0].removeprefix("preflight of ")).parents[1]


def stopped(done):
    """The one sentence with which the cell ended."""
    assert done.returncode == 1
    assert "preflight of" not in done.stdout
    return done.stderr.splitlines()[-1].split("Stop: ", 1)[1]
