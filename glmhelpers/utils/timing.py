"""Times of work that is done again and again, and which of them to believe.

    first | again again again ... until its seconds are used up      the first loads what the others find loaded

What disturbs a host only ever adds time, and comes and goes in seconds: the same training step took 53 ms, and 62 a
moment later. So many short times are worth more than few long ones, and of them the lower quartile: a median of few is
as often disturbed as not, and the least is reached too seldom to plan with. Python's collector stays on, as in
training: its short runs belong to a step, its long ones are too few to move a quartile.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Laps:
    """Seconds of each part of a piece of work, whose parts follow each other."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.since = time.perf_counter()

    def end(self, part: str) -> None:
        """What was done since the last part ended was this one; a part may come again."""
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.since
        self.since = now


def repeated(
    seconds: float, measure: Callable[[], T], least: int = 2, warm: Callable[[], Any] = lambda: None
) -> list[T]:
    """What `measure` says, again and again for some seconds, at least `least` times, after a first time that is left
    out of both; `warm` is called behind that one."""
    measure()
    warm()
    end, found = time.perf_counter() + seconds, list[T]()
    while len(found) < least or time.perf_counter() < end:
        found.append(measure())
    return found


def lower_quartile(values: list[float]) -> float:
    """A quarter of these, two or more, are below it."""
    return statistics.quantiles(values, n=4, method="inclusive")[0]
