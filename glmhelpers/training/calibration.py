"""Calibration: what this machine's GPUs and its host really need, in about three seconds, for the planner.

    matrix products   the four matrices of a block, 2048 tokens          -> matrix_share       of the datasheet's rate
    attention         2 x 1024 tokens with a mask, all heads             -> attention_share
    elementwise       a sum of two large tensors                         -> memory_share       of the bandwidth
    copy              8 MiB from GPU 0 to GPU 1                          -> link
    cuBLAS, driver    what they take beside tensors                      -> gemm_workspace, context
    a real step       blocks of width 64: arithmetic for nothing, so     -> launch_forward, _again, _backward
                      what is left is the host, which starts kernels

A step of a split model is slow for one of two reasons: the GPUs compute, or they wait for the one Python process that
starts all kernels. The catalogue knows the first for one card and guesses the second for all. Here both are measured;
`kept_rates` keeps them, and from then on every plan for this machine counts with them.
"""

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glmhelpers.cost_model.gpus import GPU, find_gpu, gpus_here
from glmhelpers.cost_model.kept_rates import RATES, keep_rates, kept_rates
from glmhelpers.devicemap.activation_checkpointing import checkpoint_only
from glmhelpers.devicemap.check import part_names
from glmhelpers.training.measure import prepare, random_batch
from glmhelpers.training.pipeline import run_step
from glmhelpers.utils.markdown import markdown_table
from glmhelpers.utils.units import MIB
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration

TOKENS, ROWS, LENGTH = 2048, 2, 1024
BLOCKS, PARTS = 4, 2
"""Blocks on each GPU, and micro-batches, of the step that measures the host."""
NARROW: dict[str, Any] = {"hidden_size": 64, "inner_hidden_size": 128, "num_attention_heads": 4, "vocab_size": 1000}
SPECIAL: dict[str, Any] = {"bos_token_id": 4, "eos_token_id": 5, "mask_token_id": 0, "gmask_token_id": 1}


@dataclass(frozen=True)
class Calibration:
    """The GPUs of this machine as the planner takes them now, and how long it took to measure them."""

    gpus: list[GPU]
    seconds: float

    def __str__(self) -> str:
        """A Markdown table: one column a GPU, measured beside what the catalogue says."""
        rows = []
        for name in RATES:
            row: dict[str, Any] = {"": name}
            for index, gpu in enumerate(self.gpus):
                known = find_gpu(gpu.name if not gpu.name.endswith("GiB") else gpu.memory)
                row[f"GPU {index}: {gpu.name}"] = f"{_text(name, gpu)} (catalogue: {_text(name, known)})"
            rows.append(row)
        return markdown_table(rows) if self.gpus else "no GPU: nothing to measure"


def measure_machine(refresh: bool = False) -> Calibration:
    """Measure the GPUs and the host of this machine, or take what was kept of an earlier time.

    Needs some 300 MB on each GPU for three seconds; call it before a model is loaded.

    Args:
        refresh: measure again.

    Returns:
        the GPUs with measured rates; none where torch finds no GPU, and then nothing is kept.
    """
    started, count = time.perf_counter(), torch.cuda.device_count()
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    if count and (refresh or not set(names) <= set(kept_rates())):
        keep_rates({})  # shares are parts of the catalogue's rates
        host = host_launches(["cuda:0", f"cuda:{count - 1}"] if count > 1 else ["cuda:0"])
        link = {"link": copy_rate(0, 1)} if count > 1 else {}
        cards = gpus_here()
        measured = {}
        for index, name in enumerate(names):
            if name not in measured:
                measured[name] = {**card_rates(index, cards[index]), **link, **host}
        keep_rates(measured)
        torch.cuda.empty_cache()
    return Calibration(gpus_here(), time.perf_counter() - started)


def card_rates(index: int, card: GPU) -> dict[str, float]:
    """Shares of the datasheet's rates that one GPU reaches, and what cuBLAS and the driver take on it."""
    device, config = torch.device("cuda", index), ChatGLMConfig()
    hidden, inner, heads = config.hidden_size, config.inner_hidden_size, config.num_attention_heads
    free, total = torch.cuda.mem_get_info(device)
    taken = total - free - torch.cuda.memory_reserved(device)
    with torch.cuda.device(device), torch.no_grad():
        workspace = _workspace()
        seconds, operations = 0.0, 0.0
        for wide, narrow in ((3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner)):
            weight = torch.randn(wide, narrow, device=device, dtype=torch.float16)
            x = torch.randn(TOKENS, narrow, device=device, dtype=torch.float16)
            seconds += gpu_seconds(partial(F.linear, x, weight))
            operations += 2.0 * TOKENS * wide * narrow
            del weight, x
        query = torch.randn(ROWS, heads, LENGTH, hidden // heads, device=device, dtype=torch.float16)
        mask = torch.zeros(ROWS, 1, LENGTH, LENGTH, device=device, dtype=torch.float16)
        attention = gpu_seconds(lambda: F.scaled_dot_product_attention(query, query, query, mask))
        large = torch.ones(32 * MIB, device=device, dtype=torch.float16)
        moved = 3 * large.nbytes / gpu_seconds(lambda: large + large)
    found = {
        "matrix_share": operations / seconds / card.matrix_rate,
        "attention_share": 4.0 * ROWS * LENGTH * LENGTH * hidden / attention / card.matrix_rate,
        "memory_share": moved / card.bandwidth,
    }
    # Other processes count as the driver's, which no context of 2 GB and more is.
    sizes = {"gemm_workspace": workspace, "context": taken if taken < 2048 * MIB else 0}
    return found | {name: float(size) for name, size in sizes.items() if size > 0}


def _workspace() -> int:
    """Bytes that the first product of a thread makes cuBLAS keep; 0 where this cannot be seen."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is None:
        return 0
    clear()
    x = torch.ones(64, 64, device="cuda", dtype=torch.float16)
    before = torch.cuda.memory_allocated()
    product = x @ x
    return torch.cuda.memory_allocated() - before - product.nbytes


def gpu_seconds(work: Callable[[], Tensor]) -> float:
    """Seconds of GPU time for one call, the shortest of five."""
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times)


def copy_rate(source: int, target: int) -> float:
    """Bytes a second from one GPU to another, in pieces of 8 MiB."""
    repeats, block = 20, torch.ones(8 * MIB, device=f"cuda:{source}", dtype=torch.uint8)
    for count in (2, repeats):
        torch.cuda.synchronize(target)
        begin = time.perf_counter()
        for _ in range(count):
            block.to(f"cuda:{target}")
        torch.cuda.synchronize(source)
        torch.cuda.synchronize(target)
    return repeats * block.nbytes / (time.perf_counter() - begin)


def host_launches(devices: list[str], repeats: int = 4) -> dict[str, float]:
    """Seconds that the host needs to start one block: forward, forward again, backward; split over these devices.

    A whole step with adapters, micro-batches and loss, on blocks so narrow that the GPU waits.
    """
    blocks = BLOCKS * len(devices)
    config = ChatGLMConfig(num_layers=blocks, **NARROW, **SPECIAL)
    embedding, *layers, norm, head = part_names(blocks)
    homes = [devices[at * len(devices) // blocks] for at in range(blocks)]
    model: Any = ChatGLMForConditionalGeneration(config)
    model = model.to(torch.float16 if "cuda" in devices[0] else torch.float32)
    model.place({embedding: devices[-1], **dict(zip(layers, homes, strict=True)), norm: devices[-1], head: devices[-1]})
    each, batch = 1 / (blocks * PARTS), random_batch(config, PARTS, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = prepare(model, [])
    plain = _passes(model, batch, repeats)
    checkpoint_only(model, range(blocks))
    again = _passes(model, batch, repeats)
    return {
        # Head and loss are about as many kernels as a block.
        "launch_forward": plain[0] / ((blocks + 1) * PARTS),
        "launch_again": max((again[1] - plain[1]) * each, 1e-6),
        "launch_backward": plain[1] * each,
    }


def _passes(model: Any, batch: Mapping[str, Tensor], repeats: int) -> tuple[float, float]:
    """Fastest forward and backward pass of some steps, in seconds of the host."""
    times = []
    for _ in range(repeats + 1):
        marks = [time.perf_counter()]

        def backward(loss: Tensor, marks: list[float] = marks) -> None:
            marks.append(time.perf_counter())
            loss.backward()
            marks.append(time.perf_counter())

        run_step(model, batch, PARTS, backward=backward)
        model.zero_grad(set_to_none=True)
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    return min(ahead for ahead, _ in times[1:]), min(back for _, back in times[1:])


def _text(name: str, gpu: GPU) -> str:
    value = getattr(gpu, name)
    if name.startswith("launch"):
        return f"{1e3 * value:.2f} ms"
    if name == "link":
        return f"{value / 1e9:.1f} GB/s"
    return f"{value / MIB:.0f} MiB" if name in ("gemm_workspace", "context") else f"{value:.2f}"
