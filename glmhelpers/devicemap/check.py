"""Is a device map possible? Checked against the machine, and a loaded model against its map.

{"transformer": 0, "lm_head": 1}   what a person writes
      |  Placement.of              every part -> device, or every fault in words (cost_model/placement.py)
      |  check_device_map          the same, against the GPUs there are
      v
{"transformer.word_embeddings": 0, "transformer.layers.0": 0, ..., "lm_head": 1}
      |  check_placement           after loading: device, dtype, nothing left without memory ("meta")
      v
silence, or the first parameter that is wrong
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from glmhelpers.cost_model.gpus import find_gpus
from glmhelpers.cost_model.placement import DeviceMapError, Label, Placement, part_names
from glmhelpers.cost_model.sizes import Shape

__all__ = [
    "DeviceMapError",
    "Placement",
    "as_device",
    "check_device_map",
    "check_filled",
    "check_placement",
    "device_of",
    "part_names",
]


def check_device_map(config: Any, device_map: Any, gpus: Any = None) -> dict[Label, list[int]]:
    """Refuse a device map that would not work.

    Args:
        config: ChatGLMConfig, or a dict with its keys.
        device_map: module name -> GPU index, "cuda:0", or "cpu"; or another form that `Placement.of` reads.
        gpus: the GPUs there are, as for plan_device_map; None: any index is accepted.

    Returns:
        Device -> its blocks, in order.

    Raises:
        DeviceMapError: with every fault found.
    """
    count = None if gpus is None else len(find_gpus(gpus))
    return Placement.of(device_map, Shape.of(config).layers, count).blocks


def as_device(label: Label) -> torch.device:
    """The torch.device of a label; 0 is cuda:0."""
    return torch.device("cuda", label) if isinstance(label, int) else torch.device(label)


def device_of(name: str, placement: Placement) -> torch.device | None:
    """Device of a parameter or buffer by its full name, or None if the placement does not say."""
    pieces = name.split(".")
    parts = (".".join(pieces[:count]) for count in range(len(pieces), 0, -1))
    return next((as_device(placement.map[part]) for part in parts if part in placement.map), None)


def check_placement(model: PreTrainedModel, placement: Placement, dtype: torch.dtype) -> int:
    """Assert that every parameter has memory, is on its device and of `dtype`; buffers must have memory.

    Args:
        model: a ChatGLMForConditionalGeneration.
        placement: where its parts should be.
        dtype: of all parameters.

    Returns:
        how many tensors were looked at.

    Raises:
        RuntimeError: names the first offender, what it is and what it should be.
    """
    check_filled(model)
    count = len(list(model.named_buffers()))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        wanted = device_of(name, placement)
        if wanted is not None and parameter.device != wanted:
            raise RuntimeError(f"{name} is on {parameter.device}, the device map says {wanted}")
        if parameter.dtype != dtype:
            raise RuntimeError(f"{name} is {parameter.dtype}, {dtype} was asked for")
        count += 1
    return count


def check_filled(model: PreTrainedModel) -> None:
    """Assert that no parameter and no buffer is left without memory.

    Raises:
        RuntimeError: names the first one.
    """
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.device.type == "meta":
            raise RuntimeError(f"{name} is still on meta: no weight was loaded into it")
    for name, buffer in model.named_buffers():
        if buffer.device.type == "meta":
            raise RuntimeError(f"the buffer {name} is still on meta: the model was built without memory and not filled")
