"""Beyond one process: the same model, plan and adapter with one process a GPU, on PyTorch's own engine.

plan.py  -->  stage.py  -->  step.py                             processes.py
who has what  a rank's part  schedule, sums over all ranks       who is there, and do they agree
"""

from glmhelpers.distributed.plan import ProcessPlan, even_blocks
from glmhelpers.distributed.processes import StartError

__all__ = ["ProcessPlan", "StartError", "even_blocks"]
