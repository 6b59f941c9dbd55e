"""Progress as plain text: one line that a log, a terminal and a notebook all show.

pytorch_model-00003-of-00008.bin  41 %  0.81 of 1.98 GB | all  33 %  4.43 of 13.42 GB  96 MB/s  1:33 left
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from glmhelpers.utils.units import amount, clock, percent


class TextProgress:
    """Counts bytes of one file and of all files, and prints them now and then.

    A terminal or notebook gets one line that is overwritten, anything else a new line every ten seconds.

    Args:
        total: bytes of all files.
        done: bytes that were there before.
        show: False prints nothing.
    """

    def __init__(self, total: int, done: int = 0, show: bool = True):
        self.total, self.done, self.already = total, done, done
        self.out, self.show = sys.stdout, show
        self.live = self.out.isatty() or type(self.out).__module__.startswith("ipykernel")
        self.started = self.printed = time.monotonic()
        self.name, self.size, self.in_file, self.width = "", 0, 0, 0
        self.lock = threading.Lock()

    def start(self, name: str, size: int, already: int = 0) -> None:
        """A new file of `size` bytes begins, of which `already` are there."""
        self.name, self.size, self.in_file = name, size, already

    def add(self, count: int) -> None:
        """`count` bytes more (negative if some were thrown away)."""
        with self.lock:
            self.in_file += count
            self.done += count
            now = time.monotonic()
            if now - self.printed >= (0.5 if self.live else 10):
                self.printed = now
                self._print(end="\r" if self.live else "\n")

    def finish(self) -> None:
        """The file is complete: its last line stays."""
        with self.lock:
            self._print(end="\n")

    def close(self) -> None:
        """Leave the last line as it is, so that an error message starts on its own."""
        if self.live and self.width:
            self.out.write("\n")
            self.width = 0

    def text(self) -> str:
        """The line as it would be printed now."""
        seconds = max(time.monotonic() - self.started, 1e-3)
        speed = max(self.done - self.already, 0) / seconds
        left = f"{clock((self.total - self.done) / speed)} left" if speed and self.done < self.total else ""
        part = f"{self.name} {percent(self.in_file, self.size)} {amount(self.in_file, self.size)}"
        whole = f" | all {percent(self.done, self.total)} {amount(self.done, self.total)}"
        # One file is all there is: do not say it twice.
        return f"{part}{whole if self.size != self.total else ''}  {speed / 1e6:.0f} MB/s  {left}".rstrip()

    def _print(self, end: str) -> None:
        if not self.show:
            return
        line = self.text()
        self.out.write(line.ljust(self.width) + end)
        self.out.flush()
        self.width = len(line) if end == "\r" else 0


@contextmanager
def reading(what: str, total: int, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with each number of bytes read of `total`; prints nothing if it is over at once."""
    bar = TextProgress(total, show=show)
    bar.start(what, total)
    try:
        yield bar.add
        if bar.printed > bar.started:
            bar.finish()
    finally:
        bar.close()
