"""docs/full_size/: what a rehearsal at full size showed, for readers whose computer shows the toy.

    build/rehearsal/2_gpus/NN_name.ipynb   cells with a tag "full-size-NAME"  --+
                    1_gpus/...                                                  +--> docs/full_size/README.md
                    machine.json, table.md                                    --+                   NN_NAME_2_gpus.png

    python scripts/full_size_docs.py build/rehearsal      # after `make rehearsal`
    python scripts/full_size_docs.py --check              # every tag of a notebook on the page has its section, every
                                                          # link of any notebook its aim

A section has the text that the cell printed and its pictures, from each road on which it says something else. What a
road ran on the CPU, with the toy, is left out. Which machine gave the rest stands above. Notebooks link to their
sections: `../docs/full_size/README.md#NAME`.
"""

import argparse
import base64
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from PIL import Image

PROJECT = Path(__file__).resolve().parents[1]
PAGE = PROJECT / "docs" / "full_size" / "README.md"
TAG = "full-size-"
LINK = re.compile(r"docs/full_size/README\.md#([\w-]+)")
MOST_LINES, WIDEST = 40, 900


def tagged(notebook: NotebookNode) -> dict[str, NotebookNode]:
    """Section name -> the cell that bears its tag, in order."""
    found = {}
    for cell in notebook.cells:
        for tag in cell.metadata.get("tags", ()):
            if tag.startswith(TAG):
                found[tag.removeprefix(TAG)] = cell
    return found


def printed(cell: NotebookNode) -> str:
    """What a cell printed and showed as text; long output is cut in the middle, and says so."""
    pieces = []
    for output in cell.outputs:
        data = output.get("data", {})
        if output.output_type == "stream" and output.name == "stdout":
            pieces.append(output.text)
        elif "text/markdown" in data or ("text/plain" in data and "image/png" not in data):
            pieces.append(data.get("text/markdown", data.get("text/plain")) + "\n")
    lines = "".join(pieces).rstrip().splitlines()
    if len(lines) > MOST_LINES:
        left = len(lines) - MOST_LINES
        lines = [*lines[: MOST_LINES // 2], f"... {left} lines left out ...", *lines[-MOST_LINES // 2 :]]
    return "\n".join(line[:160] for line in lines)


def pictures(cell: NotebookNode) -> list[tuple[bytes, str]]:
    """(PNG no wider than `WIDEST` pixels, alternative text) of each picture of a cell."""
    found = []
    for output in cell.outputs:
        if "image/png" in output.get("data", {}):
            image = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
            image.thumbnail((WIDEST, 10 * WIDEST))
            small = io.BytesIO()
            image.quantize(128).save(small, "PNG", optimize=True)
            found.append((small.getvalue(), output.metadata.get("image/png", {}).get("alt", "")))
    return found


def section(name: str, cells: dict[str, NotebookNode], stem: str, page: Path) -> list[str]:
    """Lines of one section; its pictures are written beside the page.

    Args:
        name: after the tag's prefix; also the anchor.
        cells: road, such as "2 GPUs" -> the cell as it ran there.
        stem: of the notebook.
        page: the file that the lines are for.
    """
    lines = [f"### {name}", "", f"[notebooks/{stem}.ipynb](../../notebooks/{stem}.ipynb)", ""]
    said: list[str] = []
    for road, cell in cells.items():
        text, shown = printed(cell), pictures(cell)
        if text in said and not shown:
            continue
        said.append(text)
        lines += [f"**{road}**", ""]
        if text:
            is_table = text.startswith("|")
            lines += [text, ""] if is_table else ["```text", text, "```", ""]
        for number, (png, alt) in enumerate(shown):
            count = f"_{number + 1}" if len(shown) > 1 else ""
            picture = f"{stem[:2]}_{name}_{road.replace(' ', '_').lower()}{count}.png"
            (page.parent / picture).write_bytes(png)
            lines += [f"![{alt or name}]({picture})", ""]
    return lines


def write_page(folder: Path, page: Path = PAGE) -> None:
    """Make the page and its pictures from the output of `make rehearsal`.

    Raises:
        FileNotFoundError: there is no executed notebook in `folder`.
        ValueError: a cell with a tag failed or was not run, or no cell has one. Notebooks whose row in the table says
            that they failed are left out.
    """
    roads = sorted(folder.glob("[0-9]_gpus"), reverse=True)
    stems = sorted({path.stem for road in roads for path in road.glob("[0-9][0-9]_*.ipynb")})
    if not stems:
        raise FileNotFoundError(f"{folder} holds no executed notebook: `make rehearsal` makes them")
    machine: dict[str, Any] = json.loads((folder / "machine.json").read_text(encoding="utf-8"))
    lines = [
        "# What the course shows at full size",
        "",
        "On a laptop the notebooks show the tiny model. These are the same cells at the size of ChatGLM-6B (28 blocks,",
        "13.4 GB in eight shards), run by `make rehearsal` and copied here by `scripts/full_size_docs.py`.",
        "",
        f"The machine: {machine['text']}. No T4 was used: seconds are those of this machine, bytes are those of a T4",
        "but for the workspaces of its kernels. The weights are the tiny model's, grown to the full size",
        "([scripts/grow_checkpoint.py](../../scripts/grow_checkpoint.py)): it answers as the tiny model does.",
        "",
        "Plans are those for T4s. Cards many times as fast wait for Python when short rows are cut into so many parts,",
        "so two GPUs may train more slowly here than one. The host's peak counts the pages of the weights' files that",
        "were mapped, which the system takes back when it needs them.",
        "",
        "## The rehearsal",
        "",
        (folder / "table.md").read_text(encoding="utf-8").strip(),
        "",
    ]
    rows = [row for path in sorted(folder.glob("[0-9]_gpus.json")) for row in json.loads(path.read_text())]
    failed = {(row["gpus"], row["notebook"]) for row in rows if not row.get("ok", True)}
    toys = {(row["gpus"], row["notebook"]) for row in rows if not any(row.get("peak_bytes", [1]))}  # on the CPU
    kept = {
        path.stem for road in roads for path in road.glob("*.ipynb") if (int(road.name[0]), path.stem) not in failed
    }
    if missing := sorted({row["notebook"] for row in rows if row["notebook"][:1].isdigit()} - kept):
        lines += [f"What {', '.join(missing)} showed was not kept: the next rehearsal brings it.", ""]
    page.parent.mkdir(parents=True, exist_ok=True)
    for old in page.parent.glob("[0-9][0-9]_*.png"):
        old.unlink()
    count = 0
    for stem in stems:
        found: dict[str, dict[str, NotebookNode]] = {}
        for road in roads:
            path, gpus = road / f"{stem}.ipynb", int(road.name[0])
            if not path.is_file() or (gpus, stem) in failed | toys:
                continue
            for name, cell in tagged(nbformat.read(path, as_version=4)).items():
                if not cell.outputs or any(output.output_type == "error" for output in cell.outputs):
                    raise ValueError(
                        f"{path}: the cell of {TAG}{name} failed or showed nothing; run the rehearsal again"
                    )
                found.setdefault(name, {})[f"{gpus} GPU{'s' * (gpus != 1)}"] = cell
        if found:
            lines += [f"## {stem}", ""]
        for name, cells in found.items():
            lines += section(name, cells, stem, page)
            count += 1
    if not count:
        raise ValueError(f"no cell of the notebooks in {folder} has a tag {TAG}NAME")
    page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def faults(notebooks: Path, page: Path) -> list[str]:
    """What is missing between the notebooks and the page, in words."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    covered, there = (set(re.findall(rf"^{mark} ([\w-]+)$", text, re.MULTILINE)) for mark in ("##", "###"))
    found: list[str] = []
    for path in sorted(notebooks.rglob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        for name in tagged(notebook):
            if name not in there and (path.stem in covered or not covered):
                found.append(f"{path.name}: a cell is tagged {TAG}{name}, {page.name} has no such section")
        for cell in notebook.cells:
            for name in LINK.findall(cell.source) if cell.cell_type == "markdown" else ():
                if name not in there:
                    found.append(f"{path.name} links to #{name}, which {page.name} does not have")
    return found


def main() -> None:
    """Make the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=PROJECT / "build" / "rehearsal")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.check:
        wrong = faults(PROJECT / "notebooks", PAGE)
        print("\n".join(wrong))
        sys.exit(bool(wrong))
    write_page(options.folder)
    print(f"{PAGE} and {len(list(PAGE.parent.glob('*.png')))} pictures")


if __name__ == "__main__":
    main()
