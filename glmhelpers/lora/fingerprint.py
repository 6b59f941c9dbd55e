"""Which base is this, and has a bit of it changed?

    fingerprint     64 samples of every frozen matrix  ->  16 digits: tells one base from another in a second
    base_checksum   every bit of every frozen weight   ->  16 digits: proves that training left the base alone

The checksum is computed where the weights lie: only two numbers a tensor leave the GPU. With the bits of a tensor read
as integers x[0], x[1] ...:

    sum of x[i]   and   sum of x[i] * (i + 1)        in 64-bit arithmetic that wraps around

Any single changed bit changes the first sum, and two swapped values of up to 32 bits change the second.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

PIECE = 2**22
"""Values of a tensor that are widened to 64 bits at a time: 32 MiB."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _plain(name: str) -> str:
    """A parameter's name as in the base, whether an adapter is attached or not."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


SIZES = ("num_layers", "hidden_size", "inner_hidden_size", "vocab_size")
"""Fields of the configuration that a `base_note` records."""


def _samples(model: nn.Module) -> Iterator[tuple[str, bytes]]:
    """(name, shape and samples) of every frozen 2-D weight.

    A head that equals the embedding is left out: where both lie on one device they are a single tensor, on two GPUs
    they are two, and it is the same base.
    """
    embedding = b""
    for name, parameter in model.named_parameters():
        if "lora_" in name or parameter.dim() != 2:
            continue
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.float16).numpy().tobytes()
        found, plain = f"{tuple(parameter.shape)}".encode() + sample, _plain(name)
        if plain == "transformer.word_embeddings.weight":
            embedding = found
        if plain != "lm_head.weight" or found != embedding:
            yield plain, found


def fingerprint(model: nn.Module) -> str:
    """16 hex digits that tell one base from another: shape, and samples of every frozen 2-D weight.

    Adapters, the dtype a base was loaded in, and where its parts lie do not change it.
    """
    digest = hashlib.sha256()
    for name, found in _samples(model):
        digest.update(f"{name} ".encode() + found)
    return digest.hexdigest()[:16]


def base_bits(model: nn.Module) -> int:
    """Bits of a weight in the blocks' matrices: 16 (or 32, which counts as the same), or packed to 8 or 4."""
    return 8 if getattr(model, "is_loaded_in_8bit", False) else 4 if getattr(model, "is_loaded_in_4bit", False) else 16


def base_note(model: nn.Module) -> dict[str, Any]:
    """What is recorded of a base beside an adapter, ready for JSON: enough to name the difference to another base."""
    parts: dict[str, Any] = {}
    for name, found in _samples(model):
        fields = name.split(".")
        part = ".".join(fields[:3] if fields[1] == "layers" else fields[:-1])
        parts.setdefault(part, hashlib.sha256()).update(f"{name} ".encode() + found)
    return {
        "fingerprint": fingerprint(model),
        "sizes": {name: getattr(model.config, name) for name in SIZES},
        "bits": base_bits(model),
        "parts": {part: digest.hexdigest()[:8] for part, digest in parts.items()},
    }


def base_difference(noted: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """In words what sets the base of one `base_note` apart from that of another, or None if they are the same."""
    if noted["fingerprint"] == here["fingerprint"]:
        return None
    told = [
        f"{name} {noted['sizes'].get(name)} there, {size} here"
        for name, size in here["sizes"].items()
        if noted["sizes"].get(name) != size
    ]
    if noted["bits"] != here["bits"]:
        told.append(f"blocks in {noted['bits']} bits there, in {here['bits']} here")
    if not told:
        there, mine = noted["parts"], here["parts"]
        names = [name for name in {**there, **mine} if there.get(name) != mine.get(name)]
        told.append(f"the same sizes, but other weights in {len(names)} of {len(mine)} parts: {_few(names)}")
    return "; ".join(told)


def _few(names: list[str], count: int = 3) -> str:
    """The first names, and that there are more."""
    return ", ".join(names[:count]) + (" ..." if len(names) > count else "")


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
