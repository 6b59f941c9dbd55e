"""Load a checkpoint shard by shard, each tensor straight to its device.

    build on "meta"        shapes without memory: free
    headers of all shards  do the files belong together? is every parameter there?   -> before a weight is copied
    for each shard         blocks of 16 MiB: file -> device, at the final dtype
    tie                    lm_head is word_embeddings (the stored lm_head, 1.07 GB, is not even read)
    check                  device, dtype, no meta tensor left                         -> first offender named

              host   16 MiB x 4          GPU 0   embedding, blocks 0-15        GPU 1   blocks 16-27, norm, head
    shard 1   [#]                        [####                        ]        [                              ]
    shard 8   [#]                        [############################]        [##############################]

`ChatGLMForConditionalGeneration.from_pretrained` gives the same model, and on a CPU it is faster, since it maps the
files and reads a page when it is first used (benchmarks/load.py). This one refuses files that do not belong together
before it copies anything, says where the time goes, and maps nothing: 12.7 GiB of RAM (Colab) leave no room for the
12.5 GiB of the shards beside Python, so "load, then move" is no way there.
"""

import time
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from glmhelpers.devicemap.check import Placement, check_filled, check_placement, device_of
from glmhelpers.utils.folders import expanded
from glmhelpers.utils.types import Model
from glmhelpers.utils.units import GIB, file_size, memory_size
from glmhelpers.weights.consistency import EMBEDDING, check_consistency
from glmhelpers.weights.layout import HEAD, part_of
from glmhelpers.weights.reading import BlockReader
from glmhelpers.weights.shards import Entry, list_shards, read_entries


@dataclass(frozen=True)
class ShardTime:
    """One shard: what was read of it, how long it took, and the memory in use afterwards (bytes)."""

    name: str
    read_bytes: int
    seconds: float
    host_bytes: int
    gpu_bytes: dict[int, int]

    @property
    def speed(self) -> float:
        """Bytes a second."""
        return self.read_bytes / max(self.seconds, 1e-9)


@dataclass
class LoadReport:
    """How a model was loaded: `model.load_report`.

    Attributes:
        shards: one entry for each shard, in order.
        host_before: resident bytes of the process before the first shard.
        seconds: from the call to the checked model.
        tensors: parameters and buffers that were checked.
    """

    host_before: int
    shards: list[ShardTime] = field(default_factory=list)
    seconds: float = 0.0
    tensors: int = 0

    @property
    def read_bytes(self) -> int:
        """Bytes read from all shards."""
        return sum(shard.read_bytes for shard in self.shards)

    def memory_line(self, shard: ShardTime) -> str:
        """Seconds, MB/s and memory after one shard, as one line of text."""
        gpus = "".join(f" | cuda:{index} {memory_size(used)}" for index, used in shard.gpu_bytes.items())
        read = f"{file_size(shard.read_bytes):>9} {shard.seconds:6.2f} s {shard.speed / 1e6:6.0f} MB/s"
        if not shard.read_bytes:
            read = "not read: its head is the embedding"
        more = (shard.host_bytes - self.host_before) / GIB
        return f"{shard.name} {read:>35} | host {shard.host_bytes / GIB:.2f} GiB ({more:+.2f}){gpus}"


def load_model(
    folder: str | Path,
    device_map: Any = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    workers: int | None = None,
) -> PreTrainedModel:
    """A ChatGLMForConditionalGeneration from a checkpoint folder, in evaluation mode, ready to run.

    Args:
        folder: config.json and shards (.bin or .safetensors).
        device_map: part name or beginning of one -> device, or one device for all; None: the CPU. Or a plan.
        dtype: of every parameter, LayerNorms too; None: that of config.json.
        progress: print one line for each shard: seconds, MB/s, memory of the host and of each GPU.
        workers: reading threads; None: one a core, at most 4.

    Returns:
        the model; `.load_report` tells about the loading, `.hf_device_map` where the parts are.

    Raises:
        ValueError: files that do not belong together, a parameter that no shard holds, a shape that does not fit, a
            device map that does not fit the model or the machine. Nothing has been copied then.
        RuntimeError: a parameter ended up in the wrong place.
    """
    started = time.perf_counter()
    model, report = load_parts(folder, device_map, dtype, progress=progress, workers=workers)
    placement = Placement.of(device_map, model.config.num_layers, torch.cuda.device_count())
    check_filled(model)
    model.place(placement.map)
    report.tensors = check_placement(model, placement, model.config.dtype)
    report.seconds = time.perf_counter() - started
    if progress:
        print(f"{file_size(report.read_bytes)} in {report.seconds:.2f} s, {report.tensors} tensors checked")
    return model


def load_parts(
    folder: str | Path,
    device_map: Any = None,
    dtype: torch.dtype | None = None,
    parts: Container[str] | None = None,
    progress: bool = True,
    workers: int | None = None,
) -> tuple[Model, LoadReport]:
    """As `load_model`, but only some parts are read; the others stay on "meta", and nothing is placed or checked.

    Args:
        parts: names as in `part_names`; None: all. The head is read with the embedding, whose tensor it is.
        others: as for `load_model`, with the same errors.

    Returns:
        the model, in evaluation mode, and what was read.
    """
    from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration

    folder = expanded(folder)
    headers = {path: read_entries(path) for path in list_shards(folder)}
    if problems := check_consistency(folder, {path.name: entries for path, entries in headers.items()}):
        lines = [f"  {problem}" for problem in problems]
        raise ValueError("\n".join(["the files do not belong together:", *lines, _advice(folder)]))
    try:
        config = ChatGLMConfig.from_pretrained(folder)
        with torch.device("meta"):
            model: Model = ChatGLMForConditionalGeneration(config)
    except OSError:
        raise
    except Exception as error:  # transformers has many ways to say that a setting is none
        raise ValueError(f"{folder / 'config.json'} cannot be this model's: {error}. {_advice(folder)}") from error
    dtype = dtype or (config.dtype if isinstance(config.dtype, torch.dtype) else torch.float16)
    placement = Placement.of(device_map, config.num_layers, torch.cuda.device_count())
    shards = choose_entries(headers, model)
    report = LoadReport(psutil.Process().memory_info().rss)
    gpus = [device for device in placement.devices if isinstance(device, int)]
    with BlockReader(workers, pinned=bool(gpus)) as reader:
        for path, entries in shards.items():
            wanted = {name: entry for name, entry in entries.items() if parts is None or part_of(name) in parts}
            report.shards.append(_load_shard(model, path, wanted, placement, dtype, reader, gpus))
            if progress:
                print(report.memory_line(report.shards[-1]))
    model.tie_weights()
    model.config.dtype = dtype
    model.name_or_path = model.config.name_or_path = str(folder)
    model.load_report = report
    return model.eval(), report


def choose_entries(headers: dict[Path, dict[str, Entry]], model: nn.Module) -> dict[Path, dict[str, Entry]]:
    """Shard -> the entries to read from it: each parameter once.

    The stored `inv_freq` of each block is left out, as in the original; so is `lm_head`, which becomes the embedding.

    Raises:
        ValueError: a parameter is in no shard or has another shape, or a shard holds something that the model lacks.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    shards: dict[Path, dict[str, Entry]] = {}
    missing = set(shapes) - {HEAD}
    for path, entries in headers.items():
        shards[path] = {}
        for name, entry in entries.items():
            if name.endswith(".rotary_emb.inv_freq") or name == HEAD:
                continue
            if name not in shapes:
                text = f"{path.name} holds {name}, which this model does not have: it is of another model"
                raise ValueError(f"{text}. {_advice(path.parent)}")
            if shapes[name] != entry.shape:
                text = f"{name} is {list(entry.shape)} in {path.name}, config.json makes it {list(shapes[name])}"
                raise ValueError(f"{text}. {_advice(path.parent)}")
            if name in missing:
                shards[path][name] = entry
                missing.remove(name)
    if missing:
        first = EMBEDDING if EMBEDDING in missing else min(missing)
        advice = _advice(next(iter(headers)).parent)
        raise ValueError(f"{len(missing)} parameters are in no shard, the first is {first}. {advice}")
    return shards


def _advice(folder: Path) -> str:
    return f"verify_weights({str(folder)!r}) names the wrong file and the command that mends it"


def _load_shard(
    model: PreTrainedModel,
    path: Path,
    entries: dict[str, Entry],
    placement: Placement,
    dtype: torch.dtype,
    reader: BlockReader,
    gpus: list[int],
) -> ShardTime:
    started, targets = time.perf_counter(), []
    for name, entry in entries.items():
        target = torch.empty(entry.shape, dtype=dtype, device=device_of(name, placement))
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(target, requires_grad=target.is_floating_point()))
        targets.append((entry, target))
    reader.fill(path, targets)
    for index in gpus:
        torch.cuda.synchronize(index)
    return ShardTime(
        name=path.name,
        read_bytes=sum(entry.nbytes for entry in entries.values()),
        seconds=time.perf_counter() - started,
        host_bytes=psutil.Process().memory_info().rss,
        gpu_bytes={index: torch.cuda.memory_allocated(index) for index in gpus},
    )
