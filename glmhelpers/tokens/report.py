"""How rows are to become tokens, and what became of them.

rows -> examples (one for each answer)  ==  kept + sum(dropped)          kept: some of them cut, some changed
                                                                         dropped: reason -> examples
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from glmhelpers.tokens.prompts import TEMPLATES


@dataclass(frozen=True)
class Settings:
    """How rows become tokens.

    Args:
        template: a key of `TEMPLATES`.
        max_length: most tokens an example may have, special tokens included; None for as many as the model can read.
        too_long: "drop" leaves a longer example out and counts it; "cut" shortens its answer and keeps <eop>.
        answers: "last" or "all" answers of a conversation.
        train_sop: <sop> is a target too, as in the original fine-tuning script.

    Raises:
        ValueError: a value that is none of these.
    """

    template: str = "chatglm"
    max_length: int | None = None
    too_long: str = "drop"
    answers: str = "last"
    train_sop: bool = False

    def __post_init__(self) -> None:
        for name, choices in {
            "template": tuple(TEMPLATES),
            "too_long": ("drop", "cut"),
            "answers": ("last", "all"),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(choices)}")
        if not isinstance(self.train_sop, bool):
            raise ValueError(f"train_sop is {self.train_sop!r}; use True or False")
        if self.max_length is not None and not (isinstance(self.max_length, int) and self.max_length >= 5):
            raise ValueError(f"max_length is {self.max_length!r}; a whole number from 5 on, the tokens of one example")


@dataclass
class TokenReport:
    """What became of the rows: rows -> examples == kept + sum(dropped)."""

    source: str
    settings: dict[str, Any]
    rows: int = 0
    examples: int = 0
    kept: int = 0
    cut: int = 0
    dropped: Counter = field(default_factory=Counter)
    lengths: Counter = field(default_factory=Counter)
    """Tokens of an example before any limit -> number of examples."""
    tokens: int = 0
    targets: int = 0
    changed: int = 0
    """Examples whose answer is learnt as another text, beyond width and blanks."""
    changed_shown: list[tuple[str, str]] = field(default_factory=list)
    """(answer, what is learnt) of the first three, around the first difference."""

    def __str__(self) -> str:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.dropped.items())) or "none"
        lines = [
            f"{self.rows:,} rows -> {self.examples:,} examples, {self.kept:,} kept ({self.cut:,} of them cut), "
            f"dropped: {dropped}",
            f"{self.tokens:,} tokens, {self.targets:,} of them targets, template {self.settings['template']!r}",
        ]
        if self.changed:
            lines.append(
                f"answers that the tokenizer changes, so that another text is learnt: {self.changed:,}, such as"
            )
            lines += [f"   {before!r} -> {after!r}" for before, after in self.changed_shown]
        return "\n".join(lines)
