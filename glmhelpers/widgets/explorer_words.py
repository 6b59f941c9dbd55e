"""What the explorer says about a plan, beside drawing it.

verdict   This plan does NOT fit: GPU 1 T4 lacks 0.31 GiB.
compare   Best plan for speed (15 | 13 blocks, 4 micro-batches): its fullest GPU holds 0.40 GiB more, ...
measure   Measured on two H100s: peak 6.34 and 6.56 GiB; predicted 6.34 and 6.56 GiB.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from glmhelpers.devicemap.plan import Plan
from glmhelpers.utils.units import GIB


@dataclass(frozen=True)
class Measured:
    """What a plan really took.

    Attributes:
        plan: how the model was spread and the step was cut.
        peak_bytes: for each GPU, the highest `torch.cuda.max_memory_allocated`.
        seconds: of a step, if that was measured.
        where: the machine, for the sentence under the picture.
    """

    plan: Plan
    peak_bytes: Sequence[int]
    seconds: float | None = None
    where: str = "this machine"


def is_same(plan: Plan, other: Plan | None) -> bool:
    """Would these two hold and do the same?"""

    def facts(each: Plan) -> list[Any]:
        return [each.device_map, each.setting, each.checkpointed_layers, list(each.gpus)]

    return other is not None and facts(plan) == facts(other)


def verdict(plan: Plan) -> str:
    """Does it fit, and if not, what is lacking where?"""
    facts = zip(plan.gpus, plan.total_bytes, plan.usable_bytes, strict=True)
    short = [
        f"GPU {index} {gpu.name} lacks {(total - usable) / GIB:.2f} GiB"
        for index, (gpu, total, usable) in enumerate(facts)
        if total > usable
    ]
    return f"This plan does NOT fit: {', '.join(short)}." if short else "This plan fits."


def compare(best: Plan, plan: Plan, objective: str) -> str:
    """What the best plan has more or less than this one: bytes on the fullest GPU, seconds a step."""
    if is_same(best, plan):
        return f"This is the best plan for {objective}."
    blocks = " | ".join(str(len(each)) for each in best.blocks)
    parts = f"{best.micro_batches} micro-batch{'es' * (best.micro_batches > 1)}"
    parts += f", {best.setting.flying} in flight" if best.setting.waves else ""
    held = _difference((max(best.total_bytes) - max(plan.total_bytes)) / GIB, "GiB", "more", "less")
    time = _difference(best.seconds - plan.seconds, "s", "longer", "shorter")
    return (
        f"Best plan for {objective} ({blocks} blocks, {parts}, {len(best.checkpointed_layers)} checkpointed): "
        f"its fullest GPU holds {held}, its step takes {time}."
    )


def _difference(value: float, unit: str, more: str, less: str) -> str:
    if abs(value) < 0.005:
        return "as much" if unit == "GiB" else "as long"
    return f"{abs(value):.2f} {unit} {more if value > 0 else less}"


def against_measured(measured: Measured) -> str:
    """Measured beside predicted, for the plan that was measured."""
    peaks, guesses = (_listed(sizes) for sizes in (measured.peak_bytes, measured.plan.peak_bytes))
    time = ""
    if measured.seconds is not None:
        time = f"; a step took {measured.seconds:.2f} s, predicted {measured.plan.seconds:.2f} s"
    return f"Measured on {measured.where}: peak {peaks} GiB, predicted {guesses} GiB{time}."


def _listed(sizes: Sequence[int]) -> str:
    return " and ".join(f"{size / GIB:.2f}" for size in sizes)


def compact_map(device_map: dict[str, int | str]) -> str:
    """A device map as Python text with runs of blocks on one line each."""
    lines, start, layers = [], 0, sum(".layers." in name for name in device_map)
    for layer in range(layers):
        here = device_map[f"transformer.layers.{layer}"]
        if layer + 1 == layers or device_map[f"transformer.layers.{layer + 1}"] != here:
            lines.append(f'  "transformer.layers.{start}" to ".{layer}": {here!r},')
            start = layer + 1
    names = ["transformer.word_embeddings", "transformer.final_layernorm", "lm_head"]
    ends = [f'  "{name}": {device_map[name]!r},' for name in names]
    return "\n".join(["{", ends[0], *lines, *ends[1:], "}"])
