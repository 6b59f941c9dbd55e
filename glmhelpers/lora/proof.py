"""Proof that a saved adapter is the trained one: what it answers, not what its files look like.

trained model --witness()--> logits with and without the adapter, base checksum      (before saving)
loaded model  --prove()----> six claims, each True or False with its number          (after loading)

`closeness` compares the next-token logits of any two models on prompts, for adapters that leave the course as files.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from glmhelpers.inference.scores import Kept
from glmhelpers.lora.attach import lora_b_norms, prefix_encoder
from glmhelpers.lora.fingerprint import base_checksum
from glmhelpers.utils.types import Model
from thuglm.modeling_chatglm import evaluating

SAME_LOGITS = 1e-3
"""Logits that differ by no more are the same."""

MAY_LOSE = 0.05
"""Share of all general questions that may be lost in training: 5 points of 100."""


@dataclass(frozen=True)
class Proof:
    """What `prove` found; `ok` if the adapter changes the model, survived the disk, taught, and left the base alone."""

    largest_b_norm: float | None
    """None for a learnt prefix, which starts from random numbers."""
    trained_to_reloaded: float
    """Largest difference of logits between the trained and the reloaded model; 0 if nothing was lost."""
    trained_to_base: float
    """The same between the trained model and its base; 0 if nothing was learnt."""
    base_before: str | None = None
    """Checksum of the frozen weights before training; None if it was not given."""
    base_after: str | None = None
    learnt_before: float | None = None
    """Share of answers of the base that hold what was taught; None if it was not given."""
    learnt_after: float | None = None
    general_before: float | None = None
    """Share of general questions that the base answers as it should; None if it was not given."""
    general_after: float | None = None
    general_counted: str = "right"
    """What counts as such an answer: "whole answers", "right words", or "right" by the caller's own count."""

    @property
    def claims(self) -> list[tuple[bool, str]]:
        """(holds, in words) of everything that was looked at."""
        found = []
        if self.largest_b_norm is not None:
            found.append((self.largest_b_norm > 0, f"largest lora_B norm {self.largest_b_norm:.3f}, 0 at the start"))
        found += [
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
        if self.learnt_before is not None and self.learnt_after is not None:
            text = f"what was taught: {self.learnt_before:.0%} of the answers before, {self.learnt_after:.0%} after"
            found.append((self.learnt_after > self.learnt_before, text))
        if self.general_before is not None and self.general_after is not None:
            lost = self.general_before - self.general_after
            text = f"general questions: {self.general_before:.0%} {self.general_counted} before, "
            text += f"{self.general_after:.0%} after"
            found.append((lost <= MAY_LOSE + 1e-9, f"{text}; {100 * MAY_LOSE:.0f} points may be lost"))
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
    general: Kept | tuple[float, float] | None = None,
    learnt: tuple[float, float] | None = None,
) -> Proof:
    """Compare the trained model, the reloaded one and the base on one prompt [B, L], and the base with itself.

    Args:
        trained: the model, or what it said: two copies of ChatGLM-6B do not fit on one T4.
        base_before: `base_checksum` of the base before training.
        general: what `inference.kept` counted on general questions, or shares (0 to 1) of your own count, before and
            after. Count whole answers: one that holds the right words may be damaged all the same.
        learnt: the same of questions about what was taught.
    """
    said = trained if isinstance(trained, Witness) else witness(trained, input_ids)
    again = reloaded(input_ids=input_ids).logits.float().cpu()
    counted, shares = (general.counted, general.shares) if isinstance(general, Kept) else ("right", general)
    (before, after), (old, new) = shares or (None, None), learnt or (None, None)
    return Proof(
        largest_b_norm=None if prefix_encoder(reloaded) else max(lora_b_norms(reloaded).values()),
        trained_to_reloaded=(said.trained - again).abs().max().item(),
        trained_to_base=(said.trained - said.base).abs().max().item(),
        base_before=base_before,
        base_after=None if base_before is None else said.base_checksum,
        learnt_before=old,
        learnt_after=new,
        general_before=before,
        general_after=after,
        general_counted=counted,
    )


@dataclass(frozen=True)
class Closeness:
    """How far two models' logits are apart on the same prompts.

    Attributes:
        largest: largest difference of two logits.
        spread: standard deviation of the logits, to measure it by.
        same_best: share of prompts whose likeliest next token is the same.
    """

    largest: float
    spread: float
    same_best: float

    @property
    def ok(self) -> bool:
        """Whether rounding to float16 explains the difference: at most 2 % of the spread."""
        return self.largest <= 0.02 * self.spread

    def __str__(self) -> str:
        return (
            f"[{'OK' if self.ok else 'FAIL'}] logits differ by {self.largest:.1e} at most, which is "
            f"{self.largest / self.spread:.2%} of their spread; same next token in {self.same_best:.0%}"
        )


@torch.no_grad()
def next_logits(model: Model, tokenizer: Any, texts: list[str]) -> Tensor:
    """Logits of the token after each prompt, [n, V] float32 on the CPU; so one model can go before the other comes.

    Without dropout, in whatever mode the model is.
    """
    device = model.get_input_embeddings().weight.device
    ids = [tokenizer([text], return_tensors="pt")["input_ids"].to(device) for text in texts]
    with evaluating(model):
        return torch.cat([model(input_ids=row, logits_to_keep=1).logits[:, -1].float().cpu() for row in ids])


def closeness(logits: Tensor, others: Tensor) -> Closeness:
    """Compare what `next_logits` gave for two models."""
    same = (logits.argmax(-1) == others.argmax(-1)).float().mean().item()
    return Closeness((logits - others).abs().max().item(), logits.std().item(), same)
