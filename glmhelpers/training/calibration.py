"""Calibration: what this machine's GPUs and its host really need, in some seconds, for the planner.

    matrix products   the four matrices of a block, 2048 tokens    -> matrix_share     of the datasheet's rate
    real blocks       forward f and backward b with adapters, on   -> attention_share  two equations, two unknowns:
                      the GPU alone: the host starts all kernels      memory_share     f = products + x A + y E
                      while the GPU still sleeps                                       b = products + 2.5 x A + y E'
    copy              8 MiB from GPU 0 to GPU 1                    -> link
    cuBLAS, driver    what they take beside tensors                -> gemm_workspace, context
    the same blocks   16 tokens, the host's clock: how long it     -> launch_forward, _again, _backward
                      takes to start the kernels

A step of a split model is slow for one of two reasons: the GPUs compute, or they wait for the one Python process that
starts all kernels. The catalogue knows the first for one card and guesses the second for all. Here both are measured;
`kept_rates` keeps them, and from then on every plan for this machine counts with them.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glmhelpers.cost_model.gpus import GPU, find_gpu, gpus_here
from glmhelpers.cost_model.kept_rates import RATES, keep_rates, kept_rates
from glmhelpers.cost_model.sizes import Setting, Shape
from glmhelpers.cost_model.step_time import block_seconds
from glmhelpers.devicemap.activation_checkpointing import checkpoint_only
from glmhelpers.devicemap.check import part_names
from glmhelpers.training.measure import prepare, random_batch
from glmhelpers.training.pipeline import run_step
from glmhelpers.utils.markdown import markdown_table
from glmhelpers.utils.units import MIB
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration

TOKENS, ROWS, LENGTH = 2048, 2, 1024
BLOCKS, PARTS = 6, 2
"""Blocks on each GPU that are run, and micro-batches of the step that measures the host. It is one block, run so often
that what a step needs once hardly counts."""
SLEEP = 60_000_000
"""Cycles of the GPU's clock, 30 to 40 ms: longer than the host needs to start the blocks' kernels."""
SMALL_VOCABULARY: dict[str, Any] = {"vocab_size": 1000}
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


def measure_machine(config: Any = None, refresh: bool = False) -> Calibration:
    """Measure the GPUs and the host of this machine, or take what was kept of an earlier time.

    Needs some 1.5 GB on each GPU for some seconds (7 on the one H100 where it was timed): call it before a model is
    loaded.

    Args:
        config: ChatGLMConfig whose shapes the products have; None: those of ChatGLM-6B.
        refresh: measure again.

    Returns:
        the GPUs with measured rates; none where torch finds no GPU, and then nothing is kept.
    """
    started, count = time.perf_counter(), torch.cuda.device_count()
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    if count and (refresh or not set(names) <= set(kept_rates())):
        keep_rates({})  # shares are parts of the catalogue's rates
        sizes = config or ChatGLMConfig()
        host = host_launches(["cuda:0", f"cuda:{count - 1}"] if count > 1 else ["cuda:0"], sizes)
        link = {"link": copy_rate(0, 1)} if count > 1 else {}
        cards = gpus_here()
        measured = {}
        for index, name in enumerate(names):
            if name not in measured:
                measured[name] = {**card_rates(index, cards[index], sizes), **link, **host}
        keep_rates(measured)
        _drop_workspaces()
        torch.cuda.empty_cache()
    return Calibration(gpus_here(), time.perf_counter() - started)


def card_rates(index: int, card: GPU, config: Any) -> dict[str, float]:
    """Shares of the datasheet's rates that one GPU reaches, and what cuBLAS and the driver take on it."""
    device = torch.device("cuda", index)
    hidden, inner = config.hidden_size, config.inner_hidden_size
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
    shares: dict[str, Any] = {"matrix_share": operations / seconds / card.matrix_rate}
    found = shares | shares_of(*block_passes(device, config), replace(card, **shares), config)
    # Other processes count as the driver's, which no context of 2 GB and more is.
    sizes = {"gemm_workspace": workspace, "context": taken if taken < 2048 * MIB else 0}
    return found | {name: float(size) for name, size in sizes.items() if size > 0}


def _workspace() -> int:
    """Bytes that the first product of a thread makes cuBLAS keep; 0 where this cannot be seen."""
    if not _drop_workspaces():
        return 0
    x = torch.ones(64, 64, device="cuda", dtype=torch.float16)
    before = torch.cuda.memory_allocated()
    product = x @ x
    return torch.cuda.memory_allocated() - before - product.nbytes


def _drop_workspaces() -> bool:
    """Give back what cuBLAS keeps for the streams of this process, if this torch can."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()
    return clear is not None


def gpu_seconds(work: Callable[[], Tensor], repeats: int = 5) -> float:
    """Seconds of GPU time for one call, the shortest of some."""
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times)


def copy_rate(source: int, target: int, size: int = 8 * MIB, repeats: int = 20) -> float:
    """Bytes a second from one GPU to another."""
    block = torch.ones(size, device=f"cuda:{source}", dtype=torch.uint8)
    for count in (2, repeats):
        torch.cuda.synchronize(target)
        begin = time.perf_counter()
        for _ in range(count):
            block.to(f"cuda:{target}")
        torch.cuda.synchronize(source)
        torch.cuda.synchronize(target)
    return repeats * size / (time.perf_counter() - begin)


def random_blocks(devices: list[str], config: Any) -> Any:
    """A model with one random block of these sizes on each device, run `BLOCKS` times, with adapters."""
    blocks = len(devices)
    own = {name: getattr(config, name) for name in ("hidden_size", "inner_hidden_size", "num_attention_heads")}
    few = ChatGLMConfig(num_layers=blocks, **own, **SMALL_VOCABULARY, **SPECIAL)
    embedding, *layers, norm, head = part_names(blocks)
    with torch.device("meta"):
        model: Any = ChatGLMForConditionalGeneration(few)
    places = {embedding: devices[-1], **dict(zip(layers, devices, strict=True)), norm: devices[-1], head: devices[-1]}
    for name, parameter in list(model.named_parameters()):
        home = next(place for part, place in places.items() if name.startswith(f"{part}."))
        value = torch.empty(parameter.shape, dtype=torch.float16 if "cuda" in home else torch.float32, device=home)
        owner, _, leaf = name.rpartition(".")
        # Small enough for float16 in every layer, whatever the norms of random weights do.
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value.normal_(std=0.02), requires_grad=False))
    model.tie_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = prepare(model.place(places), [])
    inner = model.get_base_model().transformer
    inner.layers = nn.ModuleList([layer for layer in inner.layers for _ in range(BLOCKS)])
    inner.config.num_layers = len(inner.layers)  # or the model would stop behind the first
    return model


def block_passes(device: torch.device, config: Any, repeats: int = 3) -> tuple[float, float]:
    """Seconds of GPU time of one block, forward and backward, for `ROWS` rows of `LENGTH` tokens."""
    model = random_blocks([str(device)], config)
    batch = {name: ids.to(device) for name, ids in random_batch(model.config, ROWS, LENGTH).items()}
    times = []
    for _ in range(repeats + 1):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        torch.cuda._sleep(SLEEP)
        marks[0].record()
        loss = model(**batch, use_cache=False, return_logits=False).loss
        marks[1].record()
        torch.cuda.synchronize(device)
        torch.cuda._sleep(SLEEP)
        marks[2].record()
        loss.backward()
        marks[3].record()
        torch.cuda.synchronize(device)
        times.append([first.elapsed_time(last) / 1e3 / BLOCKS for first, last in (marks[:2], marks[2:])])
    return min(ahead for ahead, _ in times[1:]), min(back for _, back in times[1:])


def shares_of(forward: float, backward: float, card: GPU, config: Any) -> dict[str, float]:
    """The attention and memory shares with which the time model gives these seconds of one block.

    The model is linear in their inverses, so two passes tell two shares. Where noise makes one of them negative, both
    are the catalogue's, stretched by one factor; as they are where no time is left for them.

    Args:
        forward: seconds of one block, measured, and
        backward: the same for the backward pass.
        card: with the matrix share measured.
        config: whose sizes the block has.
    """
    shape, setting = Shape.of(config), Setting(batch_size=ROWS, seq_length=LENGTH)

    def passes(attention: float, memory: float) -> tuple[float, float]:
        ahead, _, back = block_seconds(shape, setting, replace(card, attention_share=attention, memory_share=memory))
        return ahead, back

    never = 1e9  # a rate at which this work takes no time
    products, attention, moved = passes(never, never), passes(1.0, never), passes(never, 1.0)
    a, b = attention[0] - products[0], moved[0] - products[0]
    c, d = attention[1] - products[1], moved[1] - products[1]
    rest = forward - products[0], backward - products[1]
    x = (rest[0] * d - b * rest[1]) / (a * d - b * c)
    y = (a * rest[1] - c * rest[0]) / (a * d - b * c)
    if sum(rest) <= 0:  # faster than its own products: a wrong measurement, of which nothing is believed
        x, y = 1 / card.attention_share, 1 / card.memory_share
    elif min(x, y) <= 0:
        stretch = sum(rest) / (sum(passes(card.attention_share, card.memory_share)) - sum(products))
        x, y = stretch / card.attention_share, stretch / card.memory_share
    return {"attention_share": 1 / x, "memory_share": 1 / y}


def host_launches(devices: list[str], config: Any, repeats: int = 5) -> dict[str, float]:
    """Seconds that the host needs to start one block: forward, forward again, backward; split over these devices.

    A whole step with adapters, micro-batches and loss, on so few tokens that nothing waits for a GPU.
    """
    model = random_blocks(devices, config)
    blocks = BLOCKS * len(devices)
    each, batch = 1 / (blocks * PARTS), random_batch(model.config, PARTS, 16)
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
    """Forward and backward pass of a step, medians of some, in seconds of the host."""
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
    return statistics.median(ahead for ahead, _ in times[1:]), statistics.median(back for _, back in times[1:])


def _text(name: str, gpu: GPU) -> str:
    value = getattr(gpu, name)
    if name.startswith("launch"):
        return f"{1e3 * value:.2f} ms"
    if name == "link":
        return f"{value / 1e9:.1f} GB/s"
    return f"{value / MIB:.0f} MiB" if name in ("gemm_workspace", "context") else f"{value:.2f}"
