"""Which base is this, and has a bit of it changed?

    fingerprint     64 samples of every frozen matrix  ->  16 digits: tells one base from another in a second
    base_checksum   every bit of every frozen weight   ->  16 digits: proves that training left the base alone

The checksum is computed where the weights lie: only two numbers a tensor leave the GPU. With the bits of a tensor read
as integers x[0], x[1] ...:

    sum of x[i]   and   sum of x[i] * (i + 1)        in 64-bit arithmetic that wraps around

Any single changed bit changes the first sum, and two swapped values of up to 32 bits change the second.
"""

import hashlib

import torch
from torch import Tensor, nn

PIECE = 2**22
"""Values of a tensor that are widened to 64 bits at a time: 32 MiB."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _plain(name: str) -> str:
    """A parameter's name as in the base, whether an adapter is attached or not."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def fingerprint(model: nn.Module) -> str:
    """16 hex digits that tell one base from another: shape, and samples of every frozen 2-D weight.

    Adapters, and the dtype a base was loaded in, do not change it.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" in name or parameter.dim() != 2:
            continue
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.float16)
        digest.update(f"{_plain(name)} {tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def base_checksum(model: nn.Module) -> str:
    """16 hex digits of all bits of all weights but the adapter's; equal before and after training.

    Reads everything once: about a second for 12 GB on a GPU. Another dtype gives another checksum.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            sums = tensor_sums(parameter.detach())
            digest.update(f"{_plain(name)} {tuple(parameter.shape)} {parameter.dtype} {sums}".encode())
    return digest.hexdigest()[:16]


def tensor_sums(tensor: Tensor) -> tuple[int, int]:
    """The two sums of the module's docstring, for a tensor of any dtype on any device."""
    bits = tensor.reshape(-1).view(_INTEGERS[tensor.element_size()])
    weights = torch.arange(1, 1 + min(PIECE, bits.numel()), device=tensor.device)
    totals = torch.zeros(2, device=tensor.device, dtype=torch.int64)
    for number, piece in enumerate(bits.split(PIECE)):
        wide = piece.to(torch.int64)
        # The piece's number goes in too, so that two pieces cannot change places unseen.
        totals[0] += wide.sum()
        totals[1] += (wide * weights[: len(wide)]).sum() * (2 * number + 1)
    first, second = totals.tolist()
    return first, second
