"""Which road the planner takes: against trying everything that it may choose, and against what is plain."""

from dataclasses import replace
from itertools import product

import pytest

from glmhelpers.cost_model.gpus import find_gpu
from glmhelpers.cost_model.sizes import divisors
from glmhelpers.devicemap.plan import DoesNotFit, plan_device_map
from glmhelpers.distributed import ProcessPlan, compare_roads, forecast_processes, roads_table
from thuglm import ChatGLMConfig

CONFIG = ChatGLMConfig()
SMALL = ChatGLMConfig(num_layers=4, hidden_size=512, inner_hidden_size=2048, num_attention_heads=4)


def test_all_roads_are_there_and_the_fastest_that_fits_comes_first():
    roads = compare_roads(CONFIG, ["T4"] * 4, 24, 512, label_share=0.5)
    names = {road.name.partition(",")[0] for road in roads}
    assert names == {"one process", "pp 4", "dp 2 x pp 2", "dp 4"}
    assert [road.seconds for road in roads if road.fits] == sorted(road.seconds for road in roads if road.fits)
    for road in roads:
        assert len(road.peak_bytes) == len(road.total_bytes) == 4
        assert 0 < road.busy <= 1
    table = roads_table(roads).splitlines()
    assert len(table) == 2 + len(roads)
    assert roads[0].name in table[2]


@pytest.mark.parametrize("size", ["T4", "3GiB", "1400MiB"])
def test_no_plan_of_the_same_kind_is_faster(size):
    batch, length, gpus = 8, 512, [find_gpu(size)] * 2
    best = min(
        (
            found.seconds
            for cut, parts, kept in product(range(1, 4), divisors(batch), range(4))
            if parts > 1
            for found in [
                forecast_processes(
                    SMALL,
                    ProcessPlan((cut, 4 - cut), "1F1B", parts, 1, tuple(b for b in range(4) if b not in gone)),
                    gpus,
                    batch,
                    length,
                )
                for gone in [{*range(max(0, cut - kept), cut), *range(max(cut, 4 - kept), 4)}]
            ]
            if found.fits
        ),
        default=None,
    )
    chosen = [road for road in compare_roads(SMALL, gpus, batch, length) if road.name == "pp 2, 1F1B" and road.fits]
    assert [road.seconds for road in chosen] == ([] if best is None else [pytest.approx(best)])


def test_an_own_host_for_each_rank_counts_where_launches_are_slow():
    names = ("launch_forward", "launch_again", "launch_backward")
    slow = [replace(find_gpu("H100"), **dict.fromkeys(names, 5e-3))] * 2
    roads = compare_roads(CONFIG, slow, 16, 56)
    alone, pipeline = (min(r.seconds for r in roads if r.name.startswith(name)) for name in ("one process", "pp 2"))
    assert alone == pytest.approx(2 * 28 * 5e-3, rel=0.1)
    assert alone / pipeline > 1.8


def test_graphs_spare_the_host_of_ranks_that_have_the_whole_model_and_take_their_pool():
    names = ("launch_forward", "launch_again", "launch_backward")
    slow = [replace(find_gpu("H100"), **dict.fromkeys(names, 5e-3))] * 2
    eager, graphs = ({r.name: r for r in compare_roads(CONFIG, slow, 16, 56, cuda_graphs=on)} for on in (False, True))
    assert eager["dp 2"].seconds > 28 * 10e-3 > 5 * graphs["dp 2"].seconds
    assert graphs["dp 2"].peak_bytes[0] > eager["dp 2"].peak_bytes[0]
    assert graphs["pp 2, 1F1B"] == eager["pp 2, 1F1B"], "a pipeline's schedule has another order than graphs have"
    alone = plan_device_map(CONFIG, slow[0], 8, 56, cuda_graphs=True, micro_batches=1, checkpointed="none")
    buckets = alone.breakdown[0]["lora"]
    assert graphs["dp 2"].peak_bytes[0] == alone.peak_bytes[0] + buckets


def test_one_f_one_b_holds_less_than_gpipe_and_needs_no_second_forward():
    held = {
        schedule: max(forecast_processes(CONFIG, ProcessPlan((14, 14), schedule, 8), ["T4"] * 2, 24, 512).peak_bytes)
        for schedule in ("GPipe", "1F1B")
    }
    assert held["1F1B"] < 0.8 * held["GPipe"]


def test_rows_that_cannot_be_shared_out_are_filled_up():
    plan = ProcessPlan((4,), "GPipe", 2)
    assert forecast_processes(SMALL, plan, ["T4"] * 2, 5, 64, pipelines=2).seconds == pytest.approx(
        forecast_processes(SMALL, plan, ["T4"] * 2, 8, 64, pipelines=2).seconds
    )


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="2 pipelines of 2 ranks need 4 GPUs: 2"):
        forecast_processes(SMALL, ProcessPlan((2, 2), "GPipe"), ["T4"] * 2, 4, 64, pipelines=2)
    with pytest.raises(DoesNotFit):
        compare_roads(CONFIG, ["2GiB"] * 2, 4, 256)
