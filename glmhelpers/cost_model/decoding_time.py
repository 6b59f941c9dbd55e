"""What bounds the speed of decoding (tokens a second): memory bandwidth, or the program that starts the kernels.

One token at a time leaves a GPU almost nothing to compute: for each of its numbers a weight is read and used once. So

    GPU     bytes read for a token / bytes a second of its memory          T4 39 ms      H100 3.7 ms
    host    kernels of a step * time that Python needs to start one        about 500 kernels, some 60 us each

    host    |1|2|3|4|5|6|7|8|                         host    |1|2|3|4|5|6|7|8|
    GPU      |##1##|##2##|##3##| ...  never waits     GPU      |#|.|#|.|#|.|#| ...  waits for the host
             slow memory, quick host                           fast memory: bound by the host, unless a graph starts
                                                               all kernels at once

The step of a token takes the longer of the two, at best. Bytes are counted from the configuration; the host's time and
the number of kernels are measured, by benchmarks/decode.py on an H100. Nothing here needs a GPU.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmhelpers.cost_model.gpus import GPU, find_gpu
from glmhelpers.cost_model.sizes import DTYPE_BYTES, Setting, Shape
from glmhelpers.cost_model.step_memory import cache_bytes

GOALS = {"plain": 60, "graphs": 150}
"""Tokens a second that this project set itself on an H100, batch 1, by the way of decoding (not for "fixed")."""


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
        """Tokens a second, at most: plain, and at the limit of the memory."""
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


def token_time(config: Any, gpu: GPU | str, host: float) -> TokenTime:
    """Predicted time of one token on a GPU of the catalogue, with 512 tokens in the cache.

    A model split over several equal GPUs takes as long: they work one after the other.

    Args:
        config: ChatGLMConfig.
        gpu: name or GPU; the datasheet's bandwidth is taken, which no program reaches quite.
        host: seconds that the host needs to start the kernels of a token, such as `Speeds.host_seconds`: another
            machine's host may be slower.
    """
    return TokenTime(bytes_for_token(config, 512) / find_gpu(gpu).bandwidth, host)


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


@dataclass(frozen=True)
class Speeds:
    """What benchmarks/decode.py measured.

    Attributes:
        device: the GPU.
        cases: (way, adapter, prompt tokens, GPUs) -> seconds a token; way is plain, fixed or graphs.
        limit: tokens a second if a token took no longer than reading the weights, at the bandwidth of a copy.
        launches: kernels that the host starts for a token.
        kernel_seconds: how long they run, the gaps between them left out.
    """

    device: str
    cases: Mapping[tuple[str, str, int, int], float]
    limit: float
    launches: int
    kernel_seconds: float

    @property
    def host_seconds(self) -> float:
        """Seconds a token where every kernel is started from Python (fixed cache, one GPU, shortest prompt)."""
        return self.cases[self._counted("fixed")]

    @property
    def graph_seconds(self) -> float:
        """The same with one graph."""
        return self.cases[self._counted("graphs")]

    def _counted(self, way: str) -> tuple[str, str, int, int]:
        # Kernels were counted there: one GPU, the adapter beside the weights, the shortest prompt.
        return way, "unmerged", min(prompt for _, _, prompt, _ in self.cases), 1

    def tokens_per_s(self, way: str) -> tuple[float, float]:
        """Lowest and highest of a way on one GPU, over all prompts, adapter merged or not."""
        found = [1 / seconds for (name, _, _, gpus), seconds in self.cases.items() if (name, gpus) == (way, 1)]
        return min(found), max(found)

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Label -> lowest and highest tokens a second of a way on so many GPUs, over prompts, adapter merged or not."""
        found: dict[str, list[float]] = {}
        for (way, _, _, gpus), seconds in self.cases.items():
            found.setdefault(f"{way}, {gpus} GPU{'s' * (gpus > 1)}", []).append(1 / seconds)
        return {label: (min(speeds), max(speeds)) for label, speeds in found.items()}


def read_speeds(path: str | Path) -> Speeds:
    """Read what benchmarks/decode.py printed; of two lines on one case the later one counts.

    Raises:
        ValueError: a line that is needed is not there.
    """
    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    of = {what: [line for line in lines if line.get("what") == what] for what in ("machine", "decode", "kernels")}
    measured = [line for line in of["decode"] if "way" in line and "floor_ms" in line]
    counted = [line for line in of["kernels"] if "launches_per_token" in line]
    if not (of["machine"] and measured and counted):
        raise ValueError(f"{path} lacks lines: run benchmarks/decode.py on a GPU, with its profile, and keep them all")
    return Speeds(
        device=of["machine"][-1]["device"],
        cases={
            (line["way"], line["adapter"], line["prompt"], line["gpus"]): line["ms_per_token"] / 1e3
            for line in measured
        },
        limit=1e3 / measured[-1]["floor_ms"],
        launches=counted[-1]["launches_per_token"],
        kernel_seconds=counted[-1]["kernel_ms_per_token"] / 1e3,
    )
