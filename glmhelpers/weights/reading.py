"""Bytes from a file to their place on a device, several blocks at a time.

    shard file   [ block | block | block | block | ... ]        16 MiB each
                     |       |       |       |
                 thread 0    1       2       3                  each reads its own block
                     |       |       |       |
      CPU tensor  <--+       |       |       |                  same dtype: straight into the tensor
      GPU tensor  <----------+-------+-------+                  else through one pinned block a thread

The host holds one block for each thread and nothing else, whatever the size of the file. No file is mapped into memory,
so none of its pages count as ours. Four threads also keep the disk busy while a block is on its way to a GPU.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from torch import Tensor

from glmhelpers.weights.shards import Entry

BLOCK = 16 * 2**20


class BlockReader(ThreadPoolExecutor):
    """Fills tensors from files; use it in a `with` statement.

    Args:
        workers: threads; None: one a core, at most 4.
        pinned: page-locked blocks, which a GPU copies from at full speed.
    """

    def __init__(self, workers: int | None = None, pinned: bool = False):
        super().__init__(workers or min(4, os.cpu_count() or 1))
        self.pinned, self.own = pinned, threading.local()

    def fill(self, path: Path, targets: list[tuple[Entry, Tensor]]) -> None:
        """Read the bytes of each entry of one file into its tensor, and return when all are there.

        Args:
            path: the shard.
            targets: entries with contiguous tensors of the same shape, on any device, of any dtype (it is converted).

        Raises:
            EOFError: the file ends before the entry does.
        """
        jobs: list[Future] = []
        try:
            for entry, tensor in targets:
                for offset, piece in _pieces(entry, tensor):
                    jobs.append(self.submit(self._read, path, offset, piece, entry.dtype))
            for job in jobs:
                job.result()
        finally:
            for job in jobs:
                job.cancel()
            wait(jobs)

    def _read(self, path: Path, offset: int, piece: Tensor, dtype: torch.dtype) -> None:
        if piece.device.type == "cpu" and piece.dtype == dtype:
            _read_exactly(path, offset, piece.view(torch.uint8))
            return
        block = self._block()[: piece.numel() * dtype.itemsize]
        _read_exactly(path, offset, block)
        piece.copy_(block.view(dtype))

    def _block(self) -> Tensor:
        if not hasattr(self.own, "block"):
            self.own.block = torch.empty(BLOCK, dtype=torch.uint8, pin_memory=self.pinned)
        return self.own.block


def _pieces(entry: Entry, tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(offset in the file, flat piece of the tensor) of at most one block each."""
    flat, step = tensor.view(-1), BLOCK // entry.dtype.itemsize
    for start in range(0, flat.numel(), step):
        yield entry.offset + start * entry.dtype.itemsize, flat[start : start + step]


def _read_exactly(path: Path, offset: int, out: Tensor) -> None:
    view = memoryview(out.numpy().data)
    # Opened for each block: threads share no position, and it works where there is no `preadv` (Windows).
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while view:
            count = file.readinto(view)
            if not count:
                raise EOFError(
                    f"{path} ends at byte {file.tell()}, {len(view)} more were expected: verify_weights says what to do"
                )
            view = view[count:]
