"""Tokens: from a row of text to ids and labels, and from rows to a batch.

prompts.py  -->  encode.py  -->  collate.py                      lengths.py
the template     ids, labels     rows of one length              what a limit costs
"""

from glmhelpers.tokens.collate import SAMPLING, RightPadCollator
from glmhelpers.tokens.encode import encode_example, encode_file, split_by_prompt, split_key, token_report
from glmhelpers.tokens.lengths import limit_costs, padding_share, quantile
from glmhelpers.tokens.prompts import build_prompt

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
