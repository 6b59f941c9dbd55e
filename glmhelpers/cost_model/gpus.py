"""GPUs that learners meet: how much fits on each, and how fast each is.

    "T4"          -> 14.75 GiB, 65 TFLOP/s, 320 GB/s     a name from the catalogue
    "15GiB"       -> that much memory, the speed of a T4  a size in words
    16106127360   -> the same                             a size in bytes

`memory` is what PyTorch reports as the device's total, which is less than the number on the box: a T4 of
"16 GB" has 15,360 MiB, of which the driver and error correction keep 256 MiB. Peak rates are the vendors'
datasheet figures for dense float16; `matrix_share`, `memory_share` and `attention_share` say which part of them a
training step reaches. On the H100 they were measured (see `step_time`). All others are estimates that nobody has
measured. The T4's 0.38 decides every second promised for a T4 and has no source: it was set by hand, without a T4.

The catalogue is for imagined machines. For the one at hand, `training.measure_machine` measures the shares, the link
and what the host needs to start a block; they are kept, and `known_gpu` takes them from then on.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

import torch

from glmhelpers.cost_model.kept_rates import kept_rates
from glmhelpers.utils.units import _SIZE, GIB, KIB, MIB, parse_size


@dataclass(frozen=True)
class GPU:
    """One GPU: its memory in bytes and its rates in units a second.

    Attributes:
        name: name in the catalogue, or the size it was made from.
        memory: bytes that PyTorch reports as the device's total.
        context: bytes the CUDA context takes before the first tensor (kernels are loaded lazily).
        matrix_rate: datasheet float16 multiply-add operations a second, two for each multiply-add.
        bandwidth: datasheet bytes a second to and from its memory.
        matrix_share: part of `matrix_rate` that matrix products reach, 0 to 1.
        memory_share: part of `bandwidth` that elementwise work reaches, 0 to 1.
        attention_share: part of `matrix_rate` that the memory-efficient attention kernel reaches. 0.11 is one H100's
            (8.7 TFLOP in 80 ms of 989 TFLOP/s), taken over for every card of the catalogue.
        launch_forward, launch_again, launch_backward: seconds that the host needs to start the kernels of one block:
            forward, forward again (a checkpointed block), backward. Not the card's but the machine's: 0.5 ms stands
            for the 0.27 to 1.1 ms that were measured on four hosts (benchmarks/launch.py).
        launch_step: seconds of a step in which the host starts no block: cutting the batch, clipping, Adam. Only
            measured; in the catalogue it is not counted.
        launch_graph: seconds that it needs to copy a segment's input and start its CUDA graph: 0.12 ms, measured on one
            host for a block alone.
        gemm_workspace: bytes that one cuBLAS handle keeps; forward and backward threads have one handle each.
        link: bytes a second to a neighbour GPU in the same machine.
    """

    name: str
    memory: int
    context: int
    matrix_rate: float
    bandwidth: float
    matrix_share: float
    memory_share: float = 0.65
    attention_share: float = 0.11
    launch_forward: float = 0.5e-3
    launch_again: float = 0.5e-3
    launch_backward: float = 0.5e-3
    launch_step: float = 0.0
    launch_graph: float = 0.12e-3
    gemm_workspace: int = 8 * MIB + 128 * KIB
    link: float = 6e9


def _gpu(name: str, gib: float, tflops: float, gbs: float, share: float, context_mib: int, **extra) -> GPU:
    return GPU(name, int(gib * GIB), context_mib * MIB, tflops * 1e12, gbs * 1e9, share, **extra)


CATALOGUE = {
    gpu.name: gpu
    for gpu in (
        _gpu("T4", 14.75, 65, 320, 0.38, 192),
        _gpu("P100", 15.89, 18.7, 732, 0.6, 256),
        _gpu("V100", 15.77, 112, 900, 0.6, 320, link=10e9),
        _gpu("L4", 22.17, 121, 300, 0.5, 320, link=10e9),
        _gpu("A10", 22.06, 125, 600, 0.5, 320, link=10e9),
        _gpu("A100-40GB", 39.39, 312, 1555, 0.7, 448, link=20e9),
        _gpu("A100", 79.15, 312, 2039, 0.7, 448, link=20e9),
        _gpu("H100", 79.11, 989, 3350, 0.74, 512, link=20e9, gemm_workspace=32 * MIB),
        _gpu("H200", 139.8, 989, 4800, 0.74, 512, link=20e9, gemm_workspace=32 * MIB),
    )
}
"""GPUs by name. Sizes of cards not seen by this project come from vendors' tables."""


def find_gpu(gpu: "GPU | str | int | float") -> GPU:
    """One GPU from a GPU, a catalogue name, or a memory size.

    A GPU known by its size only is taken to be as fast as a T4, so that plans stay comparable.

    Raises:
        ValueError: neither a name in the catalogue nor a size.
    """
    if isinstance(gpu, GPU):
        return gpu
    if isinstance(gpu, str) and not _SIZE.fullmatch(gpu):
        wanted = re.sub(r"^(nvidia|tesla)[ -]+", "", gpu.strip().lower()).removeprefix("tesla ")
        for name, known in CATALOGUE.items():
            if wanted == name.lower():
                return known
        raise ValueError(f"GPU {gpu!r} is not in the catalogue ({', '.join(CATALOGUE)}); give its size, as '15GiB'")
    size = parse_size(gpu)
    if size == 0:
        raise ValueError("a GPU needs some memory, but its size is 0 bytes")
    return replace(CATALOGUE["T4"], name=f"{size / GIB:.4g} GiB", memory=size)


def known_gpu(name: str, total: int) -> GPU:
    """A card of this machine by its driver's name ("Tesla T4", "NVIDIA A100-SXM4-40GB"), with its real memory.

    Speed, CUDA context and workspaces differ from card to card, so the name matters. A card that the catalogue does
    not have is known by its size alone. What was measured on this machine comes before what the catalogue says.

    Args:
        name: as the driver gives it.
        total: bytes.
    """
    words = re.split(r"[ -]", name)
    same = [gpu for gpu in CATALOGUE.values() if gpu.name.partition("-")[0] in words]
    card = min(same, key=lambda gpu: abs(gpu.memory - total)) if same else find_gpu(total)
    measured: Any = kept_rates().get(name, {})
    return replace(card, memory=total, **measured)


def find_gpus(gpus: "GPU | str | int | float | list | tuple") -> list[GPU]:
    """List of GPUs from a list of names or sizes; a single name or size is one GPU; "here" is this machine's.

    Raises:
        ValueError: the list is empty, one of its entries is unknown, or this machine has no GPU.
    """
    if isinstance(gpus, str) and gpus == "here":
        if not (found := gpus_here()):
            raise ValueError('gpus="here", but torch finds no GPU on this machine; name those to plan for, as ["T4"]')
        return found
    if not isinstance(gpus, list | tuple):
        gpus = [gpus]
    if not gpus:
        raise ValueError("no GPU was given; give at least one, as ['T4'] or '15GiB'")
    return [find_gpu(gpu) for gpu in gpus]


def one_host(gpus: "list[GPU]") -> list[GPU]:
    """The same cards with one host: of different seconds to start a block, the longest count for all."""
    names = ("launch_forward", "launch_again", "launch_backward", "launch_step", "launch_graph")
    return [replace(gpu, **{name: max(getattr(card, name) for card in gpus) for name in names}) for gpu in gpus]


def gpus_here() -> list[GPU]:
    """This machine's GPUs, by name where the catalogue has it, else by size; [] where there is none."""
    cards = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [known_gpu(card.name, card.total_memory) for card in cards]
