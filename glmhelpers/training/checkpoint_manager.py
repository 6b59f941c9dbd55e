"""Checkpoints of a training, to resume from after a kill: whole, or not used.

    checkpoints/
      run-3fa9c1d2/                 one run; its name is made from settings, rows and base
        settings.json               the same in words
        checkpoint-60/
          adapter, optimizer, scheduler, scaler, random states, trainer_state.json      (written by the Trainer)
          complete.json             written last: size and sha256 of every file above
        checkpoint-80/              no complete.json: the process died here. Skipped, and said so

A run that is started again with the same settings goes on from its last complete checkpoint; with other settings it is
another run with a folder of its own, so nothing is mixed up and nothing is lost.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from glmhelpers.lora.attach import origin_of, weights_digest
from glmhelpers.lora.fingerprint import fingerprint
from glmhelpers.utils.files import read_json, write_json
from glmhelpers.utils.folders import expanded
from glmhelpers.utils.types import Model
from glmhelpers.weights.manifest import sha256_of

MARKER = "complete.json"
STATE = "trainer_state.json"

COUNTED = (
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "train_sampling_strategy",
    "seed",
    "data_seed",
    "lr_scheduler_kwargs",
    "optim_args",
    "neftune_noise_alpha",
    "dataloader_drop_last",
)
"""The training arguments that decide what is learnt. How the work is cut and where it is done do not."""


def run_settings(
    model: Model, dataset: Iterable[Mapping[str, Any]], args: Any, base: str | None = None
) -> dict[str, Any]:
    """What makes a run this run and no other, ready for JSON.

    Args:
        model: a PeftModel.
        dataset: encoded rows.
        args: `TrainingArguments`, or something with the same attributes.
        base: fingerprint of the whole base, if the model is only a part of it.
    """
    count, digest = rows_digest(dataset)
    counted = {name: getattr(args, name) for name in COUNTED}
    return {
        "base": base or fingerprint(model),
        "starts_from": origin_of(model).starts_from,
        "rows": count,
        "rows_digest": digest,
        "rows_per_step": args.per_device_train_batch_size * args.gradient_accumulation_steps,
        **_adapter_settings(model.peft_config[model.active_adapter]),
        **{name: getattr(value, "value", value) for name, value in counted.items()},
    }


def _adapter_settings(adapter: Any) -> dict[str, Any]:
    if adapter.peft_type == "PREFIX_TUNING":
        width = adapter.encoder_hidden_size if adapter.prefix_projection else None
        return {"prefix_length": adapter.num_virtual_tokens, "prefix_projection": width}
    return {
        "r": adapter.r,
        "alpha": adapter.lora_alpha,
        "dropout": adapter.lora_dropout,
        "targets": sorted(adapter.target_modules),
    }


def start_run(model: nn.Module, dataset: Iterable[Mapping[str, Any]], args: Any) -> Path:
    """The folder of the run that this model, these rows and these settings make; noted on the model.

    A model that was trained in this very run, and stopped, still belongs to it. One that was trained in another run, or
    changed otherwise, starts a run that is no fresh one.
    """
    settings = run_settings(model, dataset, args)
    folder = run_folder(args.output_dir, settings)
    origin, now = origin_of(model), weights_digest(model)
    known = origin.run == folder.resolve() if origin.run else now == origin.digest
    if not known:
        origin.starts_from = settings["starts_from"] = f"trained before, {now}"
        folder = run_folder(args.output_dir, settings)
    write_settings(folder, settings)
    origin.run = folder.resolve()
    return folder


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a run into its folder, unless they are there."""
    if not (folder / "settings.json").is_file():
        write_json(folder / "settings.json", settings)


def rows_digest(dataset: Iterable[Mapping[str, Any]]) -> tuple[int, str]:
    """Number of rows, and 16 hex digits of all lengths, ids and labels in their order."""
    digests, count = [hashlib.sha256() for _ in range(3)], 0
    for columns in _columns(dataset):
        count += len(columns[0])
        for digest, values in zip(digests, columns, strict=True):
            digest.update(np.ascontiguousarray(values, np.int32).tobytes())
    return count, hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()[:16]


def _columns(dataset: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Any, Any, Any]]:
    """(lengths, all ids, all labels) of some rows at a time."""
    if not hasattr(dataset, "with_format"):
        for row in dataset:
            yield [len(row["input_ids"])], row["input_ids"], row["labels"]
        return
    for table in dataset.with_format("arrow").iter(1000):
        ids, labels = (table[name].combine_chunks() for name in ("input_ids", "labels"))
        yield ids.value_lengths().to_numpy(), ids.flatten().to_numpy(), labels.flatten().to_numpy()


def run_folder(parent: str | Path, settings: Mapping[str, Any]) -> Path:
    """The folder of the run with these settings, below `parent`."""
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
    return expanded(parent) / f"run-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def mark_complete(folder: Path, **facts: Any) -> None:
    """Write the marker of a checkpoint whose files are all written: their sizes, sha256, and `facts` (for JSON).

    The files are brought to the disk before the marker, so it cannot survive a power cut that they do not.
    """
    sizes, sums = {}, {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors lets nobody else read its files
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        name = path.relative_to(folder).as_posix()
        sizes[name], sums[name] = path.stat().st_size, sha256_of(path)
    write_json(folder / MARKER, {"files": sizes, "sha256": sums, **facts})


def marker_facts(folder: Path) -> dict[str, Any]:
    """What `mark_complete` wrote."""
    return read_json(folder / MARKER)


def what_is_wrong(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None if it is complete."""
    try:
        marker = marker_facts(folder)
        pairs, sums = marker["files"].items(), dict(marker.get("sha256", {}))  # older markers have sizes only
    except FileNotFoundError:
        return f"it has no {MARKER}, so the process was stopped while it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MARKER} cannot be read"
    if not pairs:
        return f"its {MARKER} names no file"
    for name, size in pairs:
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes, {size} were written"
            if name in sums and sha256_of(path) != sums[name]:
                return f"{name} has other bytes than were written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("checkpoint-"))


def checkpoints(run: Path) -> list[Path]:
    """All checkpoint folders of a run, complete or not, the newest first."""
    folders = (path for path in run.glob("checkpoint-*") if path.is_dir())
    found = [path for path in folders if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def last_complete(run: Path, say: Any = print) -> Path | None:
    """The newest complete checkpoint of a run, or None. Each one that is passed over is named, with the reason."""
    for folder in checkpoints(run):
        reason = what_is_wrong(folder)
        if reason is None:
            return folder
        say(f"{run.name}/{folder.name} is skipped: {reason}")
    return None


def keep_last(run: Path, count: int | None) -> None:
    """Delete all but the `count` newest complete checkpoints, and what is older than those; None keeps everything."""
    if count is None:
        return
    complete = [folder for folder in checkpoints(run) if what_is_wrong(folder) is None][: max(count, 1)]
    if not complete:
        return
    for folder in checkpoints(run):
        if step_of(folder) < step_of(complete[-1]) and not folder.is_symlink():  # a link leads to somebody's own place
            # Without its marker it is no checkpoint any more, should the process die in the middle of this.
            (folder / MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """The Trainer's state in a checkpoint: `global_step`, `max_steps`, `log_history` and more."""
    return read_json(folder / STATE)
