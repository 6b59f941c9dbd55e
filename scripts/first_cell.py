"""The first code cell, the same in every notebook: `first_cell.py --check` verifies it, `--write` sets it.

folder with thuglm/ and glmhelpers/ ?        packages of pyproject.toml
working folder, its parents,           ->    that are missing here, or    ->   runtime.preflight()
/content/*, /kaggle/working/*, ...           older than their lower bound      [OK] / [FAIL] lines
else `git clone` of FORK                     (never torch, never a downgrade)
"""

import argparse
import sys
from pathlib import Path

import nbformat

SOURCE = """\
# The same in every notebook: find the project, install what is missing or too old (never torch), look.
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.version import Version

FORK = ""  # the address of your fork; it is cloned if the project is not on this machine yet
root, clouds = Path("/"), ["content/*", "kaggle/working/*", *("kaggle/input" + "/*" * n for n in (1, 2, 3))]
places = [Path.cwd(), Path.cwd() / "course", *Path.cwd().parents, *(p for c in clouds for p in root.glob(c))]
project = next((p for p in places if (p / "thuglm").is_dir() and (p / "glmhelpers").is_dir()), None)
if project is None and not FORK:
    raise FileNotFoundError("The project is not here: write your fork's address into FORK above, run this again")
if project is None:
    project = next(p for p in (root / "kaggle/working", root / "content", Path.cwd()) if p.is_dir()) / "course"
    subprocess.run(["git", "clone", "--depth", "1", "--", FORK, str(project)], check=True)
sys.path.insert(0, str(project))
torch_is = metadata.version("torch")  # an error here: install the build for this machine, as pytorch.org says
needs = tomllib.loads((project / "pyproject.toml").read_text())["project"]["dependencies"]
least = {need: need.split(",")[0].split(">=") for need in needs if not need.startswith(("torch>", "jupyter"))}
have = {need: next(metadata.distributions(name=name), None) for need, (name, _) in least.items()}
old = [need for need in least if not have[need] or Version(have[need].version) < Version(least[need][1])]
if old:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"torch=={torch_is}", *old], check=True)
assert not any(least[need][0] in sys.modules for need in old), "Restart the kernel (new packages), run again"
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
