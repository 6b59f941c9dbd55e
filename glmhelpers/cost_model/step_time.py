"""How long a training step takes: the pipeline (GPipe fill-drain), its bubble, and who works when.

    one batch                          four micro-batches
    GPU 0  FFFF........BBBB            GPU 0  FFFF.....BBBB
    GPU 1  ....FFFFBBBB....            GPU 1  .FFFFBBBBB...
           ---------------> time              -----------> time

All micro-batches run forward (the pipeline fills), then one backward pass over their sum undoes them, the last one
first (it drains). The time in which a GPU waits for the others is the bubble; more micro-batches make it smaller. With
stages of f and b seconds a micro-batch, M equal micro-batches pass in (sum of f) + (M - 1) * (largest f), and back in
the same form with b. `schedule` simulates the same step event by event; tests compare the two.

Work of one block, forward, on T tokens of length L (multiply and add count as two operations):

    matrix products    2 * T * (matrix weights)           backward the same again: the matrices are frozen; with few
                                                          tokens, the time to read the weights once, if that is longer
    attention          4 * T * L * hidden                 backward 2.5 times that; with a prefix L + P keys
    elementwise        bytes read and written, in units of the hidden states, counted in `thuglm` and in the LoRA layer

A checkpointed block runs forward again before its backward, up to the last product, whose result nobody needs.

One Python process starts all kernels of all GPUs, one after the other. With long rows it is far ahead of them; with
short rows, or a batch cut into many small pieces, the GPUs wait for it. So a pass takes as long as the pipeline or as
all launches together, whichever is longer, and more micro-batches are not always better:

    host   |FfFfFfFf|bBbBbBbB|      F, B: launches for GPU 0, f, b: for GPU 1. Both GPUs are idle most of the time.

What the host does once a step (cutting the batch, clipping, Adam) is added where it was measured.

Rates come from `gpus`. On one H100 (batch 4 x 1024, checkpointed, LoRA rank 8) matrix products take 183 ms of a
step, attention 81 ms and everything else 62 ms; the shares below and in `gpus` are set from that. A test lays the model
beside every step measured there with a 16-bit base (what it costs to unpack 8 bits is not counted). Seconds for other
GPUs are estimates, good for comparing plans on one machine.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from glmhelpers.cost_model.gpus import GPU
from glmhelpers.cost_model.sizes import Setting, Shape
from glmhelpers.cost_model.stages import Stage
from glmhelpers.cost_model.step_memory import hidden_bytes, target_rows

ELEMENTWISE_FORWARD, ELEMENTWISE_BACKWARD = 28, 40
"""Bytes moved by elementwise work in one block without LoRA, in units of its hidden states: forward two LayerNorms 4,
rotation 10, GELU 8, two sums 6; backward 6, 12, 12 and 10."""

LAST_SUM = 3
"""The last of them, behind the last product: it is not run again."""

FUSED_LORA = (3.5, 2, 8, 2)
PREFIX = 4
"""With a prefix: keys and values are read and written once more to stand behind it, in units of the keys."""

PEFT_LORA = (9.5, 14, 14, 14)
"""The same for one adapter, forward and backward, for each hidden-sized piece of its (input, output, input, output):
dropout, thin products and sums in `glmhelpers.lora.layer`; in peft also casts to float32 and scaling. With dropout."""

LANES_START = 0.5
"""Lanes begin together and work on the same GPU until they are out of step: so much of what a micro-batch needs on the
other GPUs is lost, once. On two H200s (`two_gpus.py --only parts`, 24 x 1024) 0.54 in 8 parts and 0.46 in 12."""


@dataclass(frozen=True)
class StageTime:
    """Seconds that one micro-batch needs: on its GPU, forward and backward, sending included; and on the CPU, which
    starts the kernels."""

    forward: float
    backward: float
    launch_forward: float = 0.0
    launch_backward: float = 0.0


@dataclass(frozen=True)
class Task:
    """One piece of work in a schedule: a micro-batch on a GPU from `start` to `end` seconds."""

    gpu: int
    kind: str
    micro_batch: int
    start: float
    end: float


def _product_seconds(operations: float, weights: int, setting: Setting, gpu: GPU) -> float:
    """Matrix products: as long as the arithmetic, or as reading the weights once."""
    arithmetic = operations / (gpu.matrix_rate * gpu.matrix_share)
    return max(arithmetic, weights * setting.element / (gpu.bandwidth * gpu.memory_share))


def block_seconds(shape: Shape, setting: Setting, gpu: GPU) -> tuple[float, float, float]:
    """Seconds of one block on the GPU for one micro-batch: forward, forward again, backward from there."""
    weights = shape.matrix_parameters
    last = 0 if "dense_4h_to_h" in setting.adapters else shape.hidden * shape.inner
    matrices, again = (
        _product_seconds(2 * setting.tokens * count, count, setting, gpu) for count in (weights, weights - last)
    )
    operations = 4 * setting.tokens * setting.keys * shape.hidden
    attention = operations / (gpu.matrix_rate * gpu.attention_share)
    unit = hidden_bytes(shape, setting) / (gpu.bandwidth * gpu.memory_share)
    forward, backward = float(ELEMENTWISE_FORWARD), float(ELEMENTWISE_BACKWARD)
    if setting.prefix_length:
        forward += PREFIX * setting.keys / setting.seq_length
    ahead_in, ahead_out, back_in, back_out = FUSED_LORA if setting.fused else PEFT_LORA
    for name in setting.adapters:
        inputs, outputs = (width / shape.hidden for width in shape.linear(name))
        forward += ahead_in * inputs + ahead_out * outputs
        backward += back_in * inputs + back_out * outputs
    return (
        matrices + attention + forward * unit,
        again + attention + (forward - LAST_SUM) * unit,
        matrices + 2.5 * attention + backward * unit,
    )


def head_seconds(shape: Shape, setting: Setting, gpu: GPU) -> float:
    """Head and loss of one micro-batch: two products over the vocabulary for each chunk, and what is moved of a logit:
    it is written, read for the softmax, 4 bytes are written and read, the probability is written and read."""
    rows = target_rows(setting) if setting.training else setting.rows
    times, chunks = (2, max(1, -(-rows // setting.loss_chunk))) if setting.training else (1, 1)
    logits, element = rows * shape.vocab, setting.element
    operations = 2 * times * logits * shape.hidden
    products = chunks * _product_seconds(operations / chunks, times * shape.head_parameters, setting, gpu)
    return products + (4 * element + 8) * logits / (gpu.bandwidth * gpu.memory_share)


def stage_seconds(shape: Shape, setting: Setting, stage: Stage, gpu: GPU) -> StageTime:
    """Seconds of one GPU's stage for one micro-batch; a checkpointed block runs forward twice."""
    forward, again, backward = block_seconds(shape, setting, gpu)
    blocks, checkpointed = len(stage.blocks), sum(stage.blocks)
    send = 0.0 if stage.head else hidden_bytes(shape, setting) / gpu.link
    ahead = blocks * forward + send + (head_seconds(shape, setting, gpu) if stage.head else 0.0)
    launch_ahead = (blocks + stage.head) * gpu.launch_forward  # head and loss: about as many kernels as a block
    if not setting.training:
        return StageTime(ahead, 0.0, launch_ahead)
    back = blocks * backward + checkpointed * again + send
    launch_back = blocks * gpu.launch_backward + checkpointed * gpu.launch_again
    if setting.replayed:  # a checkpointed block is a segment of its own
        launch_back = (checkpointed + (checkpointed < blocks)) * gpu.launch_graph
        launch_ahead = launch_back + stage.head * gpu.launch_forward
    return StageTime(ahead, back, launch_ahead, launch_back)


def lookup_seconds(shape: Shape, setting: Setting, embedding: str, gpus_used: int, gpu: GPU) -> float:
    """What a step needs beside its passes: what the host does once, and bringing the embedded batch to the first GPU
    if it is looked up elsewhere.

    Args:
        shape, setting: sizes of the model, and how it is run.
        embedding: "first", "tied" (on the last GPU) or "cpu".
        gpus_used: number of GPUs that hold something; with one, "tied" is on the first as well.
        gpu: the first GPU.
    """
    once = gpu.launch_step * setting.training
    if embedding == "first" or (embedding == "tied" and gpus_used == 1):
        return once
    return once + hidden_bytes(shape, setting) * setting.micro_batches / gpu.link


def pass_seconds(total: StageTime, slowest: StageTime, micro_batches: int, in_flight: int | None = None) -> float:
    """Seconds of a step: forward pass, backward pass.

    Each takes sum + (micro_batches - 1) * slowest stage, or the time of all its launches if that is longer. With fewer
    in flight passes only take turns; but one comes by every (sum / in_flight) at most, which is longer where there are
    more stages than that, and lanes need a while to get out of each other's way (`LANES_START`).

    Args:
        total: the sum over the stages.
        slowest: the largest of each number over the stages.
        micro_batches: parts of the batch.
        in_flight: micro-batches in memory at a time; None for all.
    """
    again, lanes = micro_batches - 1, in_flight if in_flight and in_flight < micro_batches else None
    ahead, back, lost = slowest.forward, slowest.backward, 0.0
    if lanes:
        ahead, back, lost = max(ahead, total.forward / lanes), max(back, total.backward / lanes), LANES_START
    forward = total.forward + again * ahead + lost * (total.forward - ahead)
    backward = total.backward + again * back + lost * (total.backward - back)
    return max(forward, micro_batches * total.launch_forward) + max(backward, micro_batches * total.launch_backward)


def step_seconds(times: Sequence[StageTime], micro_batches: int, in_flight: int | None = None) -> float:
    """Seconds from the first forward to the last backward of these stages; see `pass_seconds`."""
    each = list(zip(*map(astuple, times), strict=True))
    return pass_seconds(StageTime(*map(sum, each)), StageTime(*map(max, each)), micro_batches, in_flight)


def schedule(times: Sequence[StageTime], micro_batches: int, delay: float = 0.0) -> list[Task]:
    """Every piece of work of one step (GPipe fill-drain), in order of its start; the last one's end is the step's time.

    A GPU does one thing at a time; a micro-batch goes forward through all stages and, once all are through, back. Where
    the CPU is the slowest part of a pass, each of its pieces is drawn longer: its kernels wait for their start.
    `delay`: seconds before the first one, see lookup_seconds.
    """
    order = range(len(times))
    ahead = _one_pass("forward", order, [time.forward for time in times], range(micro_batches))
    back = _one_pass("backward", order[::-1], [time.backward for time in times], range(micro_batches)[::-1])
    tasks = []
    for one, launch in (
        (ahead, sum(time.launch_forward for time in times)),
        (back, sum(time.launch_backward for time in times)),
    ):
        end = max(task.end for task in one)
        stretch = max(1.0, micro_batches * launch / end) if end else 1.0
        for task in one:
            tasks.append(replace(task, start=delay + stretch * task.start, end=delay + stretch * task.end))
        delay += stretch * end
    return sorted(tasks, key=lambda task: (task.start, task.gpu))


def busy_share(tasks: Sequence[Task]) -> float:
    """Part of the GPUs' time in which they work, 0 to 1, from second 0 to the end of the last task; the rest is bubble.

    Args:
        tasks: from `schedule`, at least one; GPUs are counted from 0 to the highest that has a task.
    """
    count, end = 1 + max(task.gpu for task in tasks), max(task.end for task in tasks)
    return sum(task.end - task.start for task in tasks) / (end * count)


def _one_pass(kind: str, order: Sequence[int], seconds: Sequence[float], batches: Sequence[int]) -> list[Task]:
    """All micro-batches through the stages in this order, from second 0 on."""
    free = [0.0] * len(seconds)
    tasks = []
    for batch in batches:
        ready = 0.0
        for gpu in order:
            start = max(ready, free[gpu])
            ready = free[gpu] = start + seconds[gpu]
            tasks.append(Task(gpu, kind, batch, start, ready))
    return tasks
