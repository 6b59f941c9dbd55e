"""An adapter on disk: PEFT's two files and a note of what they belong to; saved whole or not at all, and proved.

    adapter/
      adapter_config.json         rank, alpha, targets (PEFT)
      adapter_model.safetensors   lora_A and lora_B of every block, or a learnt prefix (PEFT)
      course.json                 template of the prompts, what the base was, settings of the training

"The loss falls but the model learns nothing" was often a saving problem: an empty file, or one that another base or
another prompt template then loads without a word. So the note is compared at loading, every tensor must find its place
and every place its tensor, and `prove` compares the reloaded model with the trained one.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from glmhelpers.lora.adapter_files import CONFIG, KEY, NOTE, TENSORS, read_adapter
from glmhelpers.lora.attach import adapter_from, learnt_nothing, not_a_number, refuse_second
from glmhelpers.lora.fingerprint import base_note
from glmhelpers.tokens.prompts import TEMPLATES
from glmhelpers.utils.files import whole_files
from glmhelpers.utils.folders import expanded


def save_adapter(
    model: PeftModel, folder: str | Path, template: str = "chatglm", settings: Mapping[str, Any] | None = None
) -> Path:
    """Write the adapter's three files to `folder`, replacing those that are there, and return the folder.

    All three are replaced or none, also if the process is killed meanwhile or another one saves there too. Nothing else
    in the folder is touched.

    Args:
        template: name of the prompt template it was trained with.
        settings: how it was trained, for readers: `run_settings`, or whatever JSON can hold.

    Raises:
        ValueError: unknown template, or an adapter that learnt nothing (every lora_B is 0, or the prefix is still the
            random one of `attach_prefix`) or holds NaN.
        NotADirectoryError: `folder` is a file, or a link to nothing.
    """
    _refuse_useless(template, not_a_number(model), learnt_nothing(model))
    folder = expanded(folder).absolute()
    with whole_files(folder, KEY) as draft:
        # peft adds a README.md, which the folder may have too, and gives an adapter not named "default" a folder.
        active = model.active_adapter
        with tempfile.TemporaryDirectory(dir=draft) as theirs:
            model.save_pretrained(theirs, save_embedding_layers=False, selected_adapters=[active])
            for name in (CONFIG, TENSORS):
                os.replace(Path(theirs, *([] if active == "default" else [active]), name), draft / name)
        _write_note(draft, template, base_note(model), settings)
    return folder


def write_adapter(
    folder: str | Path,
    config: LoraConfig,
    tensors: Mapping[str, Tensor],
    base: Mapping[str, Any],
    template: str = "chatglm",
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """As `save_adapter`, for a model that no process holds whole: from its tensors, on the CPU.

    Args:
        config: as it was attached with.
        tensors: name as in `adapter_weights` -> matrix.
        base: the whole base's `note_of`.
        others: as for `save_adapter`, with the same errors.
    """
    broken = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
    empty = not any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    _refuse_useless(template, broken, "Every lora_B is 0: train this adapter before saving it." if empty else None)
    folder = expanded(folder).absolute()
    with whole_files(folder, KEY) as draft:
        write_peft_files(draft, config, tensors)
        _write_note(draft, template, base, settings)
    return folder


def write_peft_files(folder: Path, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
    """PEFT's two files, for an adapter whose tensors [name -> matrix on the CPU] are gathered here."""
    replace(config, inference_mode=True).save_pretrained(str(folder))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS, {"format": "pt"})


def _refuse_useless(template: str, broken: str | None, empty: str | None) -> None:
    if template not in TEMPLATES:
        raise ValueError(f"template {template!r} is unknown; there are {', '.join(TEMPLATES)}")
    if broken:
        raise ValueError(f"{broken} holds NaN or infinity: training diverged. Take an earlier checkpoint.")
    if empty:
        raise ValueError(empty)


def _write_note(folder: Path, template: str, base: Mapping[str, Any], settings: Mapping[str, Any] | None) -> None:
    note = {"template": template, "base": base, "settings": dict(settings or {}), "format": 1}
    (folder / NOTE).write_text(json.dumps(note, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_adapter(
    base: nn.Module, folder: str | Path, template: str | None = None, trainable: bool = False
) -> PeftModel:
    """The base with the adapter of `folder` on it, ready for use; adapters in float32, each beside its base layer.

    Args:
        base: a ChatGLM without an adapter, on its devices. Left as it is if anything is refused.
        folder: written by `save_adapter`, or by anybody's peft: without our note the base cannot be compared, which is
            said. LoRA, or a learnt prefix (peft's PREFIX_TUNING).
        template: the template you are going to use; compared with the one of the note if given.
        trainable: to train on with it, instead of using it.

    Raises:
        FileNotFoundError: a file of the adapter is missing.
        ValueError: a file is damaged, a tensor has no place or a place no tensor, the base has an adapter already, or
            the adapter was trained on another base or with another template; names the difference. Or see
            `AdapterFiles.peft_config`.
    """
    refuse_second(base)
    files = read_adapter(folder)
    config = files.peft_config(trainable)
    files.check_base(base_note(base), dict(base.named_modules()))
    if files.note is not None and template is not None and files.note["template"] != template:
        raise ValueError(
            f"The adapter in {files.name}/ was trained with the template {files.note['template']!r}, not {template!r}: "
            "it would read prompts it has never seen. Use its own template."
        )
    return adapter_from(base, config, files.tensors, f"{files.name}/{TENSORS}").eval()
