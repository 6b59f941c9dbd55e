"""Which base is this, and has a bit of it changed?

    fingerprint     64 samples of every frozen matrix  ->  16 digits: tells one base from another in a second
    base_checksum   every bit of every frozen weight   ->  16 digits: proves that training left the base alone

The checksum is computed where the weights lie: only two numbers a tensor leave the GPU. With the bits of a tensor read
as integers x[0], x[1] ...:

    sum of x[i]   and   sum of x[i] * (i + 1)        in 64-bit arithmetic that wraps around

Any single changed bit changes the first sum, and two swapped values of up to 32 bits change the second.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

PIECE = 2**22
"""Values of a tensor that are widened to 64 bits at a time: 32 MiB."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def frozen(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name in the base, parameter) of everything that is no adapter and no learnt prefix."""
    net: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, parameter in net.named_parameters():
        if "lora_" not in name and "prefix_encoder." not in name:
            yield name.removeprefix("base_model.model.").replace(".base_layer", ""), parameter


Weights = Iterable[tuple[str, tuple[int, ...], Callable[[], Tensor]]]
"""(name in the base, shape, how to get up to 64 samples) of every weight."""

SIZES = ("num_layers", "hidden_size", "inner_hidden_size", "vocab_size")
"""Fields of the configuration that a `base_note` records."""


def _parameters(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
    """(name, shape, how to get its samples) of every frozen weight of a model."""
    for name, parameter in frozen(model):
        yield name, tuple(parameter.shape), partial(_evenly, parameter.detach().reshape(-1))


def weight_samples(model: nn.Module) -> list[tuple[str, tuple[int, ...], Tensor]]:
    """(name in the base, shape, up to 64 samples on the CPU) of every frozen weight of a model, or of a part of one.

    The parts' lists, one behind the other, are the weights of `note_of` if each tensor is wrapped in a function.
    """
    return [(name, shape, samples().cpu()) for name, shape, samples in _parameters(model)]


def _evenly(flat: Tensor) -> Tensor:
    """Up to 64 numbers of a tensor [n]."""
    return flat[:: max(1, len(flat) // 64)][:64]


def _samples(weights: Weights) -> Iterator[tuple[str, bytes]]:
    """(name, shape and samples) of every frozen 2-D weight.

    A head that equals the embedding is left out: where both lie on one device they are a single tensor, on two GPUs
    they are two, and it is the same base.
    """
    embedding = b""
    for plain, shape, samples in weights:
        if len(shape) != 2:
            continue
        found = f"{shape}".encode() + samples().to("cpu", torch.float16).numpy().tobytes()
        if plain == "transformer.word_embeddings.weight":
            embedding = found
        if plain != "lm_head.weight" or found != embedding:
            yield plain, found


def fingerprint(model: nn.Module) -> str:
    """16 hex digits that tell one base from another: shape, and samples of every frozen 2-D weight.

    Adapters, float16 or float32, and where its parts lie do not change it. bfloat16 does: it rounds the weights.
    """
    return _digest(_samples(_parameters(model)))


def _digest(samples: Iterable[tuple[str, bytes]]) -> str:
    digest = hashlib.sha256()
    for name, found in samples:
        digest.update(f"{name} ".encode() + found)
    return digest.hexdigest()[:16]


def base_bits(model: nn.Module) -> int:
    """Bits of a weight in the blocks' matrices: 16 (or 32, which counts as the same), or packed to 8 or 4."""
    return 8 if getattr(model, "is_loaded_in_8bit", False) else 4 if getattr(model, "is_loaded_in_4bit", False) else 16


def base_note(model: nn.Module) -> dict[str, Any]:
    """What is recorded of a base beside an adapter, ready for JSON: enough to name the difference to another base."""
    return note_of(_parameters(model), model.config, base_bits(model))


def note_of(weights: Weights, config: Any, bits: int = 16) -> dict[str, Any]:
    """`base_note` of weights that are on a model or in files, in the order of the model.

    Args:
        weights: (name in the base, shape, how to get up to 64 samples) of every weight.
        config: its configuration.
        bits: of a weight in the blocks.
    """
    weights = list(weights)
    parts: dict[str, Any] = {}
    for name, found in _samples(weights):
        fields = name.split(".")
        part = ".".join(fields[:3] if fields[1] == "layers" else fields[:-1])
        parts.setdefault(part, hashlib.sha256()).update(f"{name} ".encode() + found)
    return {
        "fingerprint": _digest(_samples(weights)),
        "vectors": _vectors(weights),
        "sizes": {name: getattr(config, name) for name in SIZES},
        "bits": bits,
        "parts": {part: digest.hexdigest()[:8] for part, digest in parts.items()},
    }


def base_difference(noted: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """In words what sets the base of one `base_note` apart from that of another, or None if they are the same."""
    if noted["fingerprint"] == here["fingerprint"]:
        # Notes of before 0.2 know nothing of norms and biases.
        same = noted.get("vectors") in (None, here["vectors"])
        return None if same else "the same matrices, but other norms or biases"
    sizes = noted.get("sizes") or {}
    told = [
        f"{name} {sizes.get(name)} there, {size} here"
        for name, size in here["sizes"].items()
        if sizes.get(name) != size
    ]
    if noted.get("bits", here["bits"]) != here["bits"]:
        told.append(f"blocks in {noted['bits']} bits there, in {here['bits']} here")
    if not told:
        there, mine = noted.get("parts") or {}, here["parts"]
        names = [name for name in {**there, **mine} if there.get(name) != mine.get(name)]
        told.append(f"the same sizes, but other weights in {len(names)} of {len(mine)} parts: {_few(names)}")
    return "; ".join(told)


def _vectors(weights: Weights) -> str:
    """16 hex digits of samples of norms and biases, the same in float16 and float32."""
    digest = hashlib.sha256()
    for name, shape, samples in sorted(weights, key=lambda weight: weight[0]):
        if len(shape) == 1:
            digest.update(f"{name} {shape} ".encode() + samples().to("cpu", torch.float16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _few(names: list[str], count: int = 3) -> str:
    """The first names, and that there are more."""
    return ", ".join(names[:count]) + (" ..." if len(names) > count else "")


def base_checksum(model: nn.Module) -> str:
    """16 hex digits of all bits of all weights but the adapter's; equal before and after training.

    Reads everything once: about a second for 12 GB on a GPU. Another dtype gives another checksum.
    """
    digest = hashlib.sha256()
    for name, parameter in frozen(model):
        sums = tensor_sums(parameter.detach())
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {sums}".encode())
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
