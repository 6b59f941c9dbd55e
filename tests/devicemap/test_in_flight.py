"""Plans that keep a few micro-batches in flight: chosen where they are faster, refused where they make no sense."""

import random
from itertools import pairwise

import pytest

from glmhelpers.cost_model.step_time import LANES_START, StageTime, step_seconds
from glmhelpers.devicemap.plan import DoesNotFit, plan_device_map
from glmhelpers.devicemap.schedules import lane_schedule
from tests.devicemap.test_device_map import PUBLISHED, SMALL


def test_memory_that_lanes_leave_saves_running_blocks_again():
    whole = plan_device_map(PUBLISHED, ["T4", "T4"], 24, 1024, in_flight=24)
    few = plan_device_map(PUBLISHED, ["T4", "T4"], 24, 1024)
    assert whole.setting.flying == whole.micro_batches
    assert (few.setting.in_flight, few.checkpointed_layers) == (2, [])
    assert len(whole.checkpointed_layers) > 14
    assert few.seconds < 0.85 * whole.seconds
    assert few.fits
    assert f"in {few.micro_batches} micro-batches, 2 in flight, " in str(few)
    assert "in flight" not in str(whole)
    again = few.prediction
    assert (again.peak_bytes, again.total_bytes) == (few.peak_bytes, few.total_bytes)


def test_on_one_gpu_one_at_a_time_saves_running_blocks_again():
    whole = plan_device_map(PUBLISHED, "T4", 4, 1024, in_flight=4)
    one = plan_device_map(PUBLISHED, "T4", 4, 1024)
    assert (one.setting.in_flight, one.micro_batches) == (1, 4)
    assert len(one.checkpointed_layers) < len(whole.checkpointed_layers)
    assert one.seconds < 0.9 * whole.seconds


def test_where_nothing_is_gained_all_stay_in_flight():
    for gpus, batch in ((["H100"], 24), (["T4"], 1), (["H100", "H100"], 24), (["T4", "T4"], 4)):
        assert plan_device_map(PUBLISHED, gpus, batch, 1024).setting.in_flight is None
    for gpus in (["T4"], ["T4", "T4"]):
        assert plan_device_map(PUBLISHED, gpus, 8, 1024, "memory").setting.in_flight is None
    prefix = plan_device_map(PUBLISHED, ["T4", "T4"], 24, 512, prefix_length=64)
    assert prefix.setting.flying == prefix.micro_batches


def test_what_fits_with_few_in_flight_only_is_named_and_can_be_asked_for():
    with pytest.raises(DoesNotFit, match="in_flight=1") as refusal:
        plan_device_map(PUBLISHED, "T4", 64, 1024)
    assert plan_device_map(PUBLISHED, "T4", 64, 1024, in_flight=refusal.value.changes["in_flight"]).fits
    with pytest.raises(DoesNotFit) as refusal:
        plan_device_map(PUBLISHED, ["3GiB", "3GiB"], 64, 1024)
    assert "in_flight" not in refusal.value.changes


@pytest.mark.parametrize("wrong", [0, -1, 9, 2.5, "2", True, float("inf")], ids=repr)
def test_in_flight_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=r"in_flight is .* from 1 to 8"):
        plan_device_map(SMALL, ["T4", "T4"], 8, 64, in_flight=wrong)


def lanes_played(times, micro_batches, in_flight):
    """Seconds of a step, from the lanes themselves: each is a chain of pieces of work; a GPU takes the piece that has
    waited for it longest, of equals that of the earlier micro-batch."""
    stages = range(len(times))
    chain = [(stage, times[stage].forward) for stage in stages]
    chain += [(stage, times[stage].backward) for stage in reversed(stages)]
    free, lanes = [0.0] * len(times), [(0.0, number, 0) for number in range(in_flight)]
    end = 0.0
    while lanes:
        ready, part, place = min(lanes, key=lambda lane: (max(lane[0], free[chain[lane[2]][0]]), lane[0], lane[1]))
        lanes.remove((ready, part, place))
        stage, seconds = chain[place]
        end = free[stage] = max(ready, free[stage]) + seconds
        if place + 1 < len(chain):
            lanes.append((end, part, place + 1))
        elif part + in_flight < micro_batches:
            lanes.append((end, part + in_flight, 0))
    return max(free)


CLOSE = {1: 1e-12, 2: 1e-12, 3: 0.1, 4: 0.25}
"""Of more than two GPUs, one works at times on what is not the most urgent."""


@pytest.mark.parametrize("stages", CLOSE)
@pytest.mark.parametrize("parts", [4, 12, 24])
def test_as_many_lanes_as_gpus_take_as_long_as_all_at_once_once_they_are_out_of_step(stages, parts):
    times = [StageTime(1.0, 2.0)] * stages
    if parts > stages:
        start = LANES_START * 3.0 * (stages - 1)
        assert step_seconds(times, parts, stages) == pytest.approx(step_seconds(times, parts) + start)
        assert lanes_played(times, parts, stages) == pytest.approx(step_seconds(times, parts), rel=CLOSE[stages])


@pytest.mark.parametrize(("parts", "all_ms", "few_ms"), [(8, 1054.2, 1117.4), (12, 1081.3, 1119.8)])
def test_the_start_of_lanes_is_what_was_measured(parts, all_ms, few_ms):
    """24 x 1024 on two H200s, equal halves, every block checkpointed: benchmarks/results/two_gpus_h200.jsonl."""
    stage = StageTime(all_ms / (parts + 1) / 4, 3 * all_ms / (parts + 1) / 4)
    assert step_seconds([stage] * 2, parts) == pytest.approx(all_ms)
    assert step_seconds([stage] * 2, parts, 2) == pytest.approx(few_ms, rel=0.005)


def test_fewer_lanes_than_gpus_leave_them_idle():
    """With one lane a GPU works while all others wait."""
    times = [StageTime(1.0, 2.0), StageTime(2.0, 3.0)]
    assert step_seconds(times, 8, 1) == lanes_played(times, 8, 1) == 8 * 8
    four = [StageTime(1.0, 2.0)] * 4
    start = LANES_START * 2 * 3.0  # two of the four stages come by at a time
    assert step_seconds(four, 24, 2) - start == pytest.approx(lanes_played(four, 24, 2), rel=0.1)


def test_the_schedule_of_lanes_is_one_that_a_step_can_have():
    drawn = random.Random(1)
    for stages, parts, in_flight in ((1, 4, 1), (2, 6, 2), (2, 6, 1), (3, 9, 3), (4, 8, 2), (2, 6, 4)):
        times = [StageTime(drawn.uniform(1, 2), drawn.uniform(2, 3)) for _ in range(stages)]
        tasks = lane_schedule(times, parts, in_flight, 0.5, 60.0)
        assert len(tasks) == 2 * stages * parts
        assert min(task.start for task in tasks) == 0.5
        assert max(task.end for task in tasks) == pytest.approx(60.0)
        at = {(task.gpu, task.kind, task.micro_batch): task for task in tasks}
        for gpu in range(stages):
            mine = sorted((task for task in tasks if task.gpu == gpu), key=lambda task: task.start)
            assert all(a.end <= b.start + 1e-9 for a, b in pairwise(mine))
            flying = 0
            for task in mine:
                flying += 1 if task.kind == "forward" else -1
                assert flying <= in_flight
        for part in range(parts):
            path = [at[gpu, "forward", part] for gpu in range(stages)]
            path += [at[gpu, "backward", part] for gpu in reversed(range(stages))]
            assert all(a.end <= b.start + 1e-9 for a, b in pairwise(path))


def test_the_drawn_schedule_of_a_plan_ends_with_its_seconds():
    for gpus, lanes in ((["T4", "T4"], 2), (["T4"], 1)):
        plan = plan_device_map(PUBLISHED, gpus, 4, 1024, in_flight=lanes)
        assert plan.setting.waves
        assert max(task.end for task in plan.schedule) == pytest.approx(plan.seconds)
