"""What is in a shard, without reading a single weight.

    pytorch_model-00003-of-00008.bin                 model-00003-of-00008.safetensors
    +---------------------------------+              +---------------------------------+
    | zip                             |              | length | JSON: name -> dtype,   |
    |   data.pkl   name -> shape, key |              |        |       shape, from, to  |
    |   data/0     raw bytes          |              | raw bytes                       |
    |   data/1     raw bytes  ...     |              | raw bytes ...                   |
    +---------------------------------+              +---------------------------------+
                    |                                                 |
                    +------> {name: Entry(dtype, shape, offset)} <----+

Both formats keep each tensor as one plain run of bytes, so whoever knows the offset can read it straight to where it
is needed. `.bin` files are opened with `weights_only=True`: a pickle can run code, this way it cannot.
"""

import json
import math
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glmhelpers.utils.files import read_json
from glmhelpers.utils.folders import expanded

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SHARD_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")


class ShardError(ValueError):
    """A file that is no readable shard; the message names it and says why."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a shard: where its bytes are, and what they mean.

    Attributes:
        offset: first byte in the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def list_shards(folder: Path) -> list[Path]:
    """The shards of a checkpoint folder in order; safetensors where there are both kinds.

    Raises:
        FileNotFoundError: there is none, or the index names one that is not there.
    """
    folder = expanded(folder)
    for index_name, pattern in zip(INDEX_NAMES, SHARD_PATTERNS, strict=True):
        if (folder / index_name).is_file():
            names = sorted(set(read_index(folder / index_name).values()))
            if missing := [name for name in names if not (folder / name).is_file()]:
                raise FileNotFoundError(f"{folder / missing[0]} is missing, {index_name} names it")
            return [folder / name for name in names]
        if found := sorted(folder.glob(pattern)):
            return found
    what = f"neither {' nor '.join(SHARD_PATTERNS)}{snapshot_hint(folder)}"
    if not folder.is_dir():
        what = "it is a file, the folder that holds it is wanted" if folder.exists() else "there is no such folder"
    raise FileNotFoundError(f"no shard in {folder}: {what}; download_weights(folder) brings the published ones")


def snapshot_hint(folder: Path) -> str:
    """For messages: where the files lie, if `folder` is one of the hub's cache; "" if it is none."""
    roots = ("", "models--*/", "hub/models--*/")
    found = [path.parent for root in roots for path in sorted(folder.glob(f"{root}snapshots/*/config.json"))]
    if not found:
        return ""
    return f"; it is a folder of the Hugging Face cache, whose files lie deeper: give {found[-1].as_posix()!r}"


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard name, from an index file. Its `total_size` is not used: the published one is wrong.

    Raises:
        ShardError: it is no such file, or names something outside its folder.
    """
    try:
        weight_map = dict(read_json(path)["weight_map"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{path} is not an index of shards ({type(error).__name__}: {error})") from error
    if not weight_map:
        raise ShardError(f"{path} names no shard: fetch it again, or take it away where the shards are all there")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ShardError(f"{path} names {name!r}: a shard must lie beside its index")
    return weight_map


def make_index(paths: Iterable[Path]) -> dict[str, Any]:
    """The content of an index file for these shards."""
    entries = {path.name: read_entries(path) for path in paths}
    size = sum(entry.nbytes for tensors in entries.values() for entry in tensors.values())
    weight_map = {tensor: name for name, tensors in entries.items() for tensor in tensors}
    return {"metadata": {"total_size": size}, "weight_map": weight_map}


def read_entries(path: Path) -> dict[str, Entry]:
    """Every tensor of a shard, in the order of the file; reads a few kilobytes.

    Raises:
        ShardError: the file is cut off, is no shard, or stores its tensors in a way that no published one does.
    """
    path = expanded(path)
    size = path.stat().st_size
    try:
        entries = _of_safetensors(path) if path.suffix == ".safetensors" else _of_bin(path)
    except Exception as error:  # torch, zipfile and pickle each have their own ways to say "not mine"
        raise ShardError(f"{path} cannot be read as a shard ({type(error).__name__}: {error})") from error
    for name, entry in entries.items():
        if entry.offset < 0 or entry.offset + entry.nbytes > size:
            raise ShardError(f"{path} ends before {name}: bytes up to {entry.offset + entry.nbytes}, has {size}")
    return dict(sorted(entries.items(), key=lambda item: item[1].offset))


def _of_safetensors(path: Path) -> dict[str, Entry]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(100_000_000, path.stat().st_size):
            raise ValueError(f"its header claims {length} bytes")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    entries = {}
    for name, facts in header.items():
        begin, end = facts["data_offsets"]
        entry = Entry(SAFETENSORS_DTYPES[facts["dtype"]], tuple(facts["shape"]), 8 + length + begin)
        if entry.nbytes != end - begin:
            raise ValueError(f"{name} has {end - begin} bytes, its shape wants {entry.nbytes}")
        entries[name] = entry
    return entries


def _of_bin(path: Path) -> dict[str, Entry]:
    # The tensors are views of the mapped file, so their addresses are offsets once the address of byte 0 is known:
    # the zip directory says where the storages lie, and both lists must agree in every one.
    tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    addresses = sorted({tensor.untyped_storage().data_ptr() for tensor in tensors.values()})
    offsets = _storage_offsets(path)
    base = addresses[0] - offsets[0] if addresses and offsets else 0
    if [address - base for address in addresses] != offsets:
        raise ValueError(f"{len(offsets)} stored blocks for {len(addresses)} tensors")
    entries = {}
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not stored in one piece")
        entries[name] = Entry(tensor.dtype, tuple(tensor.shape), tensor.data_ptr() - base)
    return entries


def _storage_offsets(path: Path) -> list[int]:
    offsets = []
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            if info.filename.split("/")[-2:-1] != ["data"] or not info.file_size:
                continue
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{info.filename} is compressed")
            # A local header has 30 bytes, then name and extra field; their lengths stand at its end (APPNOTE 4.3.7).
            file.seek(info.header_offset + 26)
            offsets.append(info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))))
    return sorted(offsets)
