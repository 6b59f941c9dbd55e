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

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import DataCollatorForSeq2Seq

from thuglm.constants import IGNORE_INDEX

if TYPE_CHECKING:
    from torch import Tensor

SAMPLING = {
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "length",
    # The Trainer drops what `forward` does not take before its sampler looks for "length", and would then
    # count the tokens of every row by itself. The collator below takes only the columns it needs.
    "remove_unused_columns": False,
}
"""Arguments for `transformers.TrainingArguments` that make batches of similar length from an encoded file."""


class RightPadCollator(DataCollatorForSeq2Seq):
    """transformers' collator, padding ids with <pad> and labels with -100, always on the right.

    Args:
        tokenizer: knows the padding token; its own padding side stays as it is.
        multiple_of: the padded length is a multiple of this number of tokens.

    Raises:
        ValueError: no padding token, or `multiple_of` below 1.
    """

    def __init__(self, tokenizer: Any, multiple_of: int = 8) -> None:
        if getattr(tokenizer, "pad_token_id", None) is None:
            raise ValueError(f"{type(tokenizer).__name__} has no pad_token_id; pass the tokenizer of the model")
        if multiple_of < 1:
            raise ValueError(f"multiple_of is {multiple_of}; it must be 1 or more")
        self.known = len(tokenizer)
        on_the_right = copy.copy(tokenizer)
        on_the_right.padding_side = "right"
        super().__init__(on_the_right, pad_to_multiple_of=multiple_of, label_pad_token_id=IGNORE_INDEX)

    def __call__(self, rows: Sequence[Mapping[str, Any]], return_tensors: str | None = None) -> "dict[str, Tensor]":
        """One batch of B rows, L tokens wide.

        Args:
            rows: B mappings with `input_ids` and, for training, `labels`; other columns are left out.
            return_tensors: as in transformers; None: of torch.

        Returns:
            `input_ids`, `attention_mask` (1 = real token) and, if the rows have them, `labels` (-100 = no
            target), each an int64 tensor [B, L].

        Raises:
            ValueError: no rows, a row whose labels and ids differ in number, or one with an id that the tokenizer
                does not have: a GPU could only end the process.
        """
        if not rows:
            raise ValueError("a batch needs at least one row")
        kept = [{name: list(row[name]) for name in ("input_ids", "labels") if name in row} for row in rows]
        for place, row in enumerate(kept):
            ids, labels = len(row["input_ids"]), len(row.get("labels", row["input_ids"]))
            if ids != labels:
                raise ValueError(f"row {place} of the batch has {ids} ids but {labels} labels")
            worst = max(row["input_ids"] + row.get("labels", []), default=0)
            if worst >= self.known or min(row["input_ids"], default=0) < 0:
                wrong = worst if worst >= self.known else min(row["input_ids"])
                raise ValueError(
                    f"row {place} of the batch holds id {wrong}, the tokenizer has ids 0 to {self.known - 1}: the rows "
                    "were encoded with another one. Encode them again with the tokenizer of the model."
                )
        batch = super().__call__(kept, return_tensors)
        return {name: tensor for name, tensor in batch.items() if tensor is not None}
