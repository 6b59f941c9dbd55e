"""`torchrun --nproc-per-node 2 -m glmhelpers.distributed --folder ... --rows ... --output ...`: one process of a job.

Under `accelerate launch` the same. Says in one sentence what is wrong with a start that cannot work.
"""

import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import record

from glmhelpers.distributed.job import Job
from glmhelpers.distributed.loop import train
from glmhelpers.distributed.processes import REFUSED, StartError, joined


@record
def main(arguments: Sequence[str] | None = None) -> None:
    """Run this process' part of a job."""
    job = Job.parse(sys.argv[1:] if arguments is None else arguments)
    try:
        with joined(job.ranks, job.on_gpu, job.timeout) as processes:
            train(job, processes)
    except StartError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{REFUSED}{error}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
