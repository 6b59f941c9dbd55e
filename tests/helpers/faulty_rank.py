"""`-m tests.helpers.faulty_rank ...` is `-m glmhelpers.distributed ...` with faults, each of which happens once.

FAULTS is a folder; a file in it named kill-1-6 kills rank 1 with SIGKILL in step 6, hang-1-6 stops it there for ever,
save-0-8 kills rank 0 when checkpoint-8 has its adapter but nothing else. The file is gone once that has happened.
"""

import os
import signal
import time
from pathlib import Path

from glmhelpers.distributed import __main__, checkpoint, loop

RANK = os.environ.get("RANK")


def happens(kind, step):
    """Is this fault to happen here and now? Then never again."""
    fault = Path(os.environ["FAULTS"]) / f"{kind}-{RANK}-{step}"
    if fault.is_file():
        fault.unlink()
        return True
    return False


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Batches(loop.Batches):
    def __getitem__(self, step):
        if happens("kill", step):
            die()
        if happens("hang", step):
            time.sleep(10_000)
        return super().__getitem__(step)


def write_peft_files(folder, config, tensors):
    real_write(folder, config, tensors)
    if happens("save", folder.name.removeprefix("checkpoint-")):
        die()


if __name__ == "__main__":
    loop.Batches = Batches
    real_write, checkpoint.write_peft_files = checkpoint.write_peft_files, write_peft_files
    __main__.main()
