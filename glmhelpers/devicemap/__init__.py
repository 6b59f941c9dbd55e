"""Device map: which block lies on which GPU, planned, checked, applied.

plan.py       the plan a user sees            check.py      a map against GPUs and model
search.py     the best of all cuts            bounds.py     what no plan can be better than
schedules.py  one process a GPU               scaling.py     1 to 64 GPUs, on paper
activation_checkpointing.py  run again       devices.py    streams, and where tensors have to be
"""

from glmhelpers.devicemap.check import DeviceMapError, Placement, check_device_map, check_placement, part_names
from glmhelpers.devicemap.plan import DoesNotFit, Plan, largest_batch, longest_length, plan_device_map

__all__ = [
    "DeviceMapError",
    "DoesNotFit",
    "Placement",
    "Plan",
    "check_device_map",
    "check_placement",
    "largest_batch",
    "longest_length",
    "part_names",
    "plan_device_map",
]
