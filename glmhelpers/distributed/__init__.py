"""Beyond one process: the same model, plan and adapter with one process a GPU, on PyTorch's own engine.

plan.py  -->  stage.py  -->  step.py                 checkpoint.py, processes.py
who has what  a rank's part  sums over all ranks     gathered and handed out; who is there, and do they agree

job.py   -->  launch.py, __main__.py  -->  loop.py
what and how  notebook, shell              the Trainer's losses and checkpoints

roads.py      which way is faster on a machine, and by how much: planned, before anything is started
"""

from glmhelpers.devicemap.scaling import scale_out, scaling_table
from glmhelpers.distributed.job import Job
from glmhelpers.distributed.launch import launch, torchrun_command
from glmhelpers.distributed.plan import ProcessPlan, even_blocks
from glmhelpers.distributed.processes import Processes, StartError, make_mesh
from glmhelpers.distributed.roads import Road, compare_roads, forecast_processes, roads_table
from glmhelpers.distributed.stage import build_stage
from glmhelpers.distributed.step import PipelineStep, my_rows

__all__ = [
    "Job",
    "PipelineStep",
    "ProcessPlan",
    "Processes",
    "Road",
    "StartError",
    "build_stage",
    "compare_roads",
    "even_blocks",
    "forecast_processes",
    "launch",
    "make_mesh",
    "my_rows",
    "roads_table",
    "scale_out",
    "scaling_table",
    "torchrun_command",
]
