"""What the two roads of `roads.py` share: a case, the sizes and cards of a process, how a step is timed, one line.

Case ──► Bench.road, Bench.forecast (planned) ──► Bench.time (measured) ──► result (one JSON line)
"""

import gc
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

import torch  # noqa: E402

from benchmarks.split_machine import CAP, TINY  # noqa: E402
from glmhelpers.cost_model.gpus import GPU, find_gpu, gpus_here  # noqa: E402
from glmhelpers.cost_model.placement import part_names  # noqa: E402
from glmhelpers.cost_model.step_memory import Prediction, predict  # noqa: E402
from glmhelpers.cost_model.step_time import Task  # noqa: E402
from glmhelpers.distributed.plan import ProcessPlan, even_blocks  # noqa: E402
from glmhelpers.distributed.roads import Road, compare_roads, forecast_processes  # noqa: E402
from glmhelpers.lora.attach import adapter_weights  # noqa: E402
from glmhelpers.training.measure import random_batch  # noqa: E402
from thuglm import ChatGLMConfig  # noqa: E402


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        rows, length: of the batch of one step, all pipelines together.
        parts: micro-batches (of each pipeline); 0: the planner's choice, with its cut and its checkpointed blocks.
        schedule: "one process", or one of `ProcessPlan`'s.
        gpus: devices of one process, or ranks of a pipeline.
        stages_per_rank, pipelines: of the processes.
        checkpointed: "all" or "none".
        cuda_graphs: the blocks as CUDA graphs.
    """

    rows: int
    length: int
    parts: int = 1
    schedule: str = "one process"
    gpus: int = 2
    stages_per_rank: int = 1
    pipelines: int = 1
    checkpointed: str = "all"
    cuda_graphs: bool = False

    @property
    def processes(self) -> int:
        """How many it takes."""
        return 1 if self.schedule == "one process" else self.gpus * self.pipelines

    @property
    def size(self) -> str:
        """Rows x tokens."""
        return f"{self.rows}x{self.length}"

    @property
    def name(self) -> str:
        """For files."""
        way = f"{self.schedule} {self.pipelines}x{self.gpus}".replace(" ", "-")
        return f"{self.size}-{way}-{self.parts}{'-graphs' * self.cuda_graphs}"


class Bench:
    """What all cases of a process share: model sizes, cards, how many steps are timed.

    Args:
        tiny: the tiny model's sizes on the CPU.
        seconds: of a case, about.
        own: this rank's GPU; None for a process that has all.
    """

    def __init__(self, tiny: bool, seconds: float = 4.0, own: int | None = None):
        self.tiny, self.seconds = tiny, seconds
        self.on_gpu = not tiny
        if self.on_gpu and own is not None:
            torch.cuda.set_device(own)
        self.config = ChatGLMConfig.from_pretrained(TINY) if tiny else ChatGLMConfig()
        self.dtype = torch.float16 if self.on_gpu else torch.float32
        # A rank must not touch the GPUs of others: each touch makes a CUDA context there.
        every = list(range(torch.cuda.device_count() if self.on_gpu else 0))
        self.devices = every if own is None else every[own : own + 1]
        for device in self.devices:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / total), device)

    def cards(self, count: int) -> list[GPU]:
        """The GPUs as they were measured, with a T4's memory; on a CPU, T4s."""
        found = gpus_here()[:count] if self.on_gpu else [find_gpu("T4")] * count
        return [replace(gpu, memory=int(CAP)) for gpu in found]

    def batch(self, case: Case) -> dict[str, torch.Tensor]:
        """The same for each process."""
        torch.manual_seed(case.rows)
        batch = random_batch(self.config, case.rows, case.length)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    def sync(self) -> None:
        """Wait for every GPU of this process."""
        for device in self.devices:
            torch.cuda.synchronize(device)

    def peaks(self) -> list[int]:
        """Most bytes that were in tensors on each GPU of this process since `reset`; [] without a GPU."""
        return [torch.cuda.max_memory_allocated(device) for device in self.devices]

    def outside(self) -> list[int]:
        """What each GPU of this process holds that PyTorch's allocator has not: CUDA context, NCCL, other programs."""
        used = {device: torch.cuda.mem_get_info(device) for device in self.devices}
        return [total - free - torch.cuda.memory_reserved(device) for device, (free, total) in used.items()]

    def reset(self) -> None:
        """Count peaks anew."""
        for device in self.devices:
            torch.cuda.reset_peak_memory_stats(device)

    def free(self) -> None:
        """Give back what the last case held."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def time(self, step: Callable[[], Any], agree: Callable[[float], float] = float) -> list[float]:
        """Milliseconds of some steps, after two that do not count.

        `agree`: makes the seconds of the second step one number for all ranks, so that all run as many steps.
        """
        step()
        self.sync()
        start = time.perf_counter()
        step()
        self.sync()
        count = 3 if self.tiny else max(3, min(12, int(self.seconds / agree(time.perf_counter() - start))))
        self.reset()
        times = []
        for _ in range(count):
            start = time.perf_counter()
            step()
            self.sync()
            times.append((time.perf_counter() - start) * 1e3)
        return times

    def settings(self, case: Case) -> dict[str, Any]:
        """Of the formulas, beside rows and length."""
        share = (case.length // 2) / (case.length - 1)
        kind = str(self.dtype).removeprefix("torch.")
        return {"dtype": kind, "label_share": share, "cuda_graphs": case.cuda_graphs}

    def forecast(self, case: Case, places: dict[str, Any], marks: Sequence[int], parts: int) -> Prediction:
        """Predicted bytes of one process."""
        how = {"micro_batches": parts, "checkpointed": marks, **self.settings(case)}
        return predict(self.config, places, case.rows, case.length, gpus=self.cards(case.gpus), **how)

    def road(self, case: Case) -> Road:
        """Plan and prediction of several processes: the planner's choice for this schedule, or an even cut."""
        cards, settings = self.cards(case.processes), self.settings(case)
        if not case.parts:
            roads = compare_roads(self.config, cards, case.rows, case.length, **settings)
            kinds = [(getattr(r.plan, "schedule", ""), r.pipelines, len(r.plan.blocks)) for r in roads]
            return roads[kinds.index((case.schedule, case.pipelines, case.gpus))]
        blocks = even_blocks(self.config.num_layers, case.gpus)
        cut = {"micro_batches": case.parts, "stages_per_rank": case.stages_per_rank}
        plan = ProcessPlan.of(map_of(blocks), sum(blocks), case.schedule, case.checkpointed, **cut)
        return forecast_processes(self.config, plan, cards, case.rows, case.length, case.pipelines, **settings)


@torch.no_grad()
def draw_adapter(model: torch.nn.Module) -> None:
    """Numbers that depend on a matrix's name alone; lora_B too, or the gradients of lora_A would be 0."""
    for name, weight in adapter_weights(model).items():
        drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        weight.copy_(drawn * 0.01)


def no_dropout(model: torch.nn.Module) -> None:
    """For gradients that are compared."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def map_of(blocks: Sequence[int]) -> dict[str, int]:
    """Part -> GPU; the embedding is the head's own tensor, on the last GPU."""
    homes = [gpu for gpu, count in enumerate(blocks) for _ in range(count)]
    return dict(zip(part_names(len(homes)), [homes[-1], *homes, homes[-1], homes[-1]], strict=True))


def result(case: Case, times: list[float], **facts: Any) -> dict[str, Any]:
    """One line."""
    ms = statistics.median(times)
    speed = {"ms": round(ms, 2), "ms_all": [round(one, 2) for one in times]}
    return {**asdict(case), **speed, "tokens_per_s": round(case.rows * case.length / ms * 1e3), **facts}


def save_gradients(gradients: dict[str, torch.Tensor], folder: Path, case: Case) -> None:
    """For a comparison with those of another road."""
    torch.save({name: gradient.float().cpu() for name, gradient in gradients.items()}, folder / f"{case.name}.pt")


def draw_tasks(tasks: Sequence[Task], path: Path) -> None:
    """A Gantt chart of one step."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    from glmhelpers.plots.device_map import draw_schedule
    from glmhelpers.plots.style import use_style

    use_style()
    figure: Any = draw_schedule(tasks).figure
    figure.savefig(path, dpi=120)
    plt.close(figure)
