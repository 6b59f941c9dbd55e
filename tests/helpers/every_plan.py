"""The planner's answer by trying every plan that there is."""

from itertools import combinations_with_replacement, pairwise, product

from glmhelpers.cost_model.gpus import find_gpus
from glmhelpers.cost_model.sizes import Setting, Shape, divisors
from glmhelpers.cost_model.step_memory import Stage, slack_bytes, stage_terms
from glmhelpers.cost_model.step_time import lookup_seconds, stage_seconds, step_seconds


def try_everything(config, gpus, batch, length, objective, reserve=0, in_flight=None, **how):
    """Every cut, embedding, number of micro-batches and (for speed) number of blocks without checkpointing; then as
    many micro-batches in flight as there are GPUs, if all of them would do too."""
    arguments = (config, gpus, batch, length, objective, reserve)
    best = try_all(*arguments, in_flight or batch, **how)
    if best is None or in_flight or objective == "memory":
        return best
    return min(best, try_all(*arguments, min(batch, len(gpus)), **how) or best)


def try_all(config, gpus, batch, length, objective, reserve, in_flight, **how):
    """The same with no more than `in_flight` in flight."""
    shape, cards = Shape.of(config), find_gpus(gpus)
    units, best = shape.layers + 1, None
    for cuts in combinations_with_replacement(range(units + 1), len(cards) - 1):
        edges = [0, *cuts, units]
        counts = [b - a for a, b in pairwise(edges)]
        used = [number for number, count in enumerate(counts) if count]
        for place, parts in product(("first", "tied", "cpu"), divisors(batch)):
            chunk = 512 if objective == "speed" else 128
            setting = Setting(batch, length, parts, loss_chunk=chunk, in_flight=min(in_flight, parts), **how)
            stages, times, peaks = [], [], []
            for number in used:
                head = number == used[-1]
                here = (place == "first" and number == used[0]) or (place == "tied" and head)
                choices = range(counts[number] - head + 1) if objective == "speed" else [0]
                fitting = []
                for kept in choices:
                    stage = Stage.of(
                        counts[number] - head,
                        kept,
                        embedding=here,
                        head=head,
                        shared=here and head,
                        first=number == used[0],
                    )
                    _, terms = stage_terms(shape, setting, stage, cards[number].gemm_workspace)
                    slack = slack_bytes(terms, setting.flying if setting.flying < parts and len(used) > 1 else 1)
                    total = sum(terms.values()) + slack + cards[number].context
                    if total <= cards[number].memory - reserve:
                        fitting.append((stage_seconds(shape, setting, stage, cards[number]), sum(terms.values())))
                if not fitting:
                    break
                stages.append(number)
                time, peak = min(fitting, key=lambda item: item[0].backward)
                times.append(time)
                peaks.append(peak)
            if len(stages) < len(used):
                continue
            start = lookup_seconds(shape, setting, place, len(used), cards[0])
            seconds = start + step_seconds(times, parts, setting.flying)
            score = (seconds,) if objective == "speed" else (max(peaks), seconds)
            if best is None or score < best:
                best = score
    return best
