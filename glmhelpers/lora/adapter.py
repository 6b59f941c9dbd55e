"""An adapter on disk: PEFT's two files and a note of what they belong to; saved whole or not at all, and proved.

    adapter/
      adapter_config.json         rank, alpha, targets (PEFT)
      adapter_model.safetensors   lora_A and lora_B of every block (PEFT)
      course.json                 template of the prompts, what the base was, settings of the training

"The loss falls but the model learns nothing" was often a saving problem: an empty file, or one that another base or
another prompt template then loads without a word. So the note is compared at loading, every tensor must find its place
and every place its tensor, and `prove` compares the reloaded model with the trained one.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from glmhelpers.lora.attach import adapter_from, lora_b_norms, not_a_number
from glmhelpers.lora.fingerprint import base_difference, base_note
from glmhelpers.tokens.prompts import TEMPLATES

NOTE = "course.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", NOTE)


def save_adapter(
    model: PeftModel, folder: str | Path, template: str = "chatglm", settings: Mapping[str, Any] | None = None
) -> Path:
    """Write the adapter to `folder`, replacing the one that is there, and return it.

    Everything is written to a folder beside it first, so a killed process leaves the old adapter or the new one.

    Args:
        template: name of the prompt template it was trained with.
        settings: how it was trained, for readers: `checkpoints.run_settings`, or whatever JSON can hold.

    Raises:
        ValueError: unknown template, or an adapter that learnt nothing (every lora_B is 0) or holds NaN.
        FileExistsError: `folder` holds something else than an adapter.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template {template!r} is unknown; there are {', '.join(TEMPLATES)}")
    if name := not_a_number(model):
        raise ValueError(f"{name} holds NaN or infinity: training diverged. Take an earlier checkpoint.")
    if not any(norm > 0 for norm in lora_b_norms(model).values()):
        raise ValueError("Every lora_B is 0: this adapter changes nothing. Train it before saving it.")
    folder = Path(folder).absolute()
    draft, old = folder.with_name(f".{folder.name}.part"), _aside(folder)
    _bring_back(folder)
    if folder.exists() and not _replaceable(folder):
        raise FileExistsError(f"{folder} is there and is no adapter: give save_adapter a folder of its own")
    for leftover in (draft, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(draft, save_embedding_layers=False)
    note = {"template": template, "base": base_note(model), "settings": dict(settings or {}), "format": 1}
    (draft / NOTE).write_text(json.dumps(note, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if folder.exists():
        os.replace(folder, old)
    os.replace(draft, folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def _aside(folder: Path) -> Path:
    """Where the old adapter lies for the moment in which the new one takes its place."""
    return folder.with_name(f".{folder.name}.old")


def _replaceable(folder: Path) -> bool:
    """An adapter's folder, or an empty one."""
    return folder.is_dir() and ((folder / ADAPTER_FILES[0]).is_file() or not any(folder.iterdir()))


def _bring_back(folder: Path) -> None:
    """If a process died in that moment, give the old adapter its name back."""
    if not folder.exists() and _aside(folder).is_dir():
        os.replace(_aside(folder), folder)


def load_adapter(
    base: nn.Module, folder: str | Path, template: str | None = None, trainable: bool = False
) -> PeftModel:
    """The base with the adapter of `folder` on it, ready for use; adapters in float32, each beside its base layer.

    Args:
        base: a ChatGLM without an adapter, on its devices. Left as it is if anything is refused.
        template: the template you are going to use; compared with the one of the note if given.
        trainable: to train on with it, instead of using it.

    Raises:
        FileNotFoundError: a file of the adapter is missing.
        ValueError: a file is damaged, a tensor has no place or a place no tensor, the base has an adapter already, or
            the adapter was trained on another base or with another template; names the difference.
    """
    folder = Path(folder).absolute()
    _bring_back(folder)
    if missing := [name for name in ADAPTER_FILES if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder.name}/ lacks {', '.join(missing)}: run notebook 04, which saves an adapter.")
    note = _read_note(folder)
    if difference := base_difference(note["base"], base_note(base)):
        raise ValueError(
            f"The adapter in {folder.name}/ was trained on another base: {difference}. Load the base it was trained "
            "on, or train again."
        )
    if template is not None and note["template"] != template:
        raise ValueError(
            f"The adapter in {folder.name}/ was trained with the template {note['template']!r}, not {template!r}: it "
            "would read prompts it has never seen. Use its own template."
        )
    config_file, tensor_file = (folder / name for name in ADAPTER_FILES[:2])
    try:
        config = LoraConfig.from_pretrained(folder)
        config.inference_mode = not trainable
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(_damaged(config_file, error)) from error
    try:
        tensors = load_file(tensor_file)
    except SafetensorError as error:
        raise ValueError(_damaged(tensor_file, error)) from error
    return adapter_from(base, config, tensors, f"{folder.name}/{tensor_file.name}").eval()


def _read_note(folder: Path) -> dict[str, Any]:
    """The note of an adapter; ValueError if it is not one."""
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        wanted = {"template", "base"} - set(note)
        if not wanted and "fingerprint" not in note["base"]:
            wanted = {"the base's fingerprint"}
    except (ValueError, TypeError) as error:
        raise ValueError(_damaged(folder / NOTE, error)) from error
    if wanted:
        raise ValueError(_damaged(folder / NOTE, f"it lacks {', '.join(sorted(wanted))}"))
    return note


def _damaged(path: Path, reason: object) -> str:
    return f"{path.parent.name}/{path.name} is damaged ({reason}): save the adapter again, or copy it again."
