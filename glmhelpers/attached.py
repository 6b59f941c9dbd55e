"""Weights and adapter of an earlier notebook: this session's own, else attached, else on a Drive.

every notebook is a session of its own       find_real_weights()       find_adapter()
01 --- saved output, attached again ------>  thuglm/                   GLM_OUTPUT/adapter
04 --- saved output, or GLM_OUTPUT on a ->   then folders.cloud_tops()      then the same
       Drive                                 complete before incomplete, nearest first
"""

from collections.abc import Callable, Sequence
from os.path import isfile  # Path.is_file raises where a mount is broken
from pathlib import Path

from glmhelpers.utils import folders
from glmhelpers.utils.environment import find_project, output_folder, short
from glmhelpers.utils.folders import cloud_tops, expanded, find_folders
from glmhelpers.weights.manifest import read_manifest, total_bytes
from glmhelpers.weights.shards import INDEX_NAMES

REAL_BYTES = 12 * 10**9
"""A checkpoint with fewer bytes is not the 6B model: with tied head it has 12.35 GB."""

TOKENIZER = "ice_text.model"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def find_real_weights(
    project: Path | None = None, root: Path | None = None, say: Callable[[str], None] | None = None
) -> Path | None:
    """Folder with all real weights, by name and size, and the files to load them; None if there is none.

    Looked at are thuglm/ and what Kaggle, Colab or a mounted Drive has. A folder with a manifest of its own counts
    too, if it holds as many bytes (the weights as safetensors).

    Args:
        project: the project's folder; looked for if None.
        root: where a cloud's folders lie, see `glmhelpers.utils.folders`.
        say: gets one sentence: which were taken, from where, and what else was found.
    """
    own = (project or find_project()) / "thuglm"
    places = {own.resolve(): own} | {place.resolve(): place for place in find_folders(TOKENIZER, cloud_tops(root))}
    lacks = {place: lack for place in places.values() if (lack := _lacks(place)) is not None}
    complete = [place for place, lack in lacks.items() if not lack]
    if say and complete:
        say(f"weights: {_choice(complete, [*lacks], root)}")
    elif say and lacks:
        nearest, lack = next(iter(lacks.items()))
        say(f"weights: {_road(nearest, root)}, but incomplete: {', '.join(lack[:3])} missing or of a wrong size")
    return complete[0] if complete else None


def _lacks(folder: Path) -> list[str] | None:
    """What the real weights in `folder` lack; None if not even one of them is there, or it is another checkpoint."""
    try:
        manifest = read_manifest(None, folder)
        files = {name: facts["size"] for name, facts in manifest["files"].items()}
        here = {name: path.stat().st_size for name in files if (path := folder / name).is_file()}
    except (ValueError, OSError):  # somebody else's file of that name; a mount that broke
        return None
    if total_bytes(manifest) < REAL_BYTES or not here.keys() - {TOKENIZER}:
        return None
    lack = [name for name, size in files.items() if here.get(name) != size]
    lack += [] if isfile(folder / "config.json") else ["config.json"]
    return lack if any(isfile(folder / name) for name in INDEX_NAMES) else [*lack, INDEX_NAMES[1]]


def find_adapter(adapter: str | Path = "auto", output: Path | None = None, root: Path | None = None) -> Path:
    """The adapter's folder; prints one sentence that says which was taken.

    Args:
        adapter: a folder, or "auto": `output`/adapter, else the nearest complete one that is attached or on a Drive.
        output: the folder of what the notebooks make; `output_folder()` if None.
        root: where a cloud's folders lie, see `glmhelpers.utils.folders`.

    Raises:
        FileNotFoundError: there is none, or not all of it.
    """
    if adapter != "auto":
        found = [expanded(adapter)]
    else:
        places = [(output or output_folder()) / "adapter", *find_folders(ADAPTER_FILES[0], cloud_tops(root))]
        found = list({place.resolve(): place for place in places if isfile(place / ADAPTER_FILES[0])}.values())
    complete = [place for place in found if all(isfile(place / name) for name in ADAPTER_FILES)]
    if not complete:
        where = f"no complete adapter in {short(found[0])}" if found else "no adapter in the outputs, nor attached"
        raise FileNotFoundError(
            f"{where} ({' and '.join(ADAPTER_FILES)}): run notebook 04 here, or attach its output (Kaggle: Add input), "
            "or give the folder as ADAPTER"
        )
    print(f"adapter: {_choice(complete, found, root)}")
    return complete[0]


def _choice(complete: Sequence[Path], found: Sequence[Path], root: Path | None) -> str:
    others = [
        f"{short(place)}{'' if place in complete else ' (incomplete)'}" for place in found if place != complete[0]
    ]
    more = f" and {len(others) - 2} more" if len(others) > 2 else ""
    also = f"; not taken: {', '.join(others[:2])}{more}" if others else ""
    return f"{_road(complete[0], root)}{also}"


def _road(place: Path, root: Path | None) -> str:
    top = root or folders.ROOT
    if place.is_relative_to(top / "kaggle" / "input"):
        return f"from the attached input {place}"
    if place.is_relative_to(top / "content" / "drive"):
        return f"from Drive, {place}"
    return f"from this machine, {short(place)}"
