"""Take it away: base and adapter as one checkpoint that others load, or the adapter alone.

    base (8 shards)    adapter                       one shard in memory at a time
    +---+---+-- --+    +------+     read ─► + B A ─► write ─► read back, compare ─► next
    | 1 | 2 | ... | +  | 4 MB |       │                                               │
    +---+---+-- --+    +------+       └── free disk is checked before the first ──────┘
                                                   |
                  "safetensors"   model-00001-of-00007.safetensors ...   12.4 GB, head left out: it is the embedding
                  "published"     pytorch_model-00001-of-00008.bin ...   13.4 GB, cut as the published files are

The result grows under another name and gets its own when it is complete; config, tokenizer, index and a manifest of
sha256 sums go with it, so `verify_weights`, `load_model`, `from_pretrained` and AutoModel all take it.
"""

import errno
import json
import math
import shutil
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file
from torch import Tensor

from glmhelpers.lora.adapter_files import CONFIG, NOTE, TENSORS, AdapterFiles, read_adapter
from glmhelpers.lora.fingerprint import Weights, note_of
from glmhelpers.lora.merge import Correction, corrections
from glmhelpers.utils.files import alone, room_for, whole_file, whole_folder
from glmhelpers.utils.folders import expanded
from glmhelpers.utils.progress import TextProgress
from glmhelpers.weights.consistency import EMBEDDING, check_consistency
from glmhelpers.weights.layout import HEAD, published_shards, stored_bytes, tensor_shapes
from glmhelpers.weights.manifest import MANIFEST_NAME, facts_of, remember, sha256_of
from glmhelpers.weights.shards import INDEX_NAMES, Entry, list_shards, read_entries

LAYOUTS = ("safetensors", "published")
SMALL_FILES = ("config.json", "tokenizer_config.json", "ice_text.model")
BLOCK = 8 * 2**20
SPARE_BYTES = 64 * 10**6
"""Room for index, manifest and tokenizer, and some to spare."""
README = """\
# An adapter for ChatGLM-6B

    model = PeftModel.from_pretrained(base, "<this folder>")

`base` is the model it was trained on: course.json has its fingerprint and the prompt template. An adapter derives from
the base's weights, so their licence applies to it.
"""


class Source:
    """Every tensor of a checkpoint by name, read from its shard when it is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        headers = {path: read_entries(path) for path in list_shards(folder)}
        if problems := check_consistency(folder, {path.name: entries for path, entries in headers.items()}):
            raise ValueError("the base's files do not belong together:\n" + "\n".join(map(str, problems)))
        self.where: dict[str, tuple[Path, Entry]] = {
            name: (path, entry) for path, entries in headers.items() for name, entry in entries.items()
        }

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor as it is stored; a head that is not stored is the embedding, inv_freq is computed.

        Raises:
            ValueError: it is not there, or of another shape.
        """
        if name == HEAD and name not in self.where:
            name = EMBEDDING
        if name not in self.where:
            if name.endswith("inv_freq"):
                return 1.0 / 10000 ** (torch.arange(0, 2 * shape[0], 2).float() / (2 * shape[0]))
            raise ValueError(f"{self.folder} has no {name}: verify_weights says which file is wrong")
        path, entry = self.where[name]
        if entry.shape != tuple(shape):
            raise ValueError(f"{name} is {list(entry.shape)} in {path.name}, config.json makes it {list(shape)}")
        return read_tensor(path, entry)

    def weights(self, config: Any) -> Weights:
        """Every weight that a model would have, in its order, as `note_of` wants them."""
        for name, shape in tensor_shapes(config).items():
            if name in self.where and not name.endswith("inv_freq"):
                yield name, shape, partial(read_samples, *self.where[name])


def read_samples(path: Path, entry: Entry) -> Tensor:
    """Up to 64 numbers of a tensor of a shard, evenly spaced, without reading the rest of it."""
    count = math.prod(entry.shape)
    places = range(0, count, max(1, count // 64))[:64]
    with path.open("rb") as file:
        found = bytearray()
        for place in places:
            file.seek(entry.offset + place * entry.dtype.itemsize)
            found += file.read(entry.dtype.itemsize)
    return torch.frombuffer(found, dtype=entry.dtype)


def read_tensor(path: Path, entry: Entry) -> Tensor:
    """One tensor of a shard, in memory of its own.

    Raises:
        OSError: the file ends before it does.
    """
    with path.open("rb") as file:
        file.seek(entry.offset)
        block = bytearray(entry.nbytes)
        if (count := file.readinto(block)) != entry.nbytes:
            raise OSError(errno.EIO, f"{entry.nbytes} bytes were to be read at {entry.offset}, {count} came", str(path))
    return torch.frombuffer(block, dtype=entry.dtype).reshape(entry.shape)


def reads_back(path: Path, entry: Entry, tensor: Tensor) -> bool:
    """Whether a tensor of a shard is this one, bit by bit; reads some MB at a time."""
    if (entry.dtype, entry.shape) != (tensor.dtype, tuple(tensor.shape)):
        return False
    wanted = memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    with path.open("rb") as file:
        file.seek(entry.offset)
        for start in range(0, entry.nbytes, BLOCK):
            part = wanted[start : start + BLOCK]
            if file.read(len(part)) != part:
                return False
    return True


def export_merged(
    base: str | Path, adapter: str | Path, output: str | Path, layout: str = "safetensors", progress: bool = True
) -> Path:
    """Write base plus adapter as a checkpoint of its own; returns its folder.

    Everything is stored in float16, LayerNorms as the base has them (float32 in the published files). Needs memory for
    one shard, and for one matrix a few times in float32 (2.5 GB for ChatGLM-6B).

    Args:
        base: the checkpoint's folder, .bin or safetensors.
        adapter: a LoRA adapter, from notebook 04 or from anybody's peft.
        output: folder to make.
        layout: "safetensors", or "published" for eight .bin files with the published names.
        progress: print one line.

    Raises:
        FileNotFoundError: base or adapter is not complete.
        FileExistsError: there is something at `output`.
        OSError: errno EBUSY, another process is exporting to it.
        OSError: errno ENOSPC, the disk is too small; nothing has been written.
        ValueError: unknown layout, no plain LoRA adapter (a learnt prefix is no part of the weights), or one for
            another model.
        RuntimeError: a file does not read back as it was written, or a sum is not what it should be.
    """
    from thuglm import ChatGLMConfig

    base, adapter, output = map(expanded, (base, adapter, output))
    if layout not in LAYOUTS:
        raise ValueError(f"there is no layout {layout!r}: use {' or '.join(LAYOUTS)}")
    if output.exists() or output.is_symlink():
        raise FileExistsError(f"{output} is there already: delete it, or choose another folder")
    files = read_adapter(adapter)
    files.refuse_prefix()
    source, config = Source(base), ChatGLMConfig.from_pretrained(base)
    names = tensor_shapes(config)
    modules = {".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 1)}
    files.check_base(note_of(source.weights(config), config), modules)
    shards, added = plan_shards(config, layout, source), corrections(files)
    sizes = {name: sum(stored_bytes(*item) for item in shapes.items()) for name, shapes in shards.items()}
    check_space(output, sum(sizes.values()))
    bar = TextProgress(sum(sizes.values()), show=progress)
    with alone(output, wait=False, doing="exporting to"), whole_folder(output) as draft:
        for name, shapes in shards.items():
            bar.start(name, sizes[name])
            _write_shard(draft / name, shapes, source, added)
            bar.add(sizes[name])
            bar.finish()
        found = _write_the_rest(draft, base, files, list(shards), layout)
    remember(output, {name: facts_of(output / name, sha256) for name, sha256 in found.items()})
    return output


def plan_shards(config: Any, layout: str, source: Source | None = None) -> dict[str, dict[str, tuple[int, ...]]]:
    """File name -> names and shapes of its tensors.

    A base that already lies in .bin files keeps its own, with every tensor in its place; else they are cut as the
    published ones were.
    """
    shards = published_shards(config)
    if layout == "published":
        if source is not None and any(path.suffix == ".bin" for path, _ in source.where.values()):
            own: dict[str, dict[str, tuple[int, ...]]] = {}
            for name, (path, entry) in source.where.items():
                own.setdefault(path.name, {})[name] = entry.shape
            return own
        return {f"pytorch_model-{n:05d}-of-{len(shards):05d}.bin": shapes for n, shapes in enumerate(shards, start=1)}
    kept = [{n: s for n, s in shapes.items() if n != HEAD and not n.endswith("inv_freq")} for shapes in shards]
    kept = [shapes for shapes in kept if shapes]
    return {f"model-{n:05d}-of-{len(kept):05d}.safetensors": shapes for n, shapes in enumerate(kept, start=1)}


def check_space(output: Path, size: int) -> None:
    """Complain if `size` bytes do not fit beside what is there.

    Raises:
        OSError: errno ENOSPC.
    """
    folder = next(parent for parent in [output, *output.absolute().parents] if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < size + SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"the merged model needs {(size + SPARE_BYTES) / 1e9:.2f} GB in {folder}, {free / 1e9:.2f} GB are free. "
            "Kaggle: /kaggle/working holds 20 GB, base and merged model together have 26; write to /kaggle/temp, or "
            "export the adapter alone (export_adapter, some MB)",
        )


def _write_shard(path: Path, shapes: dict, source: Source, added: dict[str, Correction]) -> None:
    tensors = {}
    for name, shape in shapes.items():
        weight = source.read(name, shape)
        weight = weight if "layernorm" in name else weight.to(torch.float16)
        if name in added:
            merged = added[name].added_to(weight)
            if (error := added[name].largest_error(weight, merged)) > 1:
                raise RuntimeError(f"{name}: base plus adapter is {error:.1f} times further off than rounding explains")
            weight = merged
        tensors[name] = weight
    with room_for(path):
        if path.suffix == ".safetensors":
            save_file(tensors, path, metadata={"format": "pt"})
        else:
            torch.save(tensors, path)
    written = read_entries(path)
    for name, tensor in tensors.items():
        if not reads_back(path, written[name], tensor):
            raise RuntimeError(f"{path.name}: {name} does not read back as it was written; is the disk healthy?")


def _write_the_rest(draft: Path, base: Path, adapter: AdapterFiles, shards: list[str], layout: str) -> dict[str, str]:
    """Everything beside the shards; name -> sha256 of what the manifest lists."""
    for name in SMALL_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, draft / name)
    entries = {name: read_entries(draft / name) for name in shards}
    weight_map = {tensor: name for name, tensors in entries.items() for tensor in tensors}
    size = sum(entry.nbytes for tensors in entries.values() for entry in tensors.values())
    names = [*shards, *(["ice_text.model"] if (draft / "ice_text.model").is_file() else [])]
    found = {name: sha256_of(draft / name) for name in names}
    template = adapter.note["template"] if adapter.note else "unknown"
    contents = {
        INDEX_NAMES[LAYOUTS.index(layout)]: {"metadata": {"total_size": size}, "weight_map": weight_map},
        MANIFEST_NAME: {
            "model": f"{base.name} with the adapter {adapter.name} merged into it; prompt template: {template}",
            "mend": "export it again with export_merged",
            "files": {name: {"size": (draft / name).stat().st_size, "sha256": found[name]} for name in names},
        },
    }
    for name, content in contents.items():
        (draft / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return found


def export_adapter(folder: str | Path, archive: str | Path) -> Path:
    """Pack an adapter into a .zip that others can use: peft's two files, the note on its base, a short README.

    The name of the base is replaced: peft writes the path that it had on this machine.

    Args:
        folder: the adapter.
        archive: file to write, replaced whole if it is there.

    Raises:
        FileNotFoundError, ValueError: see `read_adapter`.
    """
    folder, archive = expanded(folder), expanded(archive)
    files = read_adapter(folder)
    config = dict(files.config)
    config["base_model_name_or_path"] = "chatglm-6b"
    with whole_file(archive) as unfinished, zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr(CONFIG, json.dumps(config, indent=2) + "\n")
        packed.writestr("README.md", README)
        packed.writestr(TENSORS, save(files.tensors, metadata={"format": "pt"}))
        if files.note is not None:
            packed.writestr(NOTE, json.dumps(files.note, indent=2, ensure_ascii=False) + "\n")
    return archive
