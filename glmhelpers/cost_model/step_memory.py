"""Peak memory of a training step on each GPU (weights, gradients, optimizer state, activations), from the config alone.

    one GPU
    +-----------------------------+ <- what PyTorch reports as the card's total
    | reserve      kept free       |
    | context      CUDA itself     |   outside PyTorch's allocator
    | slack        cached, unused  |   reserved by the allocator, in no tensor
    +-----------------------------+ <- torch.cuda.max_memory_allocated: the peak
    | workspace    cuBLAS          |
    | loss         a chunk         |   comes and goes within a step
    | block        one block again |
    | inputs       of every block  |   grows with batch * length * blocks
    | masks                        |
    | adam, gradients, lora        |   small: the adapter only
    | embedding, head              |   there before the first step
    | weights                      |
    +-----------------------------+ 0

The worst moment is found, not assumed: the ledger of the step is evaluated when the loss is computed, before each
block's turn in the backward pass, and at the optimizer step, and the largest of those sums is the peak.
All sizes are bytes; GiB = 2**30 bytes. Nothing here needs torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from typing import Any

from glmhelpers.cost_model.block_memory import block_cost
from glmhelpers.cost_model.gpus import CATALOGUE, GPU, find_gpus
from glmhelpers.cost_model.placement import Placement
from glmhelpers.cost_model.sizes import (
    BYTES_PER_WEIGHT,
    LORA_TARGETS,
    Setting,
    Shape,
    cast_bytes,
    hidden_bytes,
    mask_bytes,
    prefix_bytes,
    table_bytes,
    with_prefix,
)
from glmhelpers.cost_model.stages import Stage, find_stages
from glmhelpers.utils.units import GIB, MIB

TERMS = {
    "weights": "blocks' weights",
    "embedding": "embedding and head",
    "lora": "LoRA parameters",
    "adam": "Adam states",
    "gradients": "LoRA gradients",
    "masks": "masks and tables",
    "inputs": "saved block inputs",
    "activations": "blocks not checkpointed",
    "block": "one block run again",
    "loss": "loss",
    "transfer": "transfer buffers",
    "cache": "key-value cache",
    "workspace": "cuBLAS workspace",
}
"""Every term of the peak, in the order in which it is drawn, with its name for readers."""

OUTSIDE = {"slack": "allocator slack", "context": "CUDA context"}
"""What a card holds beyond the tensors; not in `peak_bytes`."""
POOLED = ("masks", "inputs", "activations", "block", "transfer")
"""Terms that are in the memory pool of CUDA graphs."""
SLACK_AT_LEAST = 40 * MIB
"""Bytes of slack on every GPU: two of the allocator's 20 MiB buffers."""


def weight_bytes(shape: Shape, setting: Setting, stage: Stage) -> int:
    """Frozen blocks and final norm.

    A block has 12 hidden**2 matrix weights (with inner = 4 hidden) and 13 hidden biases and norm weights.
    8 bits: one byte a weight and a float32 scale for each output row. 4 bits: half a byte, and a float32 scale
    for each 64 weights. Biases and norms keep the base dtype.
    """
    rest = (shape.block_parameters - shape.matrix_parameters) * setting.element
    if setting.base_bits == 8:
        scales = sum(shape.linear(name)[1] for name in LORA_TARGETS) * 4
    elif setting.base_bits == 4:
        scales = shape.matrix_parameters // 64 * 4
    else:
        scales = 0
    each = BYTES_PER_WEIGHT[setting.base_bits] if setting.base_bits < 16 else setting.element
    block = int(shape.matrix_parameters * each) + scales + rest
    return len(stage.blocks) * block + stage.head * 2 * shape.hidden * setting.element


def embedding_bytes(shape: Shape, setting: Setting, stage: Stage) -> int:
    """Embedding and head: vocabulary * hidden each; once where the embedding is the head's own tensor (tied)."""
    copies = int(stage.head) + int(stage.embedding and not stage.shared)
    return copies * shape.head_parameters * setting.element


def lora_bytes(shape: Shape, setting: Setting, blocks: int) -> int:
    """LoRA parameters in float32: rank * (inputs + outputs) for each adapted linear layer of `blocks` blocks."""
    return blocks * 4 * setting.lora_rank * sum(sum(shape.linear(name)) for name in setting.adapters)


def prefix_keys_bytes(shape: Shape, setting: Setting, stage: Stage) -> int:
    """What a step keeps of the prefix in float32 beside its parameters: on the other GPUs a copy for their blocks;
    beside a network all that it made, and its middle."""
    block = 4 * 2 * setting.prefix_length * shape.hidden
    if not stage.first:
        return block * len(stage.blocks)
    made = shape.layers * block + 4 * setting.prefix_length * setting.prefix_projection
    return made if setting.prefix_projection else 0


def target_rows(setting: Setting, smooth: bool = False) -> Any:
    """Rows of one micro-batch that become logits: the labelled ones of rows * (length - 1). `smooth`: not rounded, but
    never more than that, and of all micro-batches together the fewer the more there are."""
    rows = setting.rows * (setting.seq_length - 1) * setting.label_share
    return max(0.0, rows - 0.5) if smooth else round(rows)


def loss_kept_bytes(shape: Shape, setting: Setting, smooth: bool = False) -> int:
    """What one micro-batch's loss keeps: the final norm's input and statistics, the gradient of the labelled rows."""
    kept = target_rows(setting, smooth) * shape.hidden * setting.element
    return hidden_bytes(shape, setting) + 2 * 4 * setting.tokens + kept


def loss_working_bytes(shape: Shape, setting: Setting, smooth: bool = False) -> int:
    """While a chunk is computed: its logits in the base dtype, their log-probabilities in float32, the normed states,
    the labelled rows with their labels (int64).

    Then the probabilities in the base dtype take the place of the logits: the same size.
    """
    rows = target_rows(setting, smooth)
    chunk = min(setting.loss_chunk, rows) * shape.vocab * (4 + setting.element)
    return chunk + hidden_bytes(shape, setting) + rows * (shape.hidden * setting.element + 8)


def cache_bytes(shape: Shape, setting: Setting, tokens: int, blocks: int) -> int:
    """Keys and values of `blocks` blocks: 2 * batch * tokens * hidden each."""
    return 2 * blocks * setting.batch_size * tokens * shape.hidden * setting.element


def unpacked_matrix_bytes(shape: Shape, setting: Setting) -> int:
    """The largest matrix of a block in the base dtype: 8- and 4-bit weights are unpacked one matrix at a time."""
    return shape.hidden * shape.inner * setting.element if setting.base_bits < 16 else 0


@lru_cache(maxsize=200_000)
def stage_terms(
    shape: Shape, setting: Setting, stage: Stage, workspace: int = 0, smooth: bool = False
) -> tuple[str, dict[str, int]]:
    """The worst moment of one GPU and its terms; `workspace`: bytes of one cuBLAS workspace on this GPU.

    `smooth`: for bounds, less than that: what never grows when the batch is cut into more micro-batches. They keep no
    copies of a prefix, label rows are rounded down, and of the backward pass only its beginning counts: later there
    are gradients, while all other micro-batches are still there. Nor is there a pool of CUDA graphs.

    Returns:
        Name of the moment, and bytes for every key of TERMS; do not change the dict, it is shared.
    """
    blocks = len(stage.blocks)
    lora = lora_bytes(shape, setting, blocks) + (prefix_bytes(shape, setting) if stage.first else 0)
    base = dict.fromkeys(TERMS, 0)
    base["weights"] = weight_bytes(shape, setting, stage)
    base["embedding"] = embedding_bytes(shape, setting, stage)
    base["lora"] = lora
    if not blocks and not stage.head:
        return "idle", base
    lanes = setting.lanes(2 - (stage.first and stage.head))
    base["workspace"] = workspace * (2 * lanes if setting.training else 1) + unpacked_matrix_bytes(shape, setting)
    if setting.recorded and blocks and not smooth:
        base["workspace"] += 2 * workspace * (stage.first and stage.head)  # recorded in a stream of their own
        moments = _with_graphs(shape, setting, stage, lora)
    else:
        trained = setting.training
        moments = _training(shape, setting, stage, lora, smooth) if trained else _generation(shape, setting, stage)
    moment, extra = max(moments, key=lambda item: sum(item[1].values()))
    return moment, {**base, **extra}


def _training(
    shape: Shape, setting: Setting, stage: Stage, lora: int, smooth: bool
) -> list[tuple[str, dict[str, int]]]:
    """Every moment of a training step at which the peak can be.

    All micro-batches run forward, then one backward pass undoes them, the last micro-batch first. When that begins,
    everything saved is still there: the usual peak. Each block that is done frees its input and adds the gradients of
    its adapter. The second micro-batch to be undone starts with less saved and with all gradients: the peak where the
    adapter is large and the batch small. From then on memory only falls.

    With fewer in flight, as many as there may be are there again and again, and all gradients soon beside them.
    """
    unit, batches, marks, count = hidden_bytes(shape, setting), setting.flying, stage.blocks, len(stage.blocks)
    cost, cost_of_first = block_cost(shape, setting), block_cost(shape, setting, stage.first)
    # The input of each block is kept to run the block again, or for the gradient of the input: block 0's needs none.
    spared = int(stage.first and not marks[0]) if marks else 0

    def saved(blocks: int) -> int:
        """What the first `blocks` blocks keep, those that are not checkpointed."""
        plain = marks[:blocks].count(False)
        return cost.saved * plain + (cost_of_first.saved - cost.saved) * (plain > 0 and not marks[0])

    masks = mask_bytes(setting) + table_bytes(shape, setting) if marks else 0
    loss = loss_kept_bytes(shape, setting, smooth) if stage.head else 0
    transfer = 0 if stage.head else unit
    waves = setting.waves
    full = {"adam": 2 * lora, "masks": masks * batches, "inputs": unit * (count - spared) * batches}
    full["gradients"] = lora * waves
    full["activations"] = saved(count) * batches

    # A prefix: copies kept for the whole step, and inputs of the checkpointed blocks of each micro-batch.
    keys, cast = prefix_keys_bytes(shape, setting, stage), 0 if smooth else cast_bytes(shape, setting)
    piece = 4 * 2 * setting.prefix_length * shape.hidden  # a block's gradient, until all are put together
    full["cache"] = keys + cast * sum(marks) * batches

    moments = [("optimizer step", {"adam": 2 * lora, "masks": 0, "gradients": lora, "block": 2 * lora})]
    if stage.first and piece:
        pieces = piece * shape.layers
        last_of_all = {"adam": 2 * lora, "gradients": pieces + max(pieces, lora * (setting.prefix_projection > 0))}
        moments.append(("gradient of the prefix", {**last_of_all, "cache": keys}))
    if stage.head:
        now = loss * batches + loss_working_bytes(shape, setting, smooth)
        moments.append(("loss of the last micro-batch", {**full, "loss": now}))
    if marks:
        last = cost_of_first if count == 1 else cost
        running = last.forward if marks[-1] else last.keeping - last.saved
        # On the first GPU visible pairs (bool), positions (2 x int64) and embeddings live as long as the forward pass.
        pairs, positions = setting.tokens * setting.keys, 16 * setting.tokens
        running += stage.first * (pairs + positions + unit * spared) + cast * (not marks[-1])
        moments.append(("forward of its last block", {**full, "block": running, "loss": loss * (batches - 1)}))
    # From one block to the next of its kind every term grows or shrinks by the same bytes: the worst is at an end.
    ends = {0, 1, count - 1} | {
        p + side for p, pair in enumerate(pairwise(marks)) if pair[0] != pair[1] for side in (0, 1)
    }
    trained, marked = piece * count or lora, sum(marks)
    turns = sorted((place for place in ends if place < count), reverse=True) if marks else []
    if smooth:
        turns = turns[:1]
    for done, place in product(range(1 if smooth else min(batches, 2)), turns):
        left, here = batches - done - 1, cost_of_first if place == 0 else cost
        moment = {
            "adam": 2 * lora,
            "gradients": trained // count * (count if done or waves else count - 1 - place)
            + piece * (stage.first and done == batches - 1) * (shape.layers - count),
            "cache": keys + cast * (marked * left + sum(marks[:place])),
            "masks": masks * (left + 1),
            "inputs": unit * ((count - spared) * left + place + 1 - spared),
            "activations": saved(count) * left + saved(place + 1),
            "block": (here.again if marks[place] else here.undo) - transfer,
            "loss": loss * left,
            "transfer": transfer,
        }
        name = f"backward of its block {place + 1} of {count}"
        moments.append((f"{name}, second micro-batch" if done else name, moment))
    return moments


def _with_graphs(shape: Shape, setting: Setting, stage: Stage, lora: int) -> list[tuple[str, dict[str, int]]]:
    """Every moment of a step beside the pool of the CUDA graphs, which always holds what its worst moment needs: that
    of the largest micro-batches that are recorded, copies at both ends of the stage, gradients in one piece. If these
    are the step's own, nothing else of theirs lies beside the pool but the loss and the optimizer's step."""
    recorded = setting.recorded or setting
    inside = _training(shape, recorded, stage, lora, False)
    moments = inside if setting.replayed else _training(shape, setting, stage, lora, False)
    pools = ({name: moment.get(name, 0) for name in POOLED} for _, moment in inside[1:])
    pool = max(pools, key=lambda terms: sum(terms.values()))
    copies = recorded.micro_batches * (int(stage.first and not stage.blocks[0]) + int(not stage.head)) + 2
    pool["transfer"] += copies * hidden_bytes(shape, recorded) + mask_bytes(recorded) + table_bytes(shape, recorded)
    pool["gradients"] = 2 * lora
    for name, moment in moments:
        own = moment if name == "optimizer step" or not setting.replayed else {"gradients": moment.get("gradients", 0)}
        moment |= {term: size + own.get(term, 0) for term, size in pool.items()}
    return moments


def _generation(shape: Shape, setting: Setting, stage: Stage) -> list[tuple[str, dict[str, int]]]:
    """Reading the prompt, and the last token of the answer, when one layer's cache is copied to grow by a token."""
    unit, blocks = hidden_bytes(shape, setting), len(stage.blocks)
    tokens = max(setting.kv_length, setting.seq_length) + setting.prefix_length
    logits = stage.head * setting.batch_size * shape.vocab * (4 + setting.element)
    masks = mask_bytes(setting) + table_bytes(shape, setting) if blocks else 0
    prompt = {"cache": cache_bytes(shape, setting, setting.keys, blocks), "masks": masks}
    prompt["block"] = block_cost(shape, setting).forward + unit if blocks else unit
    last = {"cache": cache_bytes(shape, setting, tokens, blocks), "loss": logits, "masks": masks}
    last["block"] = cache_bytes(shape, setting, tokens, 1) // 2 if blocks else 0
    return [("reading the prompt", prompt), ("last token", last)]


def slack_bytes(terms: Mapping[str, int], lanes: int = 1) -> int:
    """Estimate of what the allocator holds in no tensor: freed pieces whose size fits no later tensor.

    Only what comes and goes leaves such pieces; a tenth of it, and two of the allocator's 20 MiB buffers. With memory
    to spare the allocator keeps more (`reserved_bytes` less `peak_bytes` in benchmarks/results/, 58 to 849 MiB);
    before it runs out it gives whole free pieces back, so what is needed is less than that.

    Memory is given back to the stream that it was taken for. So with several lanes what comes and goes is there once
    for each of them, and in use, as in the peak, once.
    """
    passing = terms["block"] + terms["loss"] + terms["cache"]
    return SLACK_AT_LEAST + passing // 10 + (lanes - 1) * (terms["block"] + terms["loss"] + terms["transfer"])


def with_outside(breakdown: Sequence[dict[str, int]], gpus: Sequence[GPU], setting: Setting) -> list[dict[str, int]]:
    """The terms of each GPU with the allocator's slack and the CUDA context; a GPU that holds nothing needs neither."""
    lanes = setting.lanes(sum(any(terms.values()) for terms in breakdown))
    return [
        {**terms, "slack": slack_bytes(terms, lanes), "context": gpu.context} if any(terms.values()) else terms
        for terms, gpu in zip(breakdown, gpus, strict=True)
    ]


@dataclass(frozen=True)
class Prediction:
    """What every GPU holds at its worst moment.

    Attributes:
        devices: labels of the devices, in order: 0, 1, ... or "cpu" where blocks run there.
        gpus: what is known of each.
        breakdown: for each device, bytes by term (the keys of TERMS); the sum is the peak.
        moments: for each device, when that is.
        setting: the settings the figures are for.
    """

    devices: tuple[int | str, ...]
    gpus: tuple[GPU, ...]
    breakdown: list[dict[str, int]]
    moments: list[str]
    setting: Setting

    @property
    def peak_bytes(self) -> list[int]:
        """Bytes in tensors at the worst moment, for each device: torch.cuda.max_memory_allocated."""
        return [sum(terms.values()) for terms in self.breakdown]

    @property
    def with_outside(self) -> list[dict[str, int]]:
        """`breakdown` with the allocator's slack and the CUDA context of each GPU, for drawing."""
        return with_outside(self.breakdown, self.gpus, self.setting)

    @property
    def total_bytes(self) -> list[int]:
        """Bytes that each GPU must have: the peak, the allocator's slack and the CUDA context."""
        return [sum(terms.values()) for terms in self.with_outside]

    def __str__(self) -> str:
        """A table, one column a device, in GiB."""
        names = [f"GPU {device}" if device != "cpu" else "CPU" for device in self.devices]
        lines = [f"{'GiB':24}" + "".join(f"{name:>10}" for name in names)]
        named = TERMS if self.setting.training else {**TERMS, "block": "one block at work"}
        if self.setting.prefix_length:
            named = named | {"lora": "prefix parameters", "gradients": "prefix gradients"}
            named |= {"cache": "keys of the prefix"} if self.setting.training else {}
        rows = {named[key]: [terms[key] for terms in self.breakdown] for key in named}
        rows = {name: sizes for name, sizes in rows.items() if any(sizes)}
        rows["peak"] = self.peak_bytes
        rows["with slack and context"] = self.total_bytes
        for name, sizes in rows.items():
            lines.append(f"{name:24}" + "".join(f"{size / GIB:10.2f}" for size in sizes))
        return "\n".join(lines)


def predict(
    config: Any,
    device_map: Any,
    batch_size: int,
    seq_length: int,
    *,
    checkpointed: str | int | Iterable[int] = "all",
    gpus: Sequence[GPU | str | int] | None = None,
    tied: bool = True,
    **settings: Any,
) -> Prediction:
    """What each GPU will hold at the worst moment of a step.

    Args:
        config: ChatGLMConfig, or a dict with its keys.
        device_map: any form that `Placement.of` reads: module name -> GPU index or "cpu", a plan, a placed model.
        batch_size: rows in one optimizer step.
        seq_length: tokens in a row.
        checkpointed: "all", "none", a number n (blocks 0 to n - 1), or the indices of the checkpointed blocks.
        gpus: one for each index in the map, for context and workspace sizes; by default T4s.
        tied: embedding and head are one tensor where they are on the same GPU.
        settings: further fields of `sizes.Setting`: micro_batches, in_flight, lora_rank, lora_targets, lora_dropout,
            dtype, base_bits, loss_chunk, label_share, training, kv_length, prefix_length, prefix_projection (the prefix
            of a config with `pre_seq_len` by default).

    Returns:
        A Prediction; `.peak_bytes` has one number for each device that holds something, in order of index.
    """
    shape = Shape.of(config)
    setting = Setting(batch_size, seq_length, **with_prefix(config, settings))
    known = find_gpus(list(gpus)) if gpus else None
    placement = Placement.of(device_map, shape.layers, len(known) if known else None)
    stages = find_stages(placement, checkpointed, tied)
    cards = tuple(known[device if isinstance(device, int) else 0] if known else CATALOGUE["T4"] for device in stages)
    results = [
        stage_terms(shape, setting, stage, card.gemm_workspace if device != "cpu" else 0)
        for (device, stage), card in zip(stages.items(), cards, strict=True)
    ]
    breakdown = [dict(terms) for _, terms in results]
    return Prediction(tuple(stages), cards, breakdown, [moment for moment, _ in results], setting)
