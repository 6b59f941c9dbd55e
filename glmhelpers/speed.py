"""What bounds the speed of an answer: the memory, or the program that starts the kernels.

One token at a time leaves a GPU almost nothing to compute: for each of its numbers a weight is read and used once. So

    GPU     bytes read for a token / bytes a second of its memory          T4 41 ms      H100 3.9 ms
    host    kernels of a step * time to start one                          about 600 kernels, some 10 us each

    host    |1|2|3|4|5|6|7|8|                         host    |1|2|3|4|5|6|7|8|
    GPU      |##1##|##2##|##3##| ...  never waits     GPU      |#|.|#|.|#|.|#| ...  waits for the host
             a T4: bound by its memory                         an H100: bound by the host, unless a graph starts
                                                               all kernels at once

The step of a token takes the longer of the two. Nothing here needs a GPU.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmhelpers.gpus import GPU, find_gpu
from glmhelpers.memory import cache_bytes
from glmhelpers.shapes import DTYPE_BYTES, Setting, Shape

KERNELS_PER_BLOCK, KERNELS_BESIDE = 20, 20
"""Kernels of one block (matrix products, LayerNorms, rotation, cache, attention, GELU, sums) and of the rest of a step:
counted in `thuglm`; benchmarks/decode.py counts them on a GPU."""

LAUNCH_SECONDS = 12e-6
"""Time that Python and CUDA need to start one kernel, the layers of PyTorch included; an estimate."""


@dataclass(frozen=True)
class TokenTime:
    """Seconds of one token on one GPU."""

    memory: float
    host: float

    @property
    def plain(self) -> float:
        """Every kernel started from Python: the slower of the two sets the pace."""
        return max(self.memory, self.host)

    @property
    def tokens_per_s(self) -> tuple[float, float]:
        """Tokens a second: plain, and at the limit of the memory."""
        return 1 / self.plain, 1 / self.memory


def bytes_for_token(config: Any, kv_length: int = 0, dtype: str = "float16") -> int:
    """Bytes read for one token: all weights but the embedding (of which it reads one row), and the cache.

    Args:
        config: ChatGLMConfig, or a dict with its keys.
        kv_length: tokens in the cache.
        dtype: of weights and cache.
    """
    shape, element = Shape.of(config), DTYPE_BYTES[dtype]
    weights = shape.layers * shape.block_parameters + 2 * shape.hidden + shape.head_parameters
    return weights * element + cache_bytes(shape, Setting(1, dtype=dtype, training=False), kv_length, shape.layers)


def token_time(config: Any, gpu: GPU | str, kv_length: int = 512, launch: float = LAUNCH_SECONDS) -> TokenTime:
    """Predicted time of one token on a GPU of the catalogue.

    A model split over several equal GPUs takes as long: they work one after the other.

    Args:
        config: ChatGLMConfig.
        gpu: name or GPU; the datasheet's bandwidth is taken, which no program reaches quite.
        kv_length: tokens in the cache.
        launch: seconds to start a kernel.
    """
    kernels = KERNELS_PER_BLOCK * Shape.of(config).layers + KERNELS_BESIDE
    return TokenTime(bytes_for_token(config, kv_length) / find_gpu(gpu).bandwidth, kernels * launch)


def timeline(work: float, launch: float, kernels: int) -> tuple[list[float], list[float]]:
    """When each of `kernels` equal kernels is started by the host, and when it runs on the GPU.

    Args:
        work: seconds that a kernel runs.
        launch: seconds to start one; 0 for a graph, which starts all at once.

    Returns:
        times at which each launch is complete, and at which each kernel begins.
    """
    launched = [launch * (number + 1) for number in range(kernels)]
    begins: list[float] = []
    for ready in launched:
        begins.append(max(ready, begins[-1] + work if begins else 0.0))
    return launched, begins


def read_speeds(path: str | Path, prompt: int = 64, gpus: int = 1) -> tuple[str, dict[str, float], float | None]:
    """What benchmarks/decode.py printed: the device, label -> tokens a second, and the limit of the memory.

    Args:
        path: its lines; other lines with a `label` and `tokens_per_s` are taken as they are.
        prompt: only cases with a prompt of so many tokens.
        gpus: only cases on so many GPUs.
    """
    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    device = next((line["device"] for line in lines if "device" in line), "unknown device")
    cases: dict[str, float] = {}
    limit = None
    for line in lines:
        if "label" in line:
            cases[line["label"]] = line["tokens_per_s"]
        elif line.get("what") == "decode" and (line["prompt"], line["gpus"]) == (prompt, gpus) and "way" in line:
            cases[f"{line['way']}, adapter {line['adapter']}"] = line["tokens_per_s"]
            limit = 1e3 / line["floor_ms"] if "floor_ms" in line else limit
    return device, cases, limit
