"""The same weights as safetensors, one shard at a time.

    pytorch_model-00001-of-00008.bin  -->  model-00001-of-00008.safetensors     compared tensor by tensor,
    pytorch_model-00002-of-00008.bin  -->  model-00002-of-00008.safetensors     then (replace=True) the .bin goes
    ...
    pytorch_model-00008-of-00008.bin       nothing: it holds only lm_head, which is the embedding

Why: the format holds no code, its header says where each tensor is, and other programs read it directly. It is smaller
by the stored head (1.07 GB). Loading is not faster with `load_model`, which reads both formats alike.
"""

import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from glmhelpers.utils.files import alone, clear_leftovers, make_writable, need_disk, room_for, whole_file, write_json
from glmhelpers.utils.folders import expanded
from glmhelpers.utils.progress import TextProgress
from glmhelpers.weights.layout import HEAD
from glmhelpers.weights.manifest import MANIFEST_NAME, read_facts, read_manifest, remember
from glmhelpers.weights.shards import INDEX_NAMES, make_index, read_entries

SPARE_BYTES = 4 * 2**20
"""Disk beside the tensors: headers, index, manifest and tokenizer."""
SMALL_FILES = ("config.json", "tokenizer_config.json", "ice_text.model")


def convert_to_safetensors(
    folder: str | Path, output: str | Path | None = None, replace: bool = False, progress: bool = True
) -> Path:
    """Write a checkpoint of `.bin` shards as safetensors with index and manifest.

    Args:
        folder: the checkpoint.
        output: where the copy goes, with config and tokenizer; None: the same folder.
        replace: delete each `.bin` as soon as its copy has been compared: needs disk for one shard only (Kaggle).
        progress: print one line.

    Returns:
        the folder of the copy; it loads with `load_model` and `from_pretrained`, and `verify_weights` checks it.

    Raises:
        FileNotFoundError: there are no `.bin` shards.
        OSError: errno ENOSPC, the disk is too small; nothing has been written. EBUSY, another process is converting
            to this folder. Others: the output cannot be written, such as FileExistsError where it is a file.
        RuntimeError: a copy differs from its original.
    """
    folder = expanded(folder)
    output = expanded(output) if output else folder
    with alone(output, wait=False, doing="converting to"):
        return _convert_all(folder, output, replace, progress)


def _convert_all(folder: Path, output: Path, replace: bool, progress: bool) -> Path:
    shards = sorted(folder.glob("pytorch_model*.bin"))
    done = {path.name for path in output.glob("model*.safetensors")}
    _check_complete(folder, shards, done)
    kept = {path: [name for name in read_entries(path) if _is_wanted(name)] for path in shards}
    sizes = {path: sum(read_entries(path)[name].nbytes for name in names) for path, names in kept.items() if names}
    to_do = {path: size for path, size in sizes.items() if _target_name(path) not in done}
    make_writable(output, ", nothing was converted: give another folder as output")
    for path in to_do:  # of a call that was killed: up to 2 GB that nobody would look for
        clear_leftovers(output, _target_name(path), ".tmp")
    need = (max(to_do.values(), default=0) if replace else sum(to_do.values())) + SPARE_BYTES
    hint = "" if replace else ", or replace=True, which needs room for one shard"
    need_disk(output, need, "", f": choose another output{hint}")
    bar = TextProgress(sum(sizes.values()), sum(sizes.values()) - sum(to_do.values()), show=progress)
    for path, size in to_do.items():
        bar.start(_target_name(path), size)
        _convert(path, kept[path], output / _target_name(path))
        bar.add(size)
        bar.finish()
        if replace:
            path.unlink()
    _write_index_and_manifest(folder, output, replace)
    if replace:
        for path in [*folder.glob("pytorch_model*.bin"), folder / "pytorch_model.bin.index.json"]:
            path.unlink(missing_ok=True)
    return output


def _is_wanted(name: str) -> bool:
    return name != HEAD and not name.endswith(".rotary_emb.inv_freq")


def _target_name(path: Path) -> str:
    return f"{path.stem.removeprefix('pytorch_')}.safetensors"


def _check_complete(folder: Path, shards: list[Path], done: set[str]) -> None:
    """Every shard number is there in one of the two formats, also when an earlier call was interrupted."""
    if not shards:
        what = "has no .bin shards" if folder.is_dir() else "is no folder, so it has no .bin shards"
        raise FileNotFoundError(f"{folder} {what}: there is nothing to convert; give the folder that holds them")
    there = {_target_name(path) for path in shards} | done
    if match := re.fullmatch(r"model-\d+-of-(\d+)\.safetensors", _target_name(shards[0])):
        for number in range(1, int(match[1]) + 1):
            if (name := f"model-{number:05d}-of-{match[1]}.safetensors") not in there:
                raise FileNotFoundError(f"{folder} has neither {name} nor its .bin: verify_weights says what to do")


def _convert(path: Path, names: list[str], target: Path) -> None:
    tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    with whole_file(target) as unfinished:
        with room_for(unfinished):
            save_file({name: tensors[name] for name in names}, unfinished, metadata={"format": "pt"})
        with safe_open(unfinished, framework="pt") as copy:
            for name in names:
                if not torch.equal(copy.get_tensor(name), tensors[name]):
                    raise RuntimeError(
                        f"{target.name}: the copy of {name} differs from {path.name}; it was thrown away"
                    )


def _write_index_and_manifest(folder: Path, output: Path, replace: bool) -> None:
    for name in SMALL_FILES:
        if (folder / name).is_file() and not (output / name).exists():
            shutil.copyfile(folder / name, output / name)  # with the permissions of a new file
    shards = sorted(output.glob("model*.safetensors"))
    facts = {path.name: read_facts(path) for path in [*shards, output / "ice_text.model"] if path.is_file()}
    remember(output, facts)
    files = {name: {"size": found[0], "sha256": found[-1]} for name, found in facts.items()}
    own = output / MANIFEST_NAME
    known = read_manifest(own)["files"] if own.is_file() and not replace else {}
    manifest = {
        "model": f"converted from {folder.name}",
        "mend": "download_weights of another folder, then convert_to_safetensors of that one",
        "files": known | files,
    }
    write_json(output / INDEX_NAMES[0], make_index(shards))
    write_json(own, manifest)
