"""Repeated times end in time, and a disturbed or a first one moves nothing."""

import pytest

from glmhelpers.utils import timing


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(("each", "times"), [(0.1, 10), (0.3, 4), (5.0, 2)])
@pytest.mark.parametrize("first", [0.0, 100.0])
def test_a_measurement_ends_with_its_time_however_slow_it_or_its_first_time_is(clock, each, times, first):
    """Two are wanted at least."""
    calls, warm = [], []

    def measure():
        clock[0] += each if calls else first
        calls.append(len(calls))
        return calls[-1]

    found = timing.repeated(0.95, measure, warm=lambda: warm.append(len(calls)))
    assert found == list(range(1, times + 1))
    assert warm == [1]


def test_laps_follow_each_other_and_add_up(clock):
    laps = timing.Laps()
    for part, seconds in (("a", 1.0), ("b", 2.0), ("a", 4.0)):
        clock[0] += seconds
        laps.end(part)
    assert laps.parts == {"a": 5.0, "b": 2.0}


@pytest.mark.parametrize(("values", "found"), [([1.0, 2.0], 1.25), ([5.0, 1.0, 4.0, 2.0, 3.0], 2.0), ([7.0] * 3, 7.0)])
def test_the_lower_quartile_lies_between_the_values_around_it(values, found):
    assert timing.lower_quartile(values) == found
