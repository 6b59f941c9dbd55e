"""Badges that open each notebook in Colab and Kaggle, and the machine that it asks those clouds for.

    CITATION.cff: repository-code  --+--> second block of the first text cell: [Open in Colab] [Open in Kaggle]
    the notebook's path            --+
    the notebook's name  -> metadata: Colab `accelerator`; Kaggle `accelerator`, `isGpuEnabled`, `isInternetEnabled`

    python scripts/badges.py --check     # the notebooks whose badges or metadata are others
    python scripts/badges.py --write     # set them; a fork's address goes into CITATION.cff first

The badges are HTML without a word between the tags: nothing for the Chinese edition to translate, which leads them to
its own files. Both clouds open this way what lies on GitHub, and the file alone: its first cell fetches the rest.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from clean_notebook import set_ids
from nbformat import NotebookNode

PROJECT = Path(__file__).resolve().parents[1]
BRANCH = "main"
CLOUDS = {  # name -> picture, and what stands before the notebook's place on GitHub
    "Colab": (
        "https://colab.research.google.com/assets/colab-badge.svg",
        "https://colab.research.google.com/github/{place}",
    ),
    "Kaggle": (
        "https://kaggle.com/static/images/open-in-kaggle.svg",
        "https://kaggle.com/kernels/welcome?src=https://github.com/{place}",
    ),
}
BADGES = re.compile(r'\n\n<a href="https://colab\.[^\n]*</a>(?=\n\n|\Z)')
# They show the tiny model alone, or no model: a session with a GPU would only spend a learner's hours.
WITHOUT_GPU = ("02", "A", "B", "C", "D", "F", "solutions")


def address(project: Path = PROJECT) -> str:
    """OWNER/NAME on GitHub, from CITATION.cff.

    Raises:
        ValueError: it has no such address.
    """
    text = (project / "CITATION.cff").read_text(encoding="utf-8")
    found = re.search(r"^repository-code: *[\"']?https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?[\"']?$", text, re.M)
    if not found:
        raise ValueError(f"{project / 'CITATION.cff'}: no line 'repository-code: https://github.com/OWNER/NAME'")
    return found[1]


def badges(where: str, repository: str) -> str:
    """The badges of the notebook at path `where`, relative to the project, of the repository OWNER/NAME."""
    place = f"{repository}/blob/{BRANCH}/{where}"
    return " ".join(
        f'<a href="{link.format(place=place)}"><img src="{picture}" alt="Open in {cloud}"></a>'
        for cloud, (picture, link) in CLOUDS.items()
    )


def put(notebook: NotebookNode, where: str, repository: str) -> None:
    """Give a notebook, in place, its badges behind the title, and its metadata.

    Raises:
        ValueError: the first cell is not a text that starts with a title.
    """
    first = notebook.cells[0]
    title, _, rest = BADGES.sub("", first.source).partition("\n")
    if first.cell_type != "markdown" or not title.startswith("# "):
        raise ValueError(f"{where}: the first cell must be a text that starts with '# ' and a title")
    first.source = "\n\n".join(filter(None, [title, badges(where, repository), rest.lstrip("\n")]))
    set_ids(notebook)
    gpu = Path(where).stem.split("_")[0] not in WITHOUT_GPU
    for key in ("accelerator", "colab", "kaggle"):
        notebook.metadata.pop(key, None)
    if gpu:
        notebook.metadata |= {"accelerator": "GPU", "colab": {"gpuType": "T4"}}
    kaggle = {"accelerator": "nvidiaTeslaT4" if gpu else "none", "isGpuEnabled": gpu, "isInternetEnabled": True}
    notebook.metadata["kaggle"] = kaggle


def main(argv: Sequence[str] | None = None, project: Path = PROJECT) -> int:
    """Check or set badges and metadata of all notebooks; 1 if one differs and is not set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="name the notebooks whose badges or metadata differ")
    what.add_argument("--write", action="store_true", help="set them where they differ")
    args = parser.parse_args(argv)
    repository, different = address(project), 0
    folder = project / "notebooks"
    for path in sorted([*folder.glob("*.ipynb"), *folder.glob("appendix/*.ipynb")]):
        before = path.read_text(encoding="utf-8")
        notebook = nbformat.reads(before, as_version=4)
        put(notebook, path.relative_to(project).as_posix(), repository)
        after = nbformat.writes(notebook).rstrip("\n") + "\n"
        if after == before:
            continue
        different += 1
        print(f"{path.name}: badges or metadata {'set' if args.write else 'differ'}")
        if args.write:
            path.write_text(after, encoding="utf-8")
    if different and args.check:
        print("`python scripts/badges.py --write` sets them.")
    return 1 if different and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
