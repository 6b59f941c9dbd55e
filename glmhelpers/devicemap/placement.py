"""Where every part of the model belongs, and whether it is there.

{"transformer": 0, "lm_head": 1}   what a person writes
      |  expand_device_map         the longest name that fits wins
      v
{"transformer.word_embeddings": 0, "transformer.layers.0": 0, ..., "lm_head": 1}
      |  check_placement           after loading: device, dtype, nothing left without memory ("meta")
      v
silence, or the first parameter that is wrong
"""

from collections.abc import Mapping

import torch
from torch import nn

from glmhelpers.devicemap.check import part_names

Device = int | str | torch.device


def expand_device_map(num_layers: int, device_map: Mapping[str, Device] | Device | None) -> dict[str, Device]:
    """Part name -> device, for every part.

    Args:
        num_layers: number of blocks.
        device_map: names or beginnings of names ("transformer.layers", "" for all) -> device; or one device for
            everything; None: the CPU.

    Raises:
        ValueError: a part has no device, a name fits no part, or a device cannot be read.
    """
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        raise ValueError(f"device_map={device_map!r} is not planned here: pass a dict, such as run.device_map(config)")
    if not isinstance(device_map, Mapping):
        device_map = {"": "cpu" if device_map is None else device_map}
    parts, used, expanded = part_names(num_layers), set(), {}
    for part in parts:
        fitting = [name for name in device_map if not name or part == name or part.startswith(f"{name}.")]
        if not fitting:
            raise ValueError(f"the device map has no device for {part}: add it")
        expanded[part] = device_map[max(fitting, key=len)]
        used.update(fitting)
    if unused := [name for name in device_map if name not in used]:
        raise ValueError(f"the device map names {unused[0]!r}, the model has {parts[0]} ... {parts[-1]}")
    for part, device in expanded.items():
        as_device(device, part)
    return expanded


def as_device(device: Device, part: str = "the model") -> torch.device:
    """A torch.device; 0 is cuda:0.

    Raises:
        ValueError: it is no device, or a GPU that is not there; the message names `part`.
    """
    try:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"the device map sends {part} to {device!r}, which is no device: use 0, 1 or 'cpu'") from error
    if found.type == "cuda":
        found = torch.device("cuda", found.index or 0)
        if found.index >= torch.cuda.device_count():
            raise ValueError(
                f"the device map sends {part} to {found}, this machine has {torch.cuda.device_count()} GPUs"
            )
    return found


def device_of(name: str, expanded: Mapping[str, Device]) -> torch.device | None:
    """Device of a parameter or buffer by its full name, or None if the map does not place it."""
    for part, device in expanded.items():
        if name.startswith(f"{part}."):
            return as_device(device, part)
    return None


def check_placement(model: nn.Module, expanded: Mapping[str, Device], dtype: torch.dtype) -> int:
    """Assert that every parameter has memory, is on its device and of `dtype`; buffers must have memory.

    Args:
        model: a ChatGLMForConditionalGeneration.
        expanded: part name -> device, as `expand_device_map` gives it.
        dtype: of all parameters.

    Returns:
        how many tensors were looked at.

    Raises:
        RuntimeError: names the first offender, what it is and what it should be.
    """
    check_filled(model)
    count = len(list(model.named_buffers()))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        wanted = device_of(name, expanded)
        if wanted is not None and parameter.device != wanted:
            raise RuntimeError(f"{name} is on {parameter.device}, the device map says {wanted}")
        if parameter.dtype != dtype:
            raise RuntimeError(f"{name} is {parameter.dtype}, {dtype} was asked for")
        count += 1
    return count


def check_filled(model: nn.Module) -> None:
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
