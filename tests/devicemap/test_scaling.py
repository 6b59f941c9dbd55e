"""The paper on many GPUs: formulas against the same step played event by event, and what each way is known for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmhelpers.cost_model.gpus import find_gpu
from glmhelpers.devicemap.scaling import WAYS, _Cluster, _finish, scale_out, scaling_table
from thuglm import ChatGLMConfig

CONFIG = ChatGLMConfig()
COUNTS = (1, 2, 4, 8, 16, 32, 64)


@pytest.fixture(scope="module")
def points():
    return scale_out(CONFIG, "T4", COUNTS)


def by(points):
    return {(point.way, point.gpus): point for point in points}


def test_every_formula_agrees_with_the_simulation(points):
    assert {(point.way, point.gpus) for point in points} == {(way, count) for way in WAYS for count in COUNTS}
    for point in points:
        if not point.why:
            assert point.simulated == pytest.approx(point.seconds, rel=0.03), point


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([256, 1024]),
    st.sampled_from([64, 128]),
    st.sampled_from([1e8, 3e9, 3e10]),
    st.sampled_from([2, 4, 8]),
)
def test_they_agree_on_other_machines_too(length, rows, network, per_machine):
    for point in scale_out(CONFIG, "A100", (1, 4, 16), per_machine, rows, length, network):
        if not point.why:
            # Where messages weigh as much as work, a pipeline of unequal ranks hides some of what the formula adds up.
            assert point.simulated == pytest.approx(point.seconds, rel=0.15), point


def test_what_each_way_is_known_for(points):
    found = by(points)
    alone = found["dp", 1]
    assert all(found[way, 1].seconds == pytest.approx(alone.seconds) for way in WAYS)
    assert found["dp", 64].held_bytes > 0.99 * alone.held_bytes
    assert found["tp", 8].held_bytes < found["fsdp", 8].held_bytes < found["dp", 8].held_bytes
    assert found["dp", 64].sent_bytes < found["dp pp", 64].sent_bytes < found["fsdp", 64].sent_bytes
    assert found["tp", 16].tokens_per_s < found["tp", 8].tokens_per_s  # it does not leave the machine
    assert found["dp pp", 32].busy < found["dp pp", 8].busy
    assert "28 blocks for 32 ranks" in found["pp", 32].why
    assert "32 heads for 64 GPUs" in found["tp", 64].why
    assert "64 rows for 128 GPUs" in scale_out(CONFIG, counts=(128,), batch_size=64)[0].why


def test_gpus_that_do_not_hold_the_model_are_told():
    found = by(scale_out(CONFIG, "8GiB", (8,), batch_size=64))
    assert not found["dp", 8].fits
    assert found["dp pp", 8].fits
    assert found["fsdp", 8].fits
    assert "too much" in scaling_table(list(found.values()), (8,))


def test_a_ring_is_as_fast_as_its_slowest_link():
    cluster = _Cluster(find_gpu("T4"), 4, 1e9)
    for count in (2, 4, 8, 16):
        assert cluster.ring_simulated(1e8, count, 2 * (count - 1)) == pytest.approx(
            cluster.ring(1e8, count, 2 * (count - 1)), rel=0.35 if count > 4 else 1e-9
        )
    assert cluster.ring(1e8, 8, 14) > 5 * cluster.ring(1e8, 4, 6)


def test_fetching_hides_behind_work():
    assert _finish([(1, 5)] * 4) == 1 + 4 * 5
    assert _finish([(5, 1)] * 4) == 4 * 5 + 1
    assert _finish([]) == 0


def test_table_has_a_line_for_each_way_and_count(points):
    lines = scaling_table(points).splitlines()
    assert len(lines) == 2 + 2 * len(WAYS)
    assert all(name in "".join(lines) for name in WAYS.values())
