"""Make an executed notebook fit for committing: the same run on another day or machine gives the same file.

    executed notebook                                cleaned notebook
    +------------------------------------------+     +---------------------------------------+
    | kernel details, timestamps, widget state | ->  | kernel name, and the GPU to ask for   |
    | random cell ids                          | ->  | ids from the cell's own text          |
    | /absolute/path/data, 0x7f3a..., /tmp/.. | ->  | ./data, 0x..., no names of this machine |
    | commit 1a2b3c4 of 2026-01-02             | ->  | commit ... of ...                     |
    | PNG with the name of its software        | ->  | PNG with pixels only                  |
    | a widget that needs a live kernel        | ->  | its picture, or a line that says so   |
    +------------------------------------------+     +---------------------------------------+

`keep_committed` then drops what is left of the noise: where only durations differ, the committed output stays.
"""

import base64
import hashlib
import json
import re
import struct
import sys
import tempfile
from pathlib import Path

from nbformat import NotebookNode

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_LINE = "[interactive: run this cell in a live notebook to use the controls]"
TEXT_TYPES = ("text/plain", "text/html", "text/markdown", "image/svg+xml")
# The machine that a notebook asks a cloud for (scripts/badges.py); whatever else a cloud writes there goes.
CLOUD_METADATA = {
    "accelerator": (),
    "colab": ("gpuType",),
    "kaggle": ("accelerator", "isGpuEnabled", "isInternetEnabled"),
}

# A PNG's 8-byte signature is followed by chunks: length (4 bytes), type (4), data, checksum (4).
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"tIME")

DURATION = re.compile(
    r"\d+(?:\.\d+)?(?= ?(?:s|ms|us|µs|min|h|seconds?|minutes?|hours?|it/s|s/it|tokens/s|rows/s|MB/s|GB/s|GiB free)\b)"
    r"|\b\d+:\d\d(?::\d\d)?\b"
    # A line of the memory monitor: bar and numbers of this moment.
    r"|[#.]{20}  allocated[ \d.]+reserved[ \d.]+free[ \d.]+of [\d.]+ GiB  highest[ \d.]+"
)


def clean(notebook: NotebookNode, project: Path, output: Path) -> None:
    """Remove from an executed notebook, in place, what belongs to one run or one machine.

    Args:
        notebook: version 4 notebook.
        project: absolute path of the project; shown as `.` afterwards.
        output: absolute path of the folder that the run wrote into; shown as `outputs`.
    """
    before = notebook.metadata
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    for key, fields in CLOUD_METADATA.items():
        if key in before:
            asked = before[key]
            notebook.metadata[key] = {name: asked[name] for name in fields if name in asked} if fields else asked
    notebook.nbformat_minor = max(5, notebook.nbformat_minor)  # cell ids exist since 4.5
    set_ids(notebook)
    for cell in notebook.cells:
        cell.metadata = NotebookNode({key: cell.metadata[key] for key in ("tags",) if key in cell.metadata})
        if cell.cell_type == "code":
            cell.outputs = [result for result in cell.outputs if not _is_progress_bar(result)]
            for result in cell.outputs:
                _clean_output(result, project, output)


def keep_committed(fresh: NotebookNode, committed: NotebookNode) -> None:
    """Put committed outputs back, in place, into cells of `fresh` whose outputs differ in durations only.

    Cells are matched by id, so both notebooks must have been through `clean`. Predicted durations look like measured
    ones: after a change of the time model, run with `--fresh`.
    """
    before = {cell.id: cell for cell in committed.cells}
    for cell in fresh.cells:
        old = before.get(cell.id)
        same_cell = old is not None and cell.cell_type == "code" and old.source == cell.source
        if same_cell and _without_durations(old.outputs) == _without_durations(cell.outputs):
            cell.outputs = old.outputs


def normalise_text(text: str, project: Path, output: Path) -> str:
    """Replace absolute paths, temporary names, object addresses and the project's commit in printed text."""
    names = [(str(output), "outputs"), (str(project), "."), (sys.prefix, ".venv"), (str(Path.home()), "~")]
    if output.is_relative_to(project):
        names.insert(1, (str(output.relative_to(project)), "outputs"))
    for name, short in names:
        text = re.sub(rf"(?<![\w.~-]){re.escape(name)}(?![\w-])", short, text)
    temporary = re.escape(tempfile.gettempdir())
    text = re.sub(rf"{temporary}/ipykernel_\d+/\d+\.py", "<cell>", text)
    text = re.sub(rf"{temporary}/tmp\w+", "/tmp/tmp", text)
    text = re.sub(r"commit [0-9a-f]{7,40} of \d{4}-\d\d-\d\d(, with changes of your own)?", "commit ... of ...", text)
    return re.sub(r"\b0x[0-9a-f]{8,16}\b", "0x...", text)


def strip_png(data: bytes) -> bytes:
    """A PNG without its text and time chunks (matplotlib writes its version and address there)."""
    if not data.startswith(PNG_SIGNATURE):
        return data
    kept, at = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while at + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        end = at + 12 + length
        if kind not in PNG_TEXT_CHUNKS:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def set_ids(notebook: NotebookNode) -> None:
    """Give every cell, in place, the id that follows from its kind and its text."""
    taken: set[str] = set()
    for cell in notebook.cells:
        cell.id = _stable_id(cell, taken)


def _stable_id(cell: NotebookNode, taken: set[str]) -> str:
    digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
    number, name = 1, digest
    while name in taken:
        number += 1
        name = f"{digest}-{number}"
    taken.add(name)
    return name


def _is_progress_bar(result: NotebookNode) -> bool:
    data = result.get("data", {})
    return WIDGET_VIEW in data and re.search(r"\d+%\|", data.get("text/plain", "")) is not None


def _clean_output(result: NotebookNode, project: Path, output: Path) -> None:
    if result.output_type == "stream":
        result.text = normalise_text(result.text, project, output)
        return
    if result.output_type == "error":
        result.traceback = [normalise_text(line, project, output) for line in result.traceback]
        return
    data = result.data
    if WIDGET_VIEW in data:
        # Its picture for pages without a kernel stays, if it has one.
        kept = {kind: data[kind] for kind in ("image/svg+xml",) if kind in data}
        data = result.data = NotebookNode({"text/plain": WIDGET_LINE, **kept})
    for kind in TEXT_TYPES:
        if kind in data:
            data[kind] = normalise_text(data[kind], project, output)
    if "image/png" in data:
        data["image/png"] = base64.b64encode(strip_png(base64.b64decode(data["image/png"]))).decode()


def _without_durations(outputs: list[NotebookNode]) -> list[str]:
    return [DURATION.sub("#", json.dumps(result, sort_keys=True, ensure_ascii=False)) for result in outputs]
