"""What CUDA graphs cost in memory and save in time, by the planner's formulas."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmhelpers.cost_model.gpus import find_gpu
from glmhelpers.cost_model.sizes import GRAPH_TOKENS, Setting, Shape, padded_length
from glmhelpers.cost_model.stages import Stage
from glmhelpers.cost_model.step_memory import POOLED, hidden_bytes, stage_terms
from glmhelpers.cost_model.step_time import stage_seconds, step_seconds
from glmhelpers.devicemap.plan import plan_device_map

SMALL = Shape(layers=8, hidden=256, heads=8, inner=1024, vocab=4000, max_length=2048)
SLOW = replace(find_gpu("H100"), launch_forward=2e-3, launch_again=2e-3, launch_backward=2e-3)


@given(rows=st.integers(1, 64), length=st.integers(8, 2048))
def test_what_is_recorded_is_short_enough_and_as_long_as_it_can_be(rows, length):
    setting = Setting(rows, length, cuda_graphs=True)
    recorded = setting.recorded
    if rows * 16 > GRAPH_TOKENS:
        assert recorded is None
        return
    assert recorded.tokens <= GRAPH_TOKENS
    assert setting.replayed == (rows * padded_length(length) <= GRAPH_TOKENS)
    assert recorded.seq_length == padded_length(length) if setting.replayed else recorded.tokens + 16 * rows > 2048
    assert replace(setting, cuda_graphs=False).recorded is None


@settings(deadline=None)
@given(
    parts=st.integers(1, 8),
    length=st.sampled_from([64, 128, 512, 1024, 2048]),
    count=st.integers(1, 8),
    kept=st.integers(0, 8),
    head=st.booleans(),
    first=st.booleans(),
)
def test_graphs_take_a_little_more_and_what_they_hold_is_held_all_the_time(parts, length, count, kept, head, first):
    setting = Setting(2 * parts, length, parts, label_share=0.5)
    stage = Stage.of(count, min(kept, count), first=first, head=head)
    (_, plain), (_, more) = (
        stage_terms(SMALL, replace(setting, cuda_graphs=graphs), stage, 1000) for graphs in (False, True)
    )
    extra = sum(more.values()) - sum(plain.values())
    assert extra > 0
    assert more["loss"] >= plain["loss"] * 0.99
    held = sum(plain[term] for term in POOLED)
    assert sum(more[term] for term in POOLED) >= held
    if setting.tokens <= GRAPH_TOKENS:  # nothing but copies at the ends, and the loss beside the pool
        copies = (3 * parts + 6) * hidden_bytes(SMALL, setting)
        working = [stage_terms(SMALL, setting, stage)[1][term] for term in ("block", "loss")]
        assert extra < copies + sum(working) + 20 * more["lora"] + 4096 + 2 * more["masks"]


def test_the_host_starts_segments_instead_of_blocks():
    setting = Setting(4, 64, 2, cuda_graphs=True)
    stage = Stage.of(8, 5, head=True)
    time = stage_seconds(SMALL, setting, stage, SLOW)
    assert time.launch_backward == pytest.approx(4 * SLOW.launch_graph)
    assert time.launch_forward == pytest.approx(4 * SLOW.launch_graph + SLOW.launch_forward)
    long = stage_seconds(SMALL, replace(setting, seq_length=2048), stage, SLOW)
    assert long.launch_backward == pytest.approx(8 * SLOW.launch_backward + 3 * SLOW.launch_again)


@pytest.mark.parametrize("checkpointed", ["auto", "all", "none"])
def test_a_slow_host_gets_graphs_where_they_make_a_step_faster(checkpointed):
    how = {"batch_size": 4, "seq_length": 64, "checkpointed": checkpointed}
    plain = plan_device_map(SMALL, [SLOW], **how)
    chosen = plan_device_map(SMALL, [SLOW], cuda_graphs=None, **how)
    assert chosen.setting.cuda_graphs
    assert chosen.seconds < plain.seconds
    assert "CUDA graphs" in str(chosen)
    assert "CUDA graphs" not in str(plain)
    forced = plan_device_map(SMALL, [SLOW], cuda_graphs=True, **how)
    assert forced.seconds == pytest.approx(chosen.seconds)
    assert chosen.fits
    fast = replace(SLOW, launch_forward=1e-9, launch_again=1e-9, launch_backward=1e-9)
    assert not plan_device_map(SMALL, [fast], cuda_graphs=None, **how).setting.cuda_graphs


@pytest.mark.parametrize("checkpointed", ["all", "none"])
@pytest.mark.parametrize("length", [64, 512, 2048])
def test_the_plan_with_graphs_is_the_fastest_of_all_cuts_and_parts(checkpointed, length):
    best = float("inf")
    for parts, cut in product((1, 2, 4, 8), range(9)):
        setting = Setting(8, length, parts, cuda_graphs=True)
        kept = checkpointed == "none"
        ends = [Stage.of(cut, cut * kept, True, first=True)] if cut else []
        ends.append(Stage.of(8 - cut, (8 - cut) * kept, not cut, True, first=not cut))
        times = [stage_seconds(SMALL, setting, stage, SLOW) for stage in ends]
        best = min(best, step_seconds(times, parts))
    how = {"embedding": "first", "checkpointed": checkpointed, "cuda_graphs": True}
    assert plan_device_map(SMALL, [SLOW, SLOW], 8, length, **how).seconds == pytest.approx(best)


def test_where_there_is_no_room_for_graphs_the_plan_says_so():
    plan = plan_device_map(SMALL, [SLOW], 4, 64)
    assert plan.graphs_fit
    just = replace(SLOW, memory=plan.total_bytes[0])
    assert not plan_device_map(SMALL, [just], 4, 64).graphs_fit
