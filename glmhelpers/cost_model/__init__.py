"""Cost model: the bytes and the seconds of a training step, from the configuration alone. Nothing here needs a GPU.

sizes.py  -->  allocations.py, block_memory.py  -->  stages.py  -->  step_memory.py, step_time.py       decoding_time.py
shapes         what one block keeps                  one GPU         the step                            decoding
"""

from glmhelpers.cost_model.block_memory import block_cost
from glmhelpers.cost_model.decoding_time import GOALS, bytes_for_token, read_speeds, token_time
from glmhelpers.cost_model.gpus import CATALOGUE, GPU, find_gpu, find_gpus, gpus_here
from glmhelpers.cost_model.sizes import Setting, Shape
from glmhelpers.cost_model.stages import Stage
from glmhelpers.cost_model.step_memory import predict
from glmhelpers.cost_model.step_time import (
    StageTime,
    Task,
    block_seconds,
    busy_share,
    schedule,
    stage_seconds,
    step_seconds,
)

__all__ = [
    "CATALOGUE",
    "GOALS",
    "GPU",
    "Setting",
    "Shape",
    "Stage",
    "StageTime",
    "Task",
    "block_cost",
    "block_seconds",
    "busy_share",
    "bytes_for_token",
    "find_gpu",
    "find_gpus",
    "gpus_here",
    "predict",
    "read_speeds",
    "schedule",
    "stage_seconds",
    "step_seconds",
    "token_time",
]
