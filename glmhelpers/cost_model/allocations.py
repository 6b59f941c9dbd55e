"""A ledger of tensors: what is alive, how much that is together, and the most that it has been.

    make("normed", 32)     total 32    peak 32
    make("qkv", 96)        total 128   peak 128
    drop("normed")         total 96    peak 128

`block_memory` keeps one for each way to run a block.
"""

from dataclasses import dataclass, field


@dataclass
class Ledger:
    """Tensors alive now, and the largest sum seen so far.

    Attributes:
        alive: name -> [bytes, references] of each tensor that exists now.
        total: bytes alive now.
        peak: largest total so far.
        history: (step, largest total within it), for drawing.
    """

    alive: dict[str, list[int]] = field(default_factory=dict)
    total: int = 0
    peak: int = 0
    history: list[tuple[str, int]] = field(default_factory=list)
    _step_peak: int = 0

    def make(self, name: str, size: int) -> None:
        """Put down a new tensor of `size` bytes with one reference."""
        self.alive[name] = [size, 1]
        self.total += size
        self.peak = max(self.peak, self.total)
        self._step_peak = max(self._step_peak, self.total)

    def share(self, name: str) -> None:
        """One more reference to a tensor: it must be dropped once more."""
        self.alive[name][1] += 1

    def drop(self, *names: str) -> None:
        """Take one reference from each tensor; the last one frees it."""
        for name in names:
            entry = self.alive[name]
            entry[1] -= 1
            if not entry[1]:
                self.total -= entry[0]
                del self.alive[name]

    def step(self, name: str) -> None:
        """Close a step for the picture."""
        self.history.append((name, self._step_peak))
        self._step_peak = self.total
