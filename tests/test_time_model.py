"""How long a step takes: the CPU that starts the kernels, and the weights that must be read, can be the slowest part."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmhelpers.devicemap import plan_device_map
from glmhelpers.gpus import find_gpus
from glmhelpers.shapes import Setting, Shape
from glmhelpers.timemodel import StageTime, Task, block_seconds, busy_share, schedule, step_seconds
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
