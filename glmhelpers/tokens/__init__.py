"""Tokens: from a row of text to ids and labels, and from rows to a batch.

prompts.py  -->  examples.py  -->  encode.py  -->  collate.py                      lengths.py
the template     rows to texts     ids, labels     rows of one length              what a limit costs
"""

from typing import TYPE_CHECKING, Any

from glmhelpers.tokens.encode import encode_example, encode_file, split_by_prompt, token_report
from glmhelpers.tokens.examples import split_key
from glmhelpers.tokens.lengths import limit_costs, padding_share, quantile
from glmhelpers.tokens.prompts import build_prompt

if TYPE_CHECKING:
    from glmhelpers.tokens.collate import SAMPLING, RightPadCollator

__all__ = [
    "SAMPLING",
    "RightPadCollator",
    "build_prompt",
    "encode_example",
    "encode_file",
    "limit_costs",
    "padding_share",
    "quantile",
    "split_by_prompt",
    "split_key",
    "token_report",
]


def __getattr__(name: str) -> Any:
    # Older versions of transformers load torch for their collators, which conversion and encoding do not need.
    if name in ("SAMPLING", "RightPadCollator"):
        from glmhelpers.tokens import collate

        return getattr(collate, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
