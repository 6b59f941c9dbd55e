"""How long a training step takes, and who works when.

    one batch                          four micro-batches
    GPU 0  FFFF........BBBB            GPU 0  FFFF.....BBBB
    GPU 1  ....FFFFBBBB....            GPU 1  .FFFFBBBBB...
           ---------------> time              -----------> time

All micro-batches run forward, then one backward pass over their sum undoes them, the last one first. With stages of
f and b seconds a micro-batch, M equal micro-batches pass a pipeline in (sum of f) + (M - 1) * (largest f), and back in
the same form with b. `schedule` simulates the same step event by event; tests compare the two.

Work of one block, forward, on T tokens of length L (multiply and add count as two operations):

    matrix products    2 * T * (matrix weights)           backward the same again: the matrices are frozen
    attention          4 * T * L * hidden                 backward 2.5 times that
    elementwise        bytes read and written, in units of the hidden states, counted in `thuglm` and peft

Rates come from `gpus`. On one H100 (batch 4 x 1024, checkpointed, LoRA rank 8) matrix products took 190 ms of a
step, attention 80 ms and elementwise work 115 ms; the shares below and in `gpus` are set from that. Seconds for other
GPUs are estimates, good for comparing plans on one machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from glmhelpers.gpus import GPU
from glmhelpers.memory import hidden_bytes, label_rows
from glmhelpers.shapes import Setting, Shape
from glmhelpers.stages import Stage

ATTENTION_SHARE = 0.11
"""Part of the matrix rate that the memory-efficient attention kernel reaches (measured: 8.7 TFLOP in 80 ms)."""

ELEMENTWISE_FORWARD, ELEMENTWISE_BACKWARD = 27, 39
"""Bytes moved by elementwise work in one block without LoRA, in units of its hidden states."""

LORA_INPUT, LORA_OUTPUT, LORA_INPUT_BACK, LORA_OUTPUT_BACK = 9.5, 14, 14, 14
"""The same for one adapter, for each hidden-sized piece of its input and output: casts, dropout, scaling, sum."""

LAUNCH = 0.5e-3
"""Seconds that Python needs to start the kernels of one block once; small GPUs' work hides it."""


@dataclass(frozen=True)
class StageTime:
    """Seconds that one micro-batch needs on one GPU, forward and backward, sending included."""

    forward: float
    backward: float


@dataclass(frozen=True)
class Task:
    """One piece of work in a schedule: a micro-batch on a GPU from `start` to `end` seconds."""

    gpu: int
    kind: str
    micro_batch: int
    start: float
    end: float


def block_seconds(shape: Shape, setting: Setting, gpu: GPU) -> tuple[float, float]:
    """Seconds of one block for one micro-batch: (forward, backward without running it again)."""
    matrices = 2 * setting.tokens * shape.matrix_parameters / (gpu.matrix_rate * gpu.matrix_share)
    operations = 4 * setting.tokens * setting.seq_length * shape.hidden
    attention = operations / (gpu.matrix_rate * ATTENTION_SHARE)
    unit = hidden_bytes(shape, setting) / (gpu.bandwidth * gpu.memory_share)
    forward, backward = ELEMENTWISE_FORWARD, ELEMENTWISE_BACKWARD
    for name in setting.adapters:
        inputs, outputs = (width / shape.hidden for width in shape.linear(name))
        forward += LORA_INPUT * inputs + LORA_OUTPUT * outputs
        backward += LORA_INPUT_BACK * inputs + LORA_OUTPUT_BACK * outputs
    return (
        max(matrices + attention + forward * unit, LAUNCH),
        max(matrices + 2.5 * attention + backward * unit, LAUNCH),
    )


def head_seconds(shape: Shape, setting: Setting, gpu: GPU) -> float:
    """Head and loss of one micro-batch: two products over the vocabulary, and 24 bytes moved for each logit."""
    logits = (label_rows(setting) if setting.training else setting.rows) * shape.vocab
    products = (4 if setting.training else 2) * logits * shape.hidden / (gpu.matrix_rate * gpu.matrix_share)
    return max(products + 24 * logits / (gpu.bandwidth * gpu.memory_share), LAUNCH)


def stage_seconds(shape: Shape, setting: Setting, stage: Stage, gpu: GPU) -> StageTime:
    """Seconds of one GPU's stage for one micro-batch; a checkpointed block runs forward twice."""
    forward, backward = block_seconds(shape, setting, gpu)
    blocks, again = len(stage.blocks), sum(stage.blocks)
    send = 0.0 if stage.head else hidden_bytes(shape, setting) / gpu.link
    ahead = blocks * forward + send + (head_seconds(shape, setting, gpu) if stage.head else 0.0)
    back = blocks * backward + again * forward + send if setting.training else 0.0
    return StageTime(ahead, back)


def lookup_seconds(shape: Shape, setting: Setting, embedding: str, gpus_used: int, gpu: GPU) -> float:
    """Bringing the embedded batch to the first GPU, if it is looked up elsewhere.

    Args:
        shape: sizes of the model.
        setting: how it is run.
        embedding: "first", "tied" (on the last GPU) or "cpu".
        gpus_used: number of GPUs that hold something; with one, "tied" is on the first as well.
        gpu: the first GPU.
    """
    if embedding == "first" or (embedding == "tied" and gpus_used == 1):
        return 0.0
    return hidden_bytes(shape, setting) * setting.micro_batches / gpu.link


def step_seconds(times: Sequence[StageTime], micro_batches: int) -> float:
    """Seconds from the first forward to the last backward: both passes' sums and their slowest stages' repeats."""
    ahead, back = [time.forward for time in times], [time.backward for time in times]
    return sum(ahead) + sum(back) + (micro_batches - 1) * (max(ahead) + max(back))


def schedule(times: Sequence[StageTime], micro_batches: int, delay: float = 0.0) -> list[Task]:
    """Every piece of work of one step, in order of its start; the last one's end is the step's time.

    A GPU does one thing at a time; a micro-batch goes forward through all stages and, once all are through, back.
    `delay`: seconds before the first one, see lookup_seconds.
    """
    free = [delay] * len(times)
    tasks = []
    for batch in range(micro_batches):
        ready = delay
        for gpu, time in enumerate(times):
            start = max(ready, free[gpu])
            ready = free[gpu] = start + time.forward
            tasks.append(Task(gpu, "forward", batch, start, ready))
    begin = free[-1]
    for batch in reversed(range(micro_batches)):
        ready = begin
        for gpu in reversed(range(len(times))):
            start = max(ready, free[gpu])
            ready = free[gpu] = start + times[gpu].backward
            tasks.append(Task(gpu, "backward", batch, start, ready))
    return sorted(tasks, key=lambda task: (task.start, task.gpu))
