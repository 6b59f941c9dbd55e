"""Speed of a split step, for `two_gpus.py`: what micro-batches gain, and what the planner makes of a batch.

1 part      GPU 0  [forward       ]                                [backward      ]
            GPU 1                  [forward       ][backward      ]

8 parts     a step takes (f + b) of the first stage and 8 (f + b) of the slower one, f and b for one part: with equal
            stages 16 / 9 = 1.78 times as fast at best
"""

import gc
import statistics
import time
import traceback
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.split_machine import CAP, SIZES, Machine, line
from glmhelpers.devicemap.activation_checkpointing import checkpoint_only
from glmhelpers.devicemap.captured import Captured, fits_graphs
from glmhelpers.devicemap.plan import plan_device_map
from glmhelpers.training.calibration import clear_workspaces
from glmhelpers.training.measure import random_batch
from glmhelpers.training.pipeline import run_step
from glmhelpers.training.step_recorder import StepRecorder, idle_shares


def overlap(machine: Machine, model: nn.Module, net: nn.Module, out: Path) -> None:
    """Seconds of a step by number of micro-batches and cut, and pictures of who worked when."""
    layers = machine.config.num_layers
    checkpoint_only(model, range(layers))
    for cut in (machine.cut, (layers // 2, layers - layers // 2)):
        net.place(machine.device_map(cut))
        overlap_of(machine, model, cut, out / f"gantt-{cut[0]}-{cut[1]}.png")
    net.place(machine.device_map())


def overlap_of(machine: Machine, model: nn.Module, cut: tuple[int, ...], picture: Path) -> None:
    """The same for one cut."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    from glmhelpers.plots.device_map import draw_schedule
    from glmhelpers.plots.style import use_style

    rows, charts, first = overlap_rows(machine), {}, None
    batch = random_batch(machine.config, rows, machine.length)
    for parts in (1, 2, 4, 8):
        seconds = step_seconds(machine, model, batch, parts)
        first = first or seconds
        with StepRecorder(model, cut) as recorder:
            run_step(model, batch, parts, backward=recorder.backward)
        model.zero_grad(set_to_none=True)
        tasks = charts[parts] = recorder.tasks()
        line(
            "overlap",
            cut=cut,
            rows=rows,
            length=machine.length,
            micro_batches=parts,
            ms=round(seconds * 1e3, 1),
            speedup=round(first / seconds, 2),
            idle_share=[round(share, 3) for share in idle_shares(tasks)],
        )
    use_style()
    figure, axes = plt.subplots(2, 1, figsize=(9, 4.2), layout="constrained")
    until = max(task.end for task in charts[1])
    for ax, parts in zip(axes, (1, 8), strict=True):
        draw_schedule(charts[parts], ax, until=until)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def overlap_rows(machine: Machine) -> int:
    """Rows of the batch whose step is timed."""
    return 8 if machine.tiny else 24


def step_seconds(machine: Machine, model: nn.Module, batch: dict, parts: int, **forward: Any) -> float:
    """Median of some steps, the first one left out."""
    times = []
    for attempt in range(3 if machine.tiny else 6):
        machine.sync()
        start = time.perf_counter()
        run_step(model, batch, parts, **forward)
        machine.sync()
        if attempt:
            times.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    return statistics.median(times)


def graphs(machine: Machine, model: nn.Module, net: nn.Module) -> None:
    """Four rows in four parts, no block run again: as CUDA graphs and without, in turns; both ways' memory at once is
    more than a T4 has."""
    machine.cap(float("inf"))
    layers = machine.config.num_layers
    net.place(machine.device_map((layers // 2, layers - layers // 2)))
    checkpoint_only(model, [])
    batch, captured = random_batch(machine.config, 4, machine.length), Captured(model)
    for way in ("eager", "graphs") * 2:
        machine.reset_peaks()
        how = {"captured": captured} if way == "graphs" else {}
        line(
            "graphs",
            way=way,
            rows=4,
            length=machine.length,
            micro_batches=4,
            ms=round(step_seconds(machine, model, batch, 4, **how) * 1e3, 1),
            recorded=len(captured.known),
            peak_bytes=[torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count())],
            reserved_bytes=[torch.cuda.max_memory_reserved(device) for device in range(torch.cuda.device_count())],
        )
    captured.forget()
    machine.cap(CAP)
    net.place(machine.device_map())


def planned(machine: Machine, model: nn.Module, net: nn.Module) -> None:
    """The planner's fastest plan, on the devices: its time, its peaks. It may part head and embedding for good."""
    rows = overlap_rows(machine)
    plan = plan_device_map(machine.config, SIZES, rows, machine.length, "speed", micro_batches=8)
    homes = dict(enumerate(machine.devices))
    net.place({name: homes.get(place, place) for name, place in plan.device_map.items()})
    checkpoint_only(model, plan.checkpointed_layers)
    batch, how = random_batch(machine.config, rows, machine.length), plan.setting.for_step
    parts = how.pop("micro_batches")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    run_step(model, batch, parts, **how)
    optimizer.step()
    model.zero_grad(set_to_none=True)
    machine.reset_peaks()
    seconds = step_seconds(machine, model, batch, parts, **how)
    line(
        "planned",
        cut=[len(blocks) for blocks in plan.blocks],
        embedding=plan.embedding,
        kept_blocks=machine.config.num_layers - len(plan.checkpointed_layers),
        ms=round(seconds * 1e3, 1),
        **machine.compare_peaks(plan.device_map, batch, plan.checkpointed_layers, micro_batches=parts, **how),
    )


def more_parts(machine: Machine, model: nn.Module, net: nn.Module) -> None:
    """The same batch in more and more parts: the bubble shrinks and the host has more to start. Equal halves; without
    the cap of a T4, which two GPUs that keep everything exceed.

    All blocks checkpointed, then none: each in turns, and then, where a part is short enough, as CUDA graphs, one
    number of parts after the other, since each holds a memory pool of its own. Faster is against one part without.
    """
    layers, rows, rounds = machine.config.num_layers, overlap_rows(machine), 1 if machine.tiny else 3
    if machine.on_gpu and not machine.tiny:
        for device in range(torch.cuda.device_count()):
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    cut = (layers // 2, layers - layers // 2)
    net.place(machine.device_map(cut))
    batch, numbers = random_batch(machine.config, rows, machine.length), (1, 2) if machine.tiny else (1, 8, 12, 24)

    def timed(parts: int, captured: Captured | None = None) -> float:
        machine.sync()
        start = time.perf_counter()
        run_step(model, batch, parts, captured=captured)
        machine.sync()
        seconds = time.perf_counter() - start
        model.zero_grad(set_to_none=True)
        return seconds

    def say(times: dict[int, list[float]], one: float, **how: Any) -> None:
        medians = {parts: statistics.median(seconds[1:]) for parts, seconds in times.items()}
        facts = {"cut": cut, "rows": rows, "length": machine.length, **how}
        ms = {parts: round(1e3 * seconds, 1) for parts, seconds in medians.items()}
        line("parts", **facts, ms=ms, faster={parts: round(one / seconds, 2) for parts, seconds in medians.items()})

    for checkpointed in ("all", "none"):
        checkpoint_only(model, range(layers) if checkpointed == "all" else [])
        times: dict[int, list[float]] = {parts: [] for parts in numbers}
        for _ in range(rounds + 1):
            for parts in numbers:
                times[parts].append(timed(parts))
        one = statistics.median(times[1][1:])
        say(times, one, checkpointed=checkpointed, graphs=False)
        for parts in (parts for parts in numbers if fits_graphs([(-(-rows // parts), machine.length)])):
            gc.collect()
            torch.cuda.empty_cache()
            captured = Captured(model)
            times = {parts: [timed(parts, captured) for _ in range(rounds + 1)]}
            facts = {"recorded": len(captured.known), "said": sorted(captured.said)}
            say(times, one, checkpointed=checkpointed, graphs=True, **facts)
            captured.forget()
    net.place(machine.device_map())


def few_in_flight(machine: Machine, model: nn.Module, net: nn.Module) -> None:
    """The same batch on capped GPUs with all micro-batches in flight, and with a few: time, and what each GPU held.

    Equal halves. Where memory runs out, the line says so.
    """
    machine.cap(CAP)
    layers, rows = machine.config.num_layers, overlap_rows(machine)
    cut = (layers // 2, layers - layers // 2)
    net.place(machine.device_map(cut))
    places = {name: machine.devices.index(place) for name, place in machine.device_map(cut).items()}
    batch = random_batch(machine.config, rows, machine.length)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    checkpoint_only(model, range(layers))  # or this step has no room
    run_step(model, batch, rows)
    optimizer.step()
    model.zero_grad(set_to_none=True)
    numbers = (4, 8) if machine.tiny else (8, 12, 24)
    for checkpointed, parts, in_flight in product(("all", "none"), numbers, (None, 2, 3)):
        checkpoint_only(model, range(layers) if checkpointed == "all" else [])
        gc.collect()
        if machine.on_gpu:
            clear_workspaces()  # those of lanes that are not used now
            torch.cuda.empty_cache()
        machine.reset_peaks()
        facts: dict[str, Any] = {"cut": cut, "checkpointed": checkpointed}
        try:
            facts["ms"] = round(1e3 * step_seconds(machine, model, batch, parts, in_flight=in_flight), 1)
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)
            facts["error"] = "out of memory"
        model.zero_grad(set_to_none=True)
        how = {"micro_batches": parts, "in_flight": in_flight, "loss_chunk": 512}
        facts |= machine.compare_peaks(places, batch, checkpointed, **how)
        facts["reserved_bytes"] = [torch.cuda.max_memory_reserved(number) for number in range(len(facts["peak_bytes"]))]
        line("in_flight", **facts)
    net.place(machine.device_map())
