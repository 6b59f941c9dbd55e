"""An adapter on disk: PEFT's two files and a note of what they belong to; saved whole or not at all, and proved.

    adapter/
      adapter_config.json         rank, alpha, targets (PEFT)
      adapter_model.safetensors   lora_A and lora_B of every block (PEFT)
      course.json                 template of the prompts, fingerprint of the base, settings of the training

"The loss falls but the model learns nothing" was often a saving problem: an empty file, or one that another base or
another prompt template then loads without a word. So the note is compared at loading, and `prove` compares the reloaded
model with the trained one.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from glmhelpers.attach import adapter_layers, check_adapter, quiet_peft
from glmhelpers.fingerprints import base_checksum, fingerprint
from glmhelpers.lora import fuse_lora
from glmhelpers.templates import TEMPLATES

NOTE = "course.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", NOTE)

SAME_LOGITS = 1e-3
"""Logits that differ by no more are the same."""

STILL_KNOWN = 0.75
"""Part of what the base knew that must be left after training."""


def save_adapter(
    model: PeftModel, folder: str | Path, template: str = "chatglm", settings: Mapping[str, Any] | None = None
) -> Path:
    """Write the adapter to `folder`, replacing what is there, and return it.

    Everything is written to a folder beside it first, so a killed process leaves the old adapter or the new one.

    Args:
        template: name of the prompt template it was trained with.
        settings: how it was trained, for readers: `checkpoints.run_settings`, or whatever JSON can hold.

    Raises:
        ValueError: unknown template, or an adapter that learnt nothing (every lora_B is 0).
    """
    if template not in TEMPLATES:
        raise ValueError(f"template {template!r} is unknown; there are {', '.join(TEMPLATES)}")
    if not any(norm > 0 for norm in lora_b_norms(model).values()):
        raise ValueError("Every lora_B is 0: this adapter changes nothing. Train it before saving it.")
    folder = Path(folder)
    draft, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    for leftover in (draft, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(draft, save_embedding_layers=False)
    note = {"template": template, "base_fingerprint": fingerprint(model), "settings": dict(settings or {}), "format": 1}
    (draft / NOTE).write_text(json.dumps(note, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if folder.exists():
        os.replace(folder, old)
    os.replace(draft, folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def load_adapter(base: nn.Module, folder: str | Path, template: str | None = None) -> PeftModel:
    """The base with the adapter of `folder` on it, ready for use; adapters in float32, each beside its base layer.

    Args:
        base: a ChatGLM without an adapter, on its devices.
        template: the template you are going to use; compared with the one of the note if given.

    Raises:
        FileNotFoundError: a file of the adapter is missing.
        ValueError: the adapter was trained on another base or with another template.
    """
    folder = Path(folder)
    if missing := [name for name in ADAPTER_FILES if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder.name}/ lacks {', '.join(missing)}: run notebook 04, which saves an adapter.")
    note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    here = fingerprint(base)
    if note["base_fingerprint"] != here:
        raise ValueError(
            f"The adapter in {folder.name}/ was trained on a base with fingerprint {note['base_fingerprint']}, this "
            f"base has {here}. Load the base it was trained on, or train again."
        )
    if template is not None and note["template"] != template:
        raise ValueError(
            f"The adapter in {folder.name}/ was trained with the template {note['template']!r}, not {template!r}: it "
            "would read prompts it has never seen. Use its own template."
        )
    with quiet_peft():
        model = PeftModel.from_pretrained(base, folder)
    fuse_lora(model)
    check_adapter(model)
    return model.eval()


def lora_b_norms(model: nn.Module) -> dict[str, float]:
    """Layer name -> Frobenius norm of its lora_B; 0 before training, since B starts at 0."""
    return {
        name: linear.weight.detach().norm().item()
        for name, layer in adapter_layers(model).items()
        for linear in layer.lora_B.values()
    }


@dataclass(frozen=True)
class Proof:
    """What `prove` found; `ok` if the adapter changes the model, survived the disk, and left the base alone."""

    largest_b_norm: float
    trained_to_reloaded: float
    """Largest difference of logits between the trained and the reloaded model; 0 if nothing was lost."""
    trained_to_base: float
    """The same between the trained model and its base; 0 if nothing was learnt."""
    base_before: str | None = None
    """Checksum of the frozen weights before training; None if it was not given."""
    base_after: str | None = None
    general_before: float | None = None
    """Share of general questions answered rightly by the base; None if it was not given."""
    general_after: float | None = None

    @property
    def claims(self) -> list[tuple[bool, str]]:
        """(holds, in words) of everything that was looked at."""
        found = [
            (self.largest_b_norm > 0, f"largest lora_B norm {self.largest_b_norm:.3f}, 0 at the start"),
            (
                self.trained_to_reloaded <= SAME_LOGITS,
                f"reloaded logits differ by {self.trained_to_reloaded:.1e} from the trained",
            ),
            (self.trained_to_base > SAME_LOGITS, f"trained logits differ by {self.trained_to_base:.1e} from the base"),
        ]
        if self.base_before is not None:
            same = self.base_before == self.base_after
            text = f"checksum {self.base_after}, as before" if same else f"{self.base_before} became {self.base_after}"
            found.append((same, f"frozen weights: {text}"))
        if self.general_before is not None:
            text = f"general questions right: {self.general_before:.0%} before, {self.general_after:.0%} after"
            found.append((self.general_after >= STILL_KNOWN * self.general_before, text))
        return found

    @property
    def ok(self) -> bool:
        """Whether it is proved."""
        return all(good for good, _ in self.claims)

    def __str__(self) -> str:
        return "\n".join(f"[{'OK' if good else 'FAIL'}] {text}" for good, text in self.claims)


@dataclass(frozen=True)
class Witness:
    """What a trained model says, so that it need not stay beside the reloaded one. Logits [B, L, V], float32."""

    trained: Tensor
    base: Tensor
    base_checksum: str


@torch.no_grad()
def witness(trained: PeftModel, input_ids: Tensor) -> Witness:
    """Logits of a trained model with and without its adapter on one prompt [B, L], and its base's checksum."""
    trained.eval()
    logits = trained(input_ids=input_ids).logits.float().cpu()
    with trained.disable_adapter():
        base = trained(input_ids=input_ids).logits.float().cpu()
    return Witness(logits, base, base_checksum(trained))


@torch.no_grad()
def prove(
    trained: PeftModel | Witness,
    reloaded: PeftModel,
    input_ids: Tensor,
    base_before: str | None = None,
    general: tuple[float, float] | None = None,
) -> Proof:
    """Compare the trained model, the reloaded one and the base on one prompt [B, L], and the base with itself.

    Args:
        trained: the model, or what it said: two copies of ChatGLM-6B do not fit on one T4.
        base_before: `base_checksum` of the base before training.
        general: shares (0 to 1) of general questions answered rightly before and after.
    """
    said = trained if isinstance(trained, Witness) else witness(trained, input_ids)
    again = reloaded(input_ids=input_ids).logits.float().cpu()
    before, after = general or (None, None)
    return Proof(
        largest_b_norm=max(lora_b_norms(reloaded).values()),
        trained_to_reloaded=(said.trained - again).abs().max().item(),
        trained_to_base=(said.trained - said.base).abs().max().item(),
        base_before=base_before,
        base_after=None if base_before is None else said.base_checksum,
        general_before=before,
        general_after=after,
    )
