"""How long a step takes: the CPU that starts the kernels, and the weights that must be read, can be the slowest part."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmhelpers.cost_model.gpus import find_gpus
from glmhelpers.cost_model.sizes import Setting, Shape
from glmhelpers.cost_model.stages import Stage
from glmhelpers.cost_model.step_time import (
    StageTime,
    Task,
    block_seconds,
    busy_share,
    schedule,
    stage_seconds,
    step_seconds,
)
from glmhelpers.devicemap.plan import plan_device_map
from thuglm import ChatGLMConfig

PUBLISHED = ChatGLMConfig()
POSITIVE = st.floats(0.001, 9)


@given(st.lists(st.tuples(POSITIVE, POSITIVE, POSITIVE, POSITIVE), min_size=1, max_size=4), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_the_cpu_that_starts_the_kernels_can_be_the_slowest_part(times, parts):
    stages = [StageTime(*four) for four in times]
    closed = step_seconds(stages, parts)
    assert max(task.end for task in schedule(stages, parts)) == pytest.approx(closed)
    free = [StageTime(a, b) for a, b, _, _ in times]
    assert closed >= step_seconds(free, parts) - 1e-9
    assert closed >= parts * sum(c + d for _, _, c, d in times) - 1e-9


def test_short_rows_are_not_cut_into_single_ones():
    """Sixteen rows of 56 tokens: one row keeps neither a T4 nor the CPU busy, whole batches leave a GPU idle."""
    plan = plan_device_map(PUBLISHED, ["T4", "T4"], 16, 56)
    assert 1 < plan.micro_batches < 16
    assert plan_device_map(PUBLISHED, ["T4", "T4"], 16, 1024).micro_batches == 16


def test_the_busy_share_of_a_schedule_counted_by_hand():
    tasks = [Task(0, "forward", 0, 1, 2), Task(1, "forward", 0, 2, 3), Task(1, "backward", 0, 3, 4)]
    assert busy_share(tasks) == 3 / 8  # two GPUs, four seconds, the first of them idle
    assert busy_share(tasks[:1]) == 1 / 2


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=4))
def test_uncut_one_gpu_works_at_a_time(times):
    stages = [StageTime(ahead, back) for ahead, back in times]
    assert busy_share(schedule(stages, 1)) == pytest.approx(1 / len(stages))
    assert busy_share(schedule(stages, 4)) >= 1 / len(stages) - 1e-9


def test_few_tokens_cost_as_much_as_reading_the_weights():
    shape, gpu = Shape.of(PUBLISHED), find_gpus("T4")[0]
    one, two, many = (block_seconds(shape, Setting(1, n, 1), gpu)[0] for n in (8, 16, 1024))
    assert two == pytest.approx(one, rel=0.05)
    assert one >= shape.matrix_parameters * 2 / gpu.bandwidth
    assert many > 10 * one


# The model against every step measured on H100s: GPUs that wait for their host are left to the tests above ---------------

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
H100 = find_gpus("H100")[0]


def lines(name):
    return [json.loads(line) for line in (RESULTS / f"{name}_h100.jsonl").read_text().splitlines()]


def seconds_of(cut, kept, gpus, how):
    """Of a step: one stage for each number of blocks in `cut`, of which `kept` are not run again."""
    shape, last = Shape.of(PUBLISHED), len(cut) - 1
    stages = [Stage.of(n, k, first=at == 0, head=at == last) for at, (n, k) in enumerate(zip(cut, kept, strict=True))]
    times = [stage_seconds(shape, how, stage, H100) for stage in stages]
    return step_seconds([times[at] for at in gpus], how.micro_batches)


STEPS = [
    line
    for name in ("train_step_speed", "train_step_memory", "train_step_planned")
    for line in lines(name)
    if line["attention"] == "efficient"
]


@pytest.mark.parametrize("number", range(len(STEPS)))
def test_steps_measured_on_an_h100(number):
    case = STEPS[number]
    cut, stage = case["cut"], case.get("stage")
    how = Setting(
        case["batch"],
        case["length"],
        case["micro_batches"],
        lora_fused=case["lora"] == "fused",
        loss_chunk=case["loss_chunk"],
        label_share=case["label_share"],
    )
    share = {"all": 0, "half": 0.5, "none": 1, "[]": 1}[str(case["checkpointed"])]
    kept = [round(share * blocks) for blocks in cut]
    seconds = seconds_of(cut, kept, range(len(cut)) if stage is None else [stage], how)
    if how.tokens < 1024:  # too little work at a time: the host was the slower one
        assert 0.6 * case["ms"] / 1e3 < seconds < case["ms"] / 1e3
    else:
        assert seconds == pytest.approx(case["ms"] / 1e3, rel=0.08)


def test_gain_of_micro_batches_measured_on_two_h100s():
    cases = [line for line in lines("two_gpus") if line["figure"] == "overlap"]
    assert len(cases) == 8
    for case in cases:
        how = Setting(case["rows"], case["length"], case["micro_batches"], label_share=0.5)
        seconds = seconds_of(case["cut"], (0, 0), (0, 1), how)
        assert seconds == pytest.approx(case["ms"] / 1e3, rel=0.04)
