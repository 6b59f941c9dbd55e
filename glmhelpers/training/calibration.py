"""Calibration: what this machine's GPUs and its host really need, in some seconds, for the planner.

    matrix products   the four matrices of a block, 2048 tokens    -> matrix_share     of the datasheet's rate
    real blocks       forward f and backward b with adapters, on   -> attention_share  two equations, two unknowns:
                      the GPU alone: the host starts all kernels      memory_share     f = products + x A + y E
                      while the GPU still sleeps                                       b = products + 2.5 x A + y E'
    copy              8 MiB from GPU 0 to GPU 1                    -> link
    cuBLAS, driver    what they take beside tensors                -> gemm_workspace, context
    a step of blocks  16 tokens, the host's clock: how long it     -> launch_forward, _again, _backward
                      takes to start the kernels of a block,          launch_step
                      and what it does once a step

A step of a split model is slow for one of two reasons: the GPUs compute, or they wait for the one Python process that
starts all kernels. The catalogue knows the first for one card and guesses the second for all. Here both are measured;
`kept_rates` keeps them, and from then on every plan for this machine counts with them.

Each measurement has a share of the time and repeats until that is used up, however slow the machine is. Its first time,
which loads kernels, is not part of that: else two repeats would be all that is left. The blocks are modules of their
own, as in a model, but all of them on one GPU share one block's frozen weights.

The host is timed on one GPU, in short steps without and with checkpointing in turn, and of each figure the lower
quartile counts (`utils.timing` says why). What it does at a cut between two GPUs is in no figure.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
from glmhelpers.utils.timing import Laps, lower_quartile, repeated
from glmhelpers.utils.units import MIB
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration

TOKENS, ROWS, LENGTH = 2048, 2, 1024
GPU_BLOCKS, HOST_BLOCKS, PARTS = 4, 6, 2
"""Blocks that are run to time a GPU and the host, and micro-batches of the step that times the host: a GPU takes some
1,000 kernels ahead of its work, and a host that waits for room is not timed."""
PRODUCTS, PASSES, COPIES, STEPS = 0.04, 0.25, 0.1, 0.8
"""Seconds for each of the four products, for blocks, for copies, and for the host's steps (with and without)."""
SLEEP = 60_000_000
"""Cycles of the GPU's clock, 30 to 40 ms, at first; then twice as long as the host needed to start the kernels of the
pass before, which may be the shorter one; a quarter of this at least and four times this at most."""
PLAUSIBLE = 1.5
"""No share is larger: some reach 1.35, where a cache serves what the model counts as memory."""
SMALL_VOCABULARY: dict[str, Any] = {"vocab_size": 1000}
SPECIAL: dict[str, Any] = {"bos_token_id": 4, "eos_token_id": 5, "mask_token_id": 0, "gmask_token_id": 1}


@dataclass(frozen=True)
class Calibration:
    """The GPUs of this machine as the planner takes them now.

    Attributes:
        gpus: with measured rates.
        seconds: that measuring took.
        start_seconds: that CUDA took to start and to load each kernel that a step needs, as any first step would.
        notes: what could not be measured, in words.
        parts: seconds of each part of both but CUDA's own start; "first ..." is loading.
    """

    gpus: list[GPU]
    seconds: float
    start_seconds: float = 0.0
    notes: tuple[str, ...] = ()
    parts: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """A Markdown table: one column a GPU, measured beside what the catalogue says."""
        rows = []
        for name in RATES:
            row: dict[str, Any] = {"": name}
            for index, gpu in enumerate(self.gpus):
                known = find_gpu(gpu.name if not gpu.name.endswith("GiB") else gpu.memory)
                row[f"GPU {index}: {gpu.name}"] = f"{_text(name, gpu)} (catalogue: {_text(name, known)})"
            rows.append(row)
        return "\n\n".join([markdown_table(rows), *self.notes]) if self.gpus else "no GPU: nothing to measure"


def measure_machine(config: Any = None, refresh: bool = False) -> Calibration:
    """Measure the GPUs and the host of this machine, or take what was kept of an earlier time.

    Needs some 1.5 GB on each GPU for 2 seconds, once CUDA has started and loaded its kernels, which took 6 on an H200:
    call it before a model is loaded.

    Args:
        config: ChatGLMConfig whose shapes the products have; None: those of ChatGLM-6B.
        refresh: measure again.

    Returns:
        the GPUs with measured rates; none where torch finds no GPU, and then nothing is kept.
    """
    begun, count = time.perf_counter(), torch.cuda.device_count()
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    notes: list[str] = []
    started, parts = begun, {}
    if count and (refresh or not set(names) <= set(kept_rates())):
        for index in range(count):
            x = torch.ones(64, 64, device=f"cuda:{index}", dtype=torch.float16)
            x.mm(x)
            torch.cuda.synchronize(index)
        laps = Laps()
        started = laps.since
        keep_rates({})  # shares are parts of the catalogue's rates
        sizes = config or ChatGLMConfig()
        # On one GPU: what the host does at a cut would count as its few blocks' time here, and 28 times in a plan.
        host = host_launches(["cuda:0"], sizes, laps)
        link = {"link": copy_rate(0, 1)} if count > 1 else {}
        laps.end("copies")
        cards = gpus_here()
        measured = {}
        for index, name in enumerate(names):
            if name not in measured:
                measured[name] = {**card_rates(index, cards[index], sizes, notes, laps), **link, **host}
        keep_rates(measured)
        clear_workspaces()
        torch.cuda.empty_cache()
        laps.end("giving back")
        parts = laps.parts
    loading = sum(seconds for part, seconds in parts.items() if part.startswith("first "))
    measuring = time.perf_counter() - started - loading
    return Calibration(gpus_here(), measuring, started - begun + loading, tuple(notes), parts)


def card_rates(index: int, card: GPU, config: Any, notes: list[str], laps: Laps) -> dict[str, float]:
    """Shares of the datasheet's rates that one GPU reaches, and what cuBLAS and the driver take on it.

    Shares that cannot be are left out, so that the catalogue's count, and `notes` says so.
    """
    device = torch.device("cuda", index)
    hidden, inner = config.hidden_size, config.inner_hidden_size
    with torch.cuda.device(device), torch.no_grad():
        workspace = _workspace()
        seconds, operations = 0.0, 0.0
        for wide, narrow in ((3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner)):
            weight = torch.randn(wide, narrow, device=device, dtype=torch.float16)
            x = torch.randn(TOKENS, narrow, device=device, dtype=torch.float16)
            seconds += min(repeated(PRODUCTS, partial(gpu_seconds, partial(F.linear, x, weight))))
            operations += 2.0 * TOKENS * wide * narrow
            del weight, x
    laps.end("products")
    shares: dict[str, Any] = {"matrix_share": operations / seconds / card.matrix_rate}
    passes = block_passes(device, config, laps)
    found = shares | shares_of(*passes, replace(card, **shares), config)
    if not all(0 < share <= PLAUSIBLE for share in found.values()) or sum(passes) < 2 * seconds:
        notes.append(
            f"GPU {index}: a block took {1e3 * passes[0]:.2f} ms forward and {1e3 * passes[1]:.2f} ms backward, its "
            f"products alone {1e3 * seconds:.2f} ms: that cannot be, so the catalogue's shares count. Is another "
            "program at work on this GPU? Measure again: measure_machine(refresh=True)"
        )
        found = {}
    # Now that this GPU has loaded its kernels. Other processes count as the driver's: no context has 2 GB and more.
    free, total = torch.cuda.mem_get_info(device)
    taken = total - free - torch.cuda.memory_reserved(device)
    sizes = {"gemm_workspace": workspace, "context": taken if taken < 2048 * MIB else 0}
    return found | {name: float(size) for name, size in sizes.items() if size > 0}


def clear_workspaces() -> bool:
    """Give back what cuBLAS keeps for each of its streams, 8 or 32 MiB; False where torch has no way to do so."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()
    return clear is not None


def _workspace() -> int:
    """Bytes that the first product of a thread makes cuBLAS keep; 0 where this cannot be seen."""
    if not clear_workspaces():
        return 0
    x = torch.ones(64, 64, device="cuda", dtype=torch.float16)
    before = torch.cuda.memory_allocated()
    product = x @ x
    return torch.cuda.memory_allocated() - before - product.nbytes


def gpu_seconds(work: Callable[[], Tensor]) -> float:
    """Seconds of GPU time for one call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def copy_rate(source: int, target: int, size: int = 8 * MIB, count: int = 10) -> float:
    """Bytes a second from one GPU to another."""
    block = torch.ones(size, device=f"cuda:{source}", dtype=torch.uint8)

    def copies() -> float:
        torch.cuda.synchronize(target)
        begin = time.perf_counter()
        for _ in range(count):
            block.to(f"cuda:{target}")
        torch.cuda.synchronize(source)
        torch.cuda.synchronize(target)
        return time.perf_counter() - begin

    return count * size / min(repeated(COPIES, copies))


def random_blocks(devices: list[str], config: Any, blocks: int) -> Any:
    """A model of random blocks of these sizes with adapters, spread evenly; those on one device share their weights."""
    own = {name: getattr(config, name) for name in ("hidden_size", "inner_hidden_size", "num_attention_heads")}
    few = ChatGLMConfig(num_layers=blocks, **own, **SMALL_VOCABULARY, **SPECIAL)
    embedding, *layers, norm, head = part_names(blocks)
    with torch.device("meta"):
        model: Any = ChatGLMForConditionalGeneration(few)
    homes = [devices[layer * len(devices) // blocks] for layer in range(blocks)]
    places = {embedding: devices[-1], **dict(zip(layers, homes, strict=True)), norm: devices[-1], head: devices[-1]}
    weights: dict[tuple[str, str], nn.Parameter] = {}
    for name, parameter in list(model.named_parameters()):
        part = next(part for part in places if name.startswith(f"{part}."))
        key = places[part], name.removeprefix(part) if part in layers else name
        if key not in weights:
            dtype = torch.float16 if "cuda" in key[0] else torch.float32
            # Small enough for float16 in every layer, whatever the norms of random weights do.
            value = torch.empty(parameter.shape, dtype=dtype, device=key[0]).normal_(std=0.02)
            weights[key] = nn.Parameter(value, requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, weights[key])
    model.tie_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prepare(model.place(places), [])


def block_passes(device: torch.device, config: Any, laps: Laps) -> tuple[float, float]:
    """Seconds of GPU time of one block, forward and backward, for `ROWS` rows of `LENGTH` tokens."""
    model, cycles = random_blocks([str(device)], config, GPU_BLOCKS), SLEEP
    laps.end("model for the GPU")
    batch = {name: ids.to(device) for name, ids in random_batch(model.config, ROWS, LENGTH).items()}

    def behind_sleep(work: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds of GPU time of what `work` starts, all of it before the GPU wakes up."""
        nonlocal cycles
        begin, awake, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda.synchronize(device)
        begin.record()
        torch.cuda._sleep(cycles)
        awake.record()
        clock = time.perf_counter()
        result = work()
        host = time.perf_counter() - clock
        end.record()
        torch.cuda.synchronize(device)
        slept = begin.elapsed_time(awake) / 1e3
        # The first call loads kernels and needs much longer than any other.
        cycles = int(min(max(2 * cycles * host / slept, SLEEP / 4), 4 * SLEEP))
        return awake.elapsed_time(end) / 1e3 / GPU_BLOCKS, result

    def passes() -> tuple[float, float]:
        ahead, loss = behind_sleep(lambda: model(**batch, use_cache=False, return_logits=False).loss)
        return ahead, behind_sleep(loss.backward)[0]

    with torch.cuda.device(device):
        found = repeated(PASSES, passes, warm=lambda: laps.end("first passes"))
    laps.end("passes")
    forward, backward = zip(*found, strict=True)
    return min(forward), min(backward)


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


def host_launches(devices: list[str], config: Any, laps: Laps, blocks: int = HOST_BLOCKS) -> dict[str, float]:
    """Seconds that the host needs to start one block of this model: forward, forward again, backward; and once a step.

    A whole step with adapters, micro-batches, loss, clipping and Adam, split over these devices, on so few tokens that
    nothing waits for a GPU. What a micro-batch needs besides its blocks (masks, head, loss) is shared out among the
    blocks of the whole model. Clipping and Adam have the adapters of the whole model to go through: they need longer
    for more tensors.
    """
    model, layers = random_blocks(devices, config, blocks), config.num_layers
    laps.end("model for the host")
    plain, again = _steps(model, layers - blocks, laps)
    each = 1 / (blocks * PARTS)
    return {
        # Head and loss are about as many kernels as a block.
        "launch_forward": (layers * each * plain["blocks"] + plain["beside"] / PARTS) / (layers + 1),
        "launch_again": max(sum(again[name] - plain[name] for name in ("blocks", "beside", "backward")) * each, 1e-6),
        "launch_backward": each * plain["backward"],
        "launch_step": plain["once"],
    }


def _steps(model: Any, missing: int, laps: Laps) -> list[dict[str, float]]:
    """Seconds of the host in a step: in blocks and beside them, backward, and once; with no block checkpointed, and
    with all. `missing`: blocks of the whole model that are not here, but for their adapters."""
    layers = model.get_base_model().transformer.layers
    own = [parameter for parameter in layers[-1].parameters() if parameter.requires_grad]
    others = [nn.Parameter(torch.zeros_like(parameter)) for _ in range(missing) for parameter in own]
    slopes = [torch.zeros_like(parameter) for parameter in others]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad] + others
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    batch = random_batch(model.config, PARTS, 16)
    starts: list[float] = []
    ends: list[float] = []

    def step(checkpointed: range) -> dict[str, float]:
        checkpoint_only(model, checkpointed)
        starts.clear()
        ends.clear()
        for parameter, slope in zip(others, slopes, strict=True):
            parameter.grad = slope
        marks = [time.perf_counter()]

        def backward(loss: Tensor) -> None:
            marks.append(time.perf_counter())
            loss.backward()
            marks.append(time.perf_counter())

        run_step(model, batch, PARTS, backward=backward)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        begin, ahead, back, end = *marks, time.perf_counter()
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)
        # Of blocks that run again, the first PARTS starts are those of the forward pass.
        blocks = sum(ends[:PARTS]) - sum(starts[:PARTS])
        once = starts[0] - begin + end - back
        return {"blocks": blocks, "beside": ahead - starts[0] - blocks, "backward": back - ahead, "once": once}

    hooks = [
        layers[0].register_forward_pre_hook(lambda *_: starts.append(time.perf_counter())),
        layers[-1].register_forward_hook(lambda *_: ends.append(time.perf_counter())),
    ]
    rules = (range(0), range(len(layers)))
    try:
        turns = repeated(STEPS, lambda: [step(rule) for rule in rules], warm=lambda: laps.end("first steps"))
    finally:
        for hook in hooks:
            hook.remove()
    laps.end("steps")
    return [
        {name: lower_quartile([one[name] for one in steps]) for name in steps[0]} for steps in zip(*turns, strict=True)
    ]


def _text(name: str, gpu: GPU) -> str:
    value = getattr(gpu, name)
    if name.startswith("launch"):
        return f"{1e3 * value:.2f} ms"
    if name == "link":
        return f"{value / 1e9:.1f} GB/s"
    return f"{value / MIB:.0f} MiB" if name in ("gemm_workspace", "context") else f"{value:.2f}"
