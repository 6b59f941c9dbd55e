"""Rows of different lengths become one batch: padding on the right, for training.

    row 0   p p p g s a a e            input_ids        p p p g s a a e
    row 1   p g s a e                                   p g s a e . . .     . = pad
    row 2   p p g s e                                   p p g s e . . .
                                       attention_mask   1 1 1 1 1 0 0 0     row 1
                                       labels           - - - a e - - -     row 1, - = -100, no target

The prompt sees only the prompt, and the answer never looks to its right. So padding on the right cannot
change a row: it keeps the positions and the result it has alone. (Generation pads on the left, so that all
rows end together.)

Each padded token costs as much as a real one. Batches of similar length keep the padding small: the Trainer
makes them with `SAMPLING` below. Lengths are multiples of 8, which fp16 matrix units like.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

IGNORE = -100
"""Label that the loss leaves out."""

SAMPLING = {
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "length",
    # The Trainer drops what `forward` does not take before its sampler looks for "length", and would then
    # count the tokens of every row by itself. The collator below takes only the columns it needs.
    "remove_unused_columns": False,
}
"""Arguments for `transformers.TrainingArguments` that make batches of similar length from an encoded file."""


class RightPadCollator:
    """Pads encoded rows on the right to one length.

    Args:
        pad: the id of the padding token, or a tokenizer that has `pad_token_id`.
        multiple_of: the padded length is a multiple of this number of tokens.

    Raises:
        ValueError: no padding id, or `multiple_of` below 1.
    """

    def __init__(self, pad: Any, multiple_of: int = 8) -> None:
        self.pad_id = pad if isinstance(pad, int) else pad.pad_token_id
        if self.pad_id is None:
            raise ValueError(f"{type(pad).__name__} has no pad_token_id; pass the id of the padding token")
        if multiple_of < 1:
            raise ValueError(f"multiple_of is {multiple_of}; it must be 1 or more")
        self.multiple_of = multiple_of

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """One batch of B rows, L tokens wide.

        Args:
            rows: B mappings with `input_ids` and, for training, `labels`; other columns are left out.

        Returns:
            `input_ids`, `attention_mask` (1 = real token) and, if the rows have them, `labels` (-100 = no
            target), each an int64 tensor [B, L].

        Raises:
            ValueError: no rows, or a row whose labels and ids differ in number.
        """
        if not rows:
            raise ValueError("a batch needs at least one row")
        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // self.multiple_of) * self.multiple_of
        batch = {
            "input_ids": torch.full((len(rows), width), self.pad_id, dtype=torch.long),
            "attention_mask": torch.zeros((len(rows), width), dtype=torch.long),
        }
        if "labels" in rows[0]:
            batch["labels"] = torch.full((len(rows), width), IGNORE, dtype=torch.long)
        for place, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][place, :length] = torch.as_tensor(row["input_ids"])
            batch["attention_mask"][place, :length] = 1
            if "labels" in batch:
                if len(row["labels"]) != length:
                    raise ValueError(f"row {place} of the batch has {length} ids but {len(row['labels'])} labels")
                batch["labels"][place, :length] = torch.as_tensor(row["labels"])
        return batch
