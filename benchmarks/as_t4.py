"""Makes every GPU of a kernel look like a T4: an IPython extension, loaded before the first cell of a rehearsal.

name, size      "Tesla T4", 14.75 GiB        where torch is asked
allocator       stops at 14.75 GiB
attention       the memory-efficient kernel (no flash attention, no cuDNN)

It also writes, after each cell, what the kernel held: peak of each GPU as its own allocator counts, peak of the
process, and the peaks that the notebook predicted last. Speed, float16 rounding and the link between two GPUs stay
those of the machine.

A kernel that has not ended when its seconds are over writes where each of its threads is, and ends: C code that hangs
with the interpreter's lock cannot keep it from that.
"""

import faulthandler
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXTENSION = "as_t4"
FILE_VARIABLE = "GLM_REHEARSAL_PEAKS"
LIMIT_VARIABLE = "GLM_REHEARSAL_SECONDS"
SHARED_VARIABLE = "GLM_REHEARSAL_SHARED"  # set: what other processes hold of the same GPU is not seen
CONTEXT = 2**29  # bytes that a process takes beside its allocator, where the GPU cannot be asked for one process
CAP = int(14.75 * 2**30)
PREDICTIONS = ("predicted", "plan")  # variables of the notebooks that have `peak_bytes`, the surest first


def stacks_file(peaks: Path) -> Path:
    """Where a kernel whose time is over writes its stacks; empty if it ends before."""
    return peaks.with_name(peaks.name.replace(".peaks.json", ".stacks.txt"))


class _Properties:
    """A GPU's properties with another name and size."""

    name, total_memory = "Tesla T4", CAP

    def __init__(self, real: Any):
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def disguise(capped: Sequence[int] | None = None) -> None:
    """From now on this process sees T4s; nothing changes where there is no GPU. `capped`: the GPUs whose allocator
    stops at a T4's size, by default all of them: a rank opens no other than its own."""
    import torch

    if not torch.cuda.is_available():
        return
    properties, memory = torch.cuda.get_device_properties, torch.cuda.mem_get_info

    def as_properties(device: Any = None) -> _Properties:
        return _Properties(properties(device))

    def as_memory(device: Any = None) -> tuple[int, int]:
        free, total = memory(device)
        held = torch.cuda.memory_reserved(device) + CONTEXT if SHARED_VARIABLE in os.environ else total - free
        return max(0, CAP - held), CAP

    for device in range(torch.cuda.device_count()) if capped is None else capped:
        share = CAP / properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    torch.cuda.get_device_properties, torch.cuda.mem_get_info = as_properties, as_memory
    torch.cuda.get_device_name = lambda device=None: _Properties.name
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def load_ipython_extension(shell: Any) -> None:
    """Disguise the GPUs, and keep the peaks; called by IPython."""
    path = Path(os.environ[FILE_VARIABLE])
    if seconds := os.environ.get(LIMIT_VARIABLE):
        faulthandler.dump_traceback_later(float(seconds), file=stacks_file(path).open("w"), exit=True)
    import torch

    disguise()
    peaks = [0] * torch.cuda.device_count()

    def write(_: Any) -> None:
        for device, peak in enumerate(peaks):
            peaks[device] = max(peak, torch.cuda.max_memory_allocated(device))
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else []
        host = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
        found = (getattr(shell.user_ns.get(name), "peak_bytes", None) for name in PREDICTIONS)
        predicted = next((list(value) for value in found if value), [])
        path.write_text(json.dumps({"peak_bytes": peaks, "predicted_peak_bytes": predicted, "host_bytes": host}))

    shell.events.register("post_run_cell", write)
