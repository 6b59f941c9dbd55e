"""What a limit on the length costs, and what padding costs: counted, before anything is trained.

examples
  |  #                             limit 512
  | ###                               |
  | #####                             |        dropped: these examples are lost
  | ########  ##   #   #              |  #  #  cut:     the ends of their answers are lost
  +-----------------------------------+---------- tokens
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LimitCost:
    """What one limit costs.

    Attributes:
        limit: most tokens of an example.
        kept: examples of that length or shorter.
        dropped: longer examples.
        tokens_if_dropped: share of all tokens (0 to 1) that is lost if longer examples are dropped.
        tokens_if_cut: share that is lost if only what is beyond the limit is cut off.
    """

    limit: int
    kept: int
    dropped: int
    tokens_if_dropped: float
    tokens_if_cut: float


def limit_costs(lengths: Mapping[int, int], limits: Sequence[int]) -> list[LimitCost]:
    """The cost of each limit.

    Args:
        lengths: tokens of an example -> number of examples, as in `TokenReport.lengths`.
        limits: in tokens.

    Raises:
        ValueError: there are no examples.
    """
    if not lengths:
        raise ValueError("there are no examples: lengths is empty")
    length, count = (np.array(values, dtype=np.int64) for values in (list(lengths), list(lengths.values())))
    tokens = int((length * count).sum())
    costs = []
    for limit in limits:
        over = length > limit
        lost, cut = int((length * count)[over].sum()), int(((length - limit) * count)[over].sum())
        dropped = int(count[over].sum())
        costs.append(LimitCost(limit, int(count.sum()) - dropped, dropped, lost / tokens, cut / tokens))
    return costs


def quantile(lengths: Mapping[int, int], share: float) -> int:
    """The length that this share of the examples (0 to 1) does not exceed."""
    at, needed = 0, share * sum(lengths.values())
    for length in sorted(lengths):
        at += lengths[length]
        if at >= needed:
            return length
    raise ValueError(f"there are no examples, or share is {share}, which is above 1")


def padding_share(lengths: Sequence[int], batch_size: int) -> float:
    """Share of padding (0 to 1) among all tokens, if examples are put into batches in this order, padded to 8s.

    Args:
        lengths: tokens of each example, in the order of training.
        batch_size: examples of a batch; the last one may be smaller.

    Raises:
        ValueError: there are no examples.
    """
    if not lengths:
        raise ValueError("there are no examples: lengths is empty")
    held = 0
    for start in range(0, len(lengths), batch_size):
        batch = lengths[start : start + batch_size]
        held += len(batch) * -(-max(batch) // 8) * 8
    return 1 - sum(lengths) / held
