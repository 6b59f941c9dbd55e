"""A live monitor: one line for each GPU while something runs.

    GPU 0  ##########..........  allocated  7.02  reserved  7.31  free  7.10  of 14.75 GiB  highest  7.05
    GPU 1  ########............  allocated  6.12  reserved  6.40  free  8.01  of 14.75 GiB  highest  6.98

    with Monitor():
        trainer.train()

A thread reads the counters twice a second; it never makes a GPU wait. Without a GPU it shows this process' memory.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glmhelpers.utils.units import GIB


@dataclass(frozen=True)
class Reading:
    """Bytes of one device at one moment: in tensors, taken by PyTorch, free on the device, in all, highest so far."""

    name: str
    allocated: int
    reserved: int
    free: int
    total: int
    highest: int

    def __str__(self) -> str:
        """One line in GiB; the bar shows what is allocated."""
        bar = "#" * round(20 * min(self.allocated / self.total, 1))
        return (
            f"{self.name}  {bar:.<20}  allocated {self.allocated / GIB:5.2f}  reserved {self.reserved / GIB:5.2f}  "
            f"free {self.free / GIB:5.2f}  of {self.total / GIB:.2f} GiB  highest {self.highest / GIB:5.2f}"
        )


def read_devices() -> list[Reading]:
    """A Reading of every GPU, or of this process and the machine's memory where there is none."""
    import torch

    if torch.cuda.is_available():
        readings = []
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            allocated, reserved = torch.cuda.memory_allocated(index), torch.cuda.memory_reserved(index)
            highest = torch.cuda.max_memory_allocated(index)
            readings.append(Reading(f"GPU {index}", allocated, reserved, free, total, highest))
        return readings
    import psutil

    memory, process = psutil.virtual_memory(), psutil.Process().memory_info()
    highest = getattr(process, "peak_wset", process.rss)
    return [Reading("CPU  ", process.rss, process.rss, memory.available, memory.total, highest)]


class Monitor:
    """Shows the devices' memory while a `with` block runs.

    Args:
        seconds: time between two readings.
        read: where readings come from.
        show: what to do with the text; by default one place under the cell shows it and keeps the last reading.

    Attributes:
        highest: after the block, the largest `allocated` seen for each device, in bytes.
    """

    def __init__(
        self,
        seconds: float = 0.5,
        read: Callable[[], list[Reading]] = read_devices,
        show: Callable[[str], None] | None = None,
    ):
        self.seconds, self.read, self.show = seconds, read, show
        self.highest: list[int] = []
        self._stop = threading.Event()

    def __enter__(self) -> "Monitor":
        """Show the first reading and start the thread."""
        self.highest = []
        self._stop.clear()
        self._show = self.show or _Field().show
        self._once()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Stop the thread and leave the last reading on the screen."""
        self._stop.set()
        self._thread.join()
        self._once()

    def _run(self) -> None:
        while not self._stop.wait(self.seconds):
            self._once()

    def _once(self) -> None:
        readings = self.read()
        seen = [reading.allocated for reading in readings]
        self.highest = [max(pair) for pair in zip(self.highest or seen, seen, strict=True)]
        self._show("\n".join(map(str, readings)))


class _Field:
    """A place on the page with one text, which the notebook keeps: an output that is replaced, not a widget."""

    def __init__(self):
        from IPython.display import display

        self.handle = display({"text/plain": ""}, raw=True, display_id=True)

    def show(self, text: str) -> None:
        """Replace the text."""
        self.handle.update({"text/plain": text}, raw=True)
