"""Beyond one process: the same model, plan and adapter with one process a GPU, on PyTorch's own engine.

plan.py  -->  stage.py  -->  step.py                 checkpoint.py, processes.py
who has what  a rank's part  sums over all ranks     gathered and handed out; who is there, and do they agree

job.py   -->  launch.py, __main__.py  -->  loop.py
what and how  notebook, shell              the Trainer's losses and checkpoints
"""

from glmhelpers.distributed.job import Job
from glmhelpers.distributed.launch import launch, torchrun_command
from glmhelpers.distributed.plan import ProcessPlan, even_blocks
from glmhelpers.distributed.processes import Processes, StartError, make_mesh
from glmhelpers.distributed.stage import build_stage
from glmhelpers.distributed.step import PipelineStep, my_rows

__all__ = [
    "Job",
    "PipelineStep",
    "ProcessPlan",
    "Processes",
    "StartError",
    "build_stage",
    "even_blocks",
    "launch",
    "make_mesh",
    "my_rows",
    "torchrun_command",
]
