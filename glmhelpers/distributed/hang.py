"""Which rank hangs? Each says where it is; a thread looks whether anybody still moves.

    rank 0   step 7: reads rows   forward and backward ......................... waits
    rank 1   step 7: reads rows ................................................ hangs: the least far of all
                                                                       |
                                               nobody has moved for most of the timeout: one line that names rank 1

All that the ranks know by themselves is that a message did not come, and a process that is waited for may itself wait
for another one. So the places are kept in the store in which the ranks have met. A rank that hangs inside a pass is as
far as those that wait for it; then nobody is named.
"""

import platform
import threading
import time
from typing import Any

PATIENCE = 0.8
"""Part of the timeout after which the line is printed: while the ranks still wait."""

DOINGS = ("reads its rows", "is in forward and backward", "adds up gradients", "evaluates", "saves")
"""What a rank does in a step, in this order."""


class Places:
    """Where all ranks are.

    Args:
        store: that all ranks share; this thread has a connection of its own.
        rank, world: of this process, of all.
        timeout: seconds that a rank waits for another.
    """

    def __init__(self, store: Any, rank: int, world: int, timeout: float):
        self.store, self.rank, self.world, self.timeout = store, rank, world, timeout
        self.stopped = threading.Event()
        self.own = store.clone()
        self.thread = threading.Thread(target=self._look, daemon=True)

    def at(self, step: int, doing: int) -> None:
        """This rank begins `DOINGS[doing]` of a step, counted from 1."""
        self.store.set(f"place {self.rank}", f"{step} {doing} {platform.node()}")
        if not self.thread.ident:
            self.thread.start()

    def stop(self) -> None:
        """Look no more."""
        self.stopped.set()
        if self.thread.ident:
            self.thread.join(self.timeout)

    def _look(self) -> None:
        known: list[bytes] = []
        since = time.monotonic()
        keys = [f"place {rank}" for rank in range(self.world)]
        while not self.stopped.wait(self.timeout / 50):
            try:
                found = self.own.multi_get(keys) if self.own.check(keys) else []
            except RuntimeError:  # the store went with the process that held it
                return
            if found != known:
                known, since = found, time.monotonic()
            elif known and time.monotonic() - since > PATIENCE * self.timeout:
                if line := hanging([place.decode().split(" ", 2) for place in known], self.rank):
                    print(line, flush=True)
                return


def hanging(places: list[list[str]], rank: int) -> str:
    """The line that names those who are the least far; "" if another rank says it, or if all are equally far.

    Args:
        places: for each rank, step, index into DOINGS, machine.
        rank: who asks.
    """
    far = [(int(step), int(doing)) for step, doing, _ in places]
    behind = [number for number, place in enumerate(far) if place == min(far)]
    ahead = [number for number in range(len(far)) if number not in behind]
    if not ahead or rank != ahead[0]:
        return ""
    step, doing = min(far)
    who = " and ".join(f"rank {number} on {places[number][2]}" for number in behind)
    return f"{who} hangs: it has not come further than step {step}, where it {DOINGS[doing]}; the others wait for it"
