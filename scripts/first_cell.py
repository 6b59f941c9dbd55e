"""The first code cell, the same in every notebook: `first_cell.py --check` verifies it, `--write` sets it.

folder with thuglm/ and glmhelpers/ ?        packages of pyproject.toml
working folder, its parents,           ->    that this Python lacks       ->   runtime.preflight()
/content/*, /kaggle/working/*, ...           (never torch)                     [OK] / [FAIL] lines
"""

import argparse
import sys
from pathlib import Path

import nbformat

SOURCE = """\
# The same in every notebook: find the project, install what is missing (never torch), look at the machine.
import subprocess
import sys
import tomllib
from importlib import metadata, util
from pathlib import Path

clouds = ["content/*", "kaggle/working/*", "kaggle/input/*", "kaggle/input/*/*", "kaggle/input/*/*/*"]
places = [Path.cwd(), *Path.cwd().parents, *(place for cloud in clouds for place in Path("/").glob(cloud))]
project = next((p for p in places if (p / "thuglm").is_dir() and (p / "glmhelpers").is_dir()), None)
if project is None:
    raise FileNotFoundError("Get the project first: git clone <your fork's address>, and open its notebooks/")
sys.path.insert(0, str(project))
needs = tomllib.loads((project / "pyproject.toml").read_text())["project"]["dependencies"]
missing = [need for need in needs if util.find_spec(need.split(">=")[0]) is None and "jupyter" not in need]
if any(need.startswith("torch") for need in missing):
    raise ModuleNotFoundError("torch is missing: install the build for this machine, as pytorch.org says")
if missing:
    keep = f"torch=={metadata.version('torch')}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", keep, *missing], check=True)

from glmhelpers import runtime

machine = runtime.preflight()"""


def first_code_cell(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """The first code cell of a notebook, or None if it has no code."""
    return next((cell for cell in notebook.cells if cell.cell_type == "code"), None)


def main(argv: list[str] | None = None) -> int:
    """Check or set the first code cell of all notebooks in a folder; 1 if one differs and is not set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="name the notebooks whose first cell differs")
    what.add_argument("--write", action="store_true", help="set the first cell where it differs")
    parser.add_argument("--notebooks", type=Path, default=Path(__file__).resolve().parents[1] / "notebooks")
    args = parser.parse_args(argv)

    different = 0
    for path in sorted(args.notebooks.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        cell = first_code_cell(notebook)
        if cell is not None and cell.source == SOURCE:
            continue
        if args.check or cell is None:
            print(f"{path.name}: the first code cell is not the one in scripts/first_cell.py")
            different += 1
            continue
        cell.source, cell.outputs, cell.execution_count = SOURCE, [], None
        nbformat.write(notebook, path)
        print(f"{path.name}: first code cell set")
    if different:
        print("`python scripts/first_cell.py --write` sets it; a notebook without code needs a code cell first.")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
