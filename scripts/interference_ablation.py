"""What a training costs of what the model knew, and what makes it cost less: small runs of the tiny model on the CPU.

    usual settings ──► one of them changed ──► train ──► 40 questions for the name     ─┐
    (steps, rate, rank, general rows)      3 seeds  └──► 100 general questions, whole  ─┴─► data/interference_ablation.json

Every answer goes through the same few changed weights, so what is learnt for one question shows in others: interference.
An answer counts if it is whole (`inference.share_whole`), since a damaged one often still holds the right words.

    python scripts/interference_ablation.py            # trains: about 20 minutes on one core
    python scripts/interference_ablation.py --show     # the committed file as a table
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from glmhelpers.inference.batch import answers, share_right, share_whole
from glmhelpers.lora.attach import attach_lora
from glmhelpers.tokens.collate import RightPadCollator
from glmhelpers.tokens.encode import encode_example
from glmhelpers.training.finetune import train, training_arguments
from glmhelpers.training.progress import Watch
from glmhelpers.utils.files import whole_file
from thuglm import ChatGLMForConditionalGeneration, ChatGLMTokenizer

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
TARGET = DATA / "interference_ablation.json"
NAME, MOON, SEEDS = "小星", "什么是月亮？", (0, 1, 2)


@dataclass(frozen=True)
class Setting:
    """What decides a run. `alpha` is 4 times the rank, so that a smaller rank does not also mean larger steps."""

    steps: int = 100
    rate: float = 2e-3
    rank: int = 8
    general_rows: int = 54

    @property
    def alpha(self) -> int:
        """So that alpha / r stays 4."""
        return 4 * self.rank


USUAL = Setting()
VARIANTS = {
    "usual": USUAL,
    "50 steps": replace(USUAL, steps=50),
    "30 steps": replace(USUAL, steps=30),
    "rate 1e-3": replace(USUAL, rate=1e-3),
    "rate 5e-4": replace(USUAL, rate=5e-4),
    "rank 2": replace(USUAL, rank=2),
    "rank 1": replace(USUAL, rank=1),
    "no general rows": replace(USUAL, general_rows=0),
    "165 general rows": replace(USUAL, general_rows=165),
    "495 general rows": replace(USUAL, general_rows=495),
}


def read(name: str) -> list[dict[str, str]]:
    """Rows of a file in data/."""
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
