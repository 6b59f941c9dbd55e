"""The list of what a checkpoint must consist of: name, size in bytes and sha256 of every file.

    weights_manifest.json
      "model"        what it is
      "huggingface"  {"repo_id", "revision"}      where it is published, if it is
      "modelscope"   {"model_id"}
      "files"        name -> {"size", "sha256"}
      "config", "tokenizer_config"                written beside the weights, so that the folder loads
      "mend"         what to do about a wrong file, if it is published nowhere

That of ChatGLM-6B v1.1 ships with the package. A folder that brings its own `weights_manifest.json` is checked
against that one.
"""

import json
import re
from pathlib import Path
from typing import Any

MANIFEST_NAME = "weights_manifest.json"
PUBLISHED = Path(__file__).resolve().parents[2] / "thuglm" / "published" / MANIFEST_NAME


def read_manifest(manifest: dict[str, Any] | str | Path | None = None, folder: Path | None = None) -> dict[str, Any]:
    """The manifest to check `folder` against.

    Args:
        manifest: the manifest itself, or the path of one; None: the folder's own if it has one, else the published.
        folder: the checkpoint's folder.

    Raises:
        FileNotFoundError: no manifest at that path.
        ValueError: it is not a manifest, or it names a file outside its folder.
    """
    if isinstance(manifest, dict):
        found, where = manifest, "the manifest"
    else:
        own = Path(folder) / MANIFEST_NAME if folder is not None else None
        path = Path(manifest) if manifest is not None else own if own and own.is_file() else PUBLISHED
        where = str(path)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{where} is not JSON ({error})") from error
    files = found.get("files") if isinstance(found, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError(f'{where} has no "files": it should map each file name to its size and sha256')
    for name, facts in files.items():
        # A name such as ../x would make the download write outside its folder.
        if not name or Path(name).name != name or name.startswith("."):
            raise ValueError(f"{where} names {name!r}: only plain file names are allowed")
        size, sha256 = (facts.get("size"), facts.get("sha256")) if isinstance(facts, dict) else (None, None)
        if not isinstance(size, int) or size < 0:
            raise ValueError(f"{where}: the size of {name} is {size!r}, not a number of bytes")
        if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise ValueError(f"{where}: the sha256 of {name} is {sha256!r}, not 64 hexadecimal digits")
    return found


def total_bytes(manifest: dict[str, Any]) -> int:
    """Bytes of all files together. The `total_size` of a published index is not used: it is wrong."""
    return sum(facts["size"] for facts in manifest["files"].values())


def mending_command(manifest: dict[str, Any], folder: Path, name: str) -> str:
    """The one command that puts a file right: the manifest's own, or a download where it is published, else git."""
    if "mend" in manifest:
        return manifest["mend"]
    if "huggingface" in manifest or "modelscope" in manifest:
        return f"download_weights({str(folder)!r})"
    return f"git checkout -- {(Path(folder) / name).as_posix()}"
