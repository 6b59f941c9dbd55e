"""Device map: which block lies on which GPU, planned, checked, applied.

plan.py       the plan a user sees            placement.py  where each part lies, read everywhere
search.py     the best of all cuts            check.py      what is wrong with a map made by hand
"""

from glmhelpers.devicemap.check import DeviceMapError, check_device_map, part_names
from glmhelpers.devicemap.placement import check_placement, expand_device_map
from glmhelpers.devicemap.plan import DoesNotFit, Plan, largest_batch, longest_length, plan_device_map

__all__ = [
    "DeviceMapError",
    "DoesNotFit",
    "Plan",
    "check_device_map",
    "check_placement",
    "expand_device_map",
    "largest_batch",
    "longest_length",
    "part_names",
    "plan_device_map",
]
