"""The planner against trying everything, the map's checks, limits, the time model against its simulation."""

import contextlib
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmhelpers.cost_model.sizes import divisors
from glmhelpers.cost_model.step_memory import predict
from glmhelpers.cost_model.step_time import StageTime, schedule, step_seconds
from glmhelpers.devicemap.check import DeviceMapError, check_device_map
from glmhelpers.devicemap.plan import DoesNotFit, largest_batch, longest_length, plan_device_map
from glmhelpers.utils.units import GIB
from tests.helpers.every_plan import try_everything

PUBLISHED = {
    "num_layers": 28,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "inner_hidden_size": 16384,
    "vocab_size": 130528,
}
SMALL = {**PUBLISHED, "num_layers": 6}
TINY = {"num_layers": 8, "hidden_size": 128, "num_attention_heads": 8, "inner_hidden_size": 512, "vocab_size": 1552}


ROOMS = [
    ["6GiB"],
    ["3GiB", "3GiB"],
    ["T4", "P100"],
    ["2.2GiB", "4GiB"],
    ["4GiB", "2.2GiB"],
    ["2GiB", "2GiB", "2GiB"],
    ["3GiB", "1.4GiB", "5GiB"],
    ["1.8GiB", "1.8GiB", "1.8GiB", "1.8GiB"],
    ["T4", "1.5GiB", "L4", "P100"],
]


@pytest.mark.parametrize("objective", ["speed", "memory"])
@pytest.mark.parametrize("gpus", ROOMS, ids=str)
def test_planner_equals_trying_every_cut(gpus, objective):
    best = try_everything(SMALL, gpus, 4, 512, objective)
    try:
        plan = plan_device_map(SMALL, gpus, 4, 512, objective)
    except DoesNotFit:
        assert best is None
        return
    assert plan.fits
    if objective == "memory":
        assert max(plan.peak_bytes) == best[0]
    assert plan.seconds == pytest.approx(best[-1], rel=1e-12)


@given(
    st.lists(st.integers(900, 6000).map(lambda mib: f"{mib}MiB"), min_size=1, max_size=3),
    st.sampled_from([1, 2, 6]),
    st.sampled_from([33, 64, 512]),
    st.sampled_from(["speed", "memory"]),
    st.sampled_from(
        [{}, {}, {"in_flight": 1}, {"in_flight": 2}, {"lora_rank": 0, "prefix_length": 200}, {"cuda_graphs": True}]
    ),
)
@settings(max_examples=35, deadline=None)
def test_planner_equals_trying_every_cut_in_any_room(gpus, batch, length, objective, how):
    config = {**SMALL, "num_layers": 4}
    how = {**how, "in_flight": min(batch, how["in_flight"])} if "in_flight" in how else how
    best = try_everything(config, gpus, batch, length, objective, **how)
    if best is None:
        with pytest.raises(DoesNotFit, match="GPU"):
            plan_device_map(config, gpus, batch, length, objective, **how)
        return
    plan = plan_device_map(config, gpus, batch, length, objective, **how)
    assert plan.seconds == pytest.approx(best[-1], rel=1e-12)
    check_device_map(config, plan.device_map, gpus)
    again = [0] * len(gpus)
    for device, peak in zip(plan.prediction.devices, plan.prediction.peak_bytes, strict=True):
        again[device] = peak
    assert again == plan.peak_bytes


@pytest.mark.parametrize(("gpu", "rows", "length"), [("T4", 64, 17), ("T4", 8, 193), ("L4", 24, 1024)])
def test_planner_equals_trying_everything_with_graphs(gpu, rows, length):
    """There a block less without checkpointing frees more than what it kept: its part of the pool."""
    best = try_everything(PUBLISHED, [gpu], rows, length, "speed", cuda_graphs=True)
    plan = plan_device_map(PUBLISHED, [gpu], rows, length, cuda_graphs=True)
    assert plan.seconds == pytest.approx(best[-1], rel=1e-12)


def test_goals_for_two_t4s():
    plan = plan_device_map(PUBLISHED, ["T4", "T4"], 4, 1024, "memory")
    assert max(plan.peak_bytes) <= 7.2e9
    assert len(plan.checkpointed_layers) == 28
    assert largest_batch(PUBLISHED, ["T4", "T4"], 1024) >= 60
    one = plan_device_map(PUBLISHED, "T4", 4, 1024, "memory")
    assert one.peak_bytes[0] < 14e9
    assert one.device_map["transformer.word_embeddings"] == one.device_map["lm_head"] == 0


def test_room_left_over_is_used_for_speed():
    fast = plan_device_map(PUBLISHED, ["T4", "T4"], 4, 1024)
    lean = plan_device_map(PUBLISHED, ["T4", "T4"], 4, 1024, "memory")
    assert fast.seconds < lean.seconds
    assert len(fast.checkpointed_layers) < 28
    full = plan_device_map(PUBLISHED, ["T4", "T4"], 4, 1024, checkpointed="all")
    assert fast.seconds < full.seconds
    assert "about" in str(fast)


def test_reserve_is_kept_free():
    free = plan_device_map(PUBLISHED, ["T4", "T4"], 32, 1024, in_flight=32)
    kept = plan_device_map(PUBLISHED, ["T4", "T4"], 32, 1024, in_flight=32, reserve=["2GiB", 0])
    assert kept.total_bytes[0] <= kept.gpus[0].memory - 2 * GIB < free.total_bytes[0]
    empty = plan_device_map(PUBLISHED, ["1GiB", "T4"], reserve=["2GiB", 0])
    assert empty.fits
    assert empty.blocks[0] == []
    with pytest.raises(ValueError, match="3 reserves for 2 GPUs"):
        plan_device_map(PUBLISHED, ["T4", "T4"], reserve=[0, 0, 0])
    batch = largest_batch(PUBLISHED, ["T4", "T4"], 512, reserve="1GiB")
    assert batch < largest_batch(PUBLISHED, ["T4", "T4"], 512)
    plan_device_map(PUBLISHED, ["T4", "T4"], batch, 512, "memory", micro_batches=batch, reserve="1GiB")
    length = longest_length(PUBLISHED, ["T4"], 4, limit=10**6, reserve="1GiB")
    assert 0 < length < longest_length(PUBLISHED, ["T4"], 4, limit=10**6)


def test_a_tiny_gpu_stays_empty():
    plan = plan_device_map(PUBLISHED, ["300MiB", "T4"], 1, 128)
    assert plan.blocks[0] == []
    assert plan.peak_bytes[0] == 0
    assert set(plan.device_map.values()) == {1}


def test_nothing_fits_says_who_is_short_and_what_would_help():
    with pytest.raises(DoesNotFit, match=r"GPU 0 \(T4\) is short by \d+\.\d\d GiB") as caught:
        plan_device_map(PUBLISHED, ["T4"], 64, 1024)
    changes = caught.value.changes
    plan_device_map(PUBLISHED, ["T4"], changes["batch_size"], 1024)
    plan_device_map(PUBLISHED, ["T4"], 64, changes["seq_length"])
    with pytest.raises(DoesNotFit):
        plan_device_map(PUBLISHED, ["T4"], changes["batch_size"] + 1, 1024, "memory", loss_chunk=512)
    with pytest.raises(DoesNotFit) as caught:
        plan_device_map(PUBLISHED, ["6GiB", "6GiB"])
    assert plan_device_map(PUBLISHED, ["6GiB", "6GiB"], base_bits=caught.value.changes["base_bits"]).fits
    with pytest.raises(DoesNotFit) as caught:
        plan_device_map(PUBLISHED, ["T4", "T4"], 24, 1024, checkpointed="none", micro_batches=1)
    assert caught.value.changes["checkpointed"] == "all"
    with pytest.raises(DoesNotFit) as caught:
        plan_device_map(PUBLISHED, ["T4"], 8, 1024, checkpointed="all", micro_batches=1)
    number = caught.value.changes["micro_batches"]
    assert plan_device_map(PUBLISHED, ["T4"], 8, 1024, checkpointed="all", micro_batches=number).fits
    with pytest.raises(DoesNotFit, match="No single change"):
        plan_device_map(PUBLISHED, ["1GiB"])


@pytest.mark.parametrize("gpus", [["T4"], ["T4", "T4"], ["T4", "P100"]], ids=str)
def test_limits_are_the_last_that_fit(gpus):
    options = {"objective": "memory", "loss_chunk": 512}
    batch = largest_batch(PUBLISHED, gpus, 512)
    assert plan_device_map(PUBLISHED, gpus, batch, 512, **options).fits
    with pytest.raises(DoesNotFit):
        plan_device_map(PUBLISHED, gpus, batch + 1, 512, **options)
    length = longest_length(PUBLISHED, gpus, 4, limit=10**6)
    assert plan_device_map(PUBLISHED, gpus, 4, length, **options).fits
    with pytest.raises(DoesNotFit):
        plan_device_map(PUBLISHED, gpus, 4, length + 8, **options)
    assert longest_length(PUBLISHED, gpus, 1) == 2048
    assert largest_batch(PUBLISHED, ["2GiB"], 512) == 0


def test_one_target_may_be_a_plain_name():
    one = plan_device_map(PUBLISHED, lora_targets="dense")
    assert one.setting.lora_targets == ("dense",)
    assert predict(PUBLISHED, one.device_map, 4, 1024, lora_targets="dense").setting.lora_targets == ("dense",)


def test_advice_for_a_large_batch_is_the_last_that_fits():
    with pytest.raises(DoesNotFit) as caught:
        plan_device_map(PUBLISHED, ["T4"] * 4, 720, 2048)
    rows = caught.value.changes["batch_size"]
    assert plan_device_map(PUBLISHED, ["T4"] * 4, rows, 2048).fits
    with pytest.raises(DoesNotFit):
        plan_device_map(PUBLISHED, ["T4"] * 4, rows + 1, 2048)


def test_plans_for_generation():
    plan = plan_device_map(PUBLISHED, ["T4", "T4"], 1, 1024, training=False, kv_length=2048)
    assert plan.micro_batches == 1
    assert sum(terms["cache"] for terms in plan.breakdown) > 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"objective": "fun"}, "objective='fun'"),
        ({"embedding": "attic"}, "embedding='attic'"),
        ({"checkpointed": "half"}, "checkpointed='half'"),
        ({"micro_batches": 3}, "cannot be cut into 3"),
        ({"micro_batches": 0}, "micro_batches is 0"),
        ({"lora_targets": "q_proj"}, "'q_proj'"),
        ({"gpus": ["T4", None]}, "None is no memory size"),
        ({"gpus": ["T5"]}, "T5"),
    ],
)
def test_arguments_that_make_no_sense(arguments, word):
    with pytest.raises(ValueError, match=word):
        plan_device_map(PUBLISHED, **arguments)


@given(st.lists(st.tuples(st.floats(0.001, 9), st.floats(0.001, 9)), min_size=1, max_size=5), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_closed_form_of_the_step_equals_the_simulation(times, parts):
    stages = [StageTime(*pair) for pair in times]
    tasks = schedule(stages, parts)
    assert max(task.end for task in tasks) == pytest.approx(step_seconds(stages, parts))
    late = schedule(stages, parts, delay=2.0)
    assert [task.start for task in late] == pytest.approx([task.start + 2 for task in tasks])
    for gpu in range(len(stages)):
        own = sorted((task.start, task.end) for task in tasks if task.gpu == gpu)
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(own)), "two things at once"
        assert len(own) == 2 * parts


def by_hand(**changes):
    places = {f"transformer.layers.{layer}": int(layer > 14) for layer in range(28)}
    ends = {"transformer.word_embeddings": 0, "transformer.final_layernorm": 1, "lm_head": 1}
    return {**places, **ends, **changes}


def test_a_good_map_passes():
    assert check_device_map(PUBLISHED, by_hand(), ["T4", "T4"]) == {0: list(range(15)), 1: list(range(15, 28))}
    assert check_device_map(PUBLISHED, {"": 0}) == {0: list(range(28))}
    assert check_device_map(PUBLISHED, {"transformer": "cpu", "lm_head": "cpu"}) == {"cpu": list(range(28))}
    mixed = {"": "cuda:1", "transformer.layers": 0, "transformer.layers.27": 1}
    assert check_device_map(PUBLISHED, mixed)[1] == [27]
    for embedding in (0, 1, "cpu"):
        check_device_map(PUBLISHED, by_hand(**{"transformer.word_embeddings": embedding}), ["T4", "T4"])


@pytest.mark.parametrize(
    ("changes", "missing", "message"),
    [
        ({}, "transformer.layers.14", r"block 14 on no GPU \(a gap"),
        ({}, "transformer.layers.27", r"block 27 on no GPU \(the end"),
        ({}, "lm_head", "lm_head is on no GPU"),
        ({}, "transformer.word_embeddings", "word_embeddings is on no GPU"),
        ({"transformer.layers.28": 1}, None, "blocks 0 to 27, not block 28"),
        ({"transformer.layers.3.mlp": 1}, None, "inside one part"),
        ({"transfomer.norm": 1}, None, "'transfomer.norm' is unknown"),
        ({"lm_head": 2}, None, r"GPU 2, which does not exist \(there are 2"),
        ({"lm_head": -1}, None, "GPU -1, which does not exist"),
        ({"lm_head": "gpu1"}, None, "'gpu1' is no device"),
        ({"transformer.layers.20": 0}, None, "layers.20 on GPU 0 comes after transformer.layers.19 on GPU 1"),
        ({"transformer.final_layernorm": 0}, None, "out of order"),
        ({"lm_head": 0}, None, "lm_head is on GPU 0, the final norm on GPU 1"),
        ({"transformer.layers.3": "cpu"}, None, "only the embedding can stay on the CPU"),
    ],
)
def test_every_fault_has_its_message(changes, missing, message):
    wrong = by_hand(**changes)
    wrong.pop(missing, None)
    with pytest.raises(DeviceMapError, match=message):
        check_device_map(PUBLISHED, wrong, ["T4", "T4"])


def test_embedding_neither_first_nor_with_its_tie():
    places = {f"transformer.layers.{layer}": layer // 10 for layer in range(28)}
    ends = {"transformer.word_embeddings": 1, "transformer.final_layernorm": 2, "lm_head": 2}
    with pytest.raises(DeviceMapError, match="tied to"):
        check_device_map(PUBLISHED, places | ends)


@given(st.dictionaries(st.sampled_from(list(by_hand())), st.sampled_from([0, 1, 2, "cpu", "x", None]), max_size=3))
@settings(max_examples=60, deadline=None)
def test_accepted_maps_can_be_predicted(changes):
    wrong = by_hand(**changes)
    with contextlib.suppress(DeviceMapError):
        check_device_map(PUBLISHED, wrong, ["T4"] * 3)
        assert min(predict(PUBLISHED, wrong, 1, 64).peak_bytes) > 0


@pytest.mark.parametrize("count", [2, 3])
def test_a_gpu_that_makes_nothing_faster_is_left_free(count):
    """Where the CPU is the slowest part, every cut takes as long: sums of floats may differ in their last digit."""
    for layers in range(2, 29):
        for config in ({**TINY, "num_layers": layers}, {**PUBLISHED, "num_layers": layers}):
            cards, rows, length = (["T4"], 16, 56) if config["hidden_size"] == 128 else (["H100"], 1, 64)
            plan = plan_device_map(config, cards * count, rows, length)
            assert [len(blocks) for blocks in plan.blocks] == [layers] + [0] * (count - 1)
            assert set(plan.device_map.values()) == {0}


def test_no_empty_gpu_stands_before_or_between_others():
    """Uncut, a batch takes as long with any cut, so nothing but the order decides."""
    for cards, parts in ((["T4"] * 3, 1), (["T4"] * 4, 1), (["T4"] * 3, 4), (["A100"] * 3, 1)):
        held = [bool(blocks) for blocks in plan_device_map(PUBLISHED, cards, 4, 1024, micro_batches=parts).blocks]
        assert held == sorted(held, reverse=True)


INF = float("inf")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"gpus": INF}, "inf is no memory size"),
        ({"gpus": ["T4", float("nan")]}, "nan is no memory size"),
        ({"gpus": 10**400}, "a number of 1329 bits is no memory size"),
        ({"gpus": "9" * 400 + "GiB"}, "is no memory size"),
        ({"reserve": INF}, "inf is no memory size"),
        ({"batch_size": 10**9 + 1}, "batch_size is 1000000001"),
        ({"batch_size": 10**400}, "batch_size is a number of 1329 bits"),
        ({"batch_size": INF}, "batch_size is inf"),
        ({"seq_length": INF}, "seq_length is inf"),
        ({"seq_length": 10**300}, "seq_length is a number of"),
        ({"lora_rank": 10**30}, "lora_rank is 1000000"),
        ({"kv_length": -1}, "kv_length is -1"),
        ({"loss_chunk": INF}, "loss_chunk is inf"),
        ({"label_share": INF}, "label_share is inf"),
        ({"label_share": float("nan")}, "label_share is nan"),
        ({"config": {**PUBLISHED, "num_layers": 10**6}}, "num_layers is 1000000"),
        ({"config": {**PUBLISHED, "vocab_size": 10**400}}, "vocab_size is a number of"),
    ],
)
def test_absurd_sizes_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        plan_device_map(**{"config": PUBLISHED, **arguments})


@pytest.mark.parametrize("batch", [10**9, 735134400, 10**9 - 63])
def test_any_batch_gets_an_answer(batch):
    """735,134,400 has more divisors (1,344) than any smaller number."""
    with pytest.raises(DoesNotFit) as caught:
        plan_device_map(PUBLISHED, ["T4", "15GiB", "L4"], batch, 1024)
    rows = caught.value.changes["batch_size"]
    assert plan_device_map(PUBLISHED, ["T4", "15GiB", "L4"], rows, 1024).fits
    # One block's weights fit, and its tokens are a few: what fits is fast to find, too.
    plan = plan_device_map({**TINY, "num_layers": 1}, ["A100", "H200"], batch // 1000, 1)
    assert plan.fits


def test_many_unequal_gpus():
    """Sixteen GPUs, each with one way to be full: the plan equals trying every cut for the six units there are."""
    gpus = ["1.3GiB", "300MiB"] * 2 + [f"{1.2 + 0.2 * number:.1f}GiB" for number in range(5)] + ["300MiB"] * 7
    used = [gpu for gpu in gpus if gpu != "300MiB"]
    for objective in ("speed", "memory"):
        config = {**SMALL, "num_layers": 3}
        best = try_everything(config, used, 2, 64, objective)
        assert plan_device_map(config, gpus, 2, 64, objective).seconds == pytest.approx(best[-1], rel=1e-12)


@given(st.integers(1, 10**9))
@settings(max_examples=60, deadline=None)
def test_divisors_are_complete(number):
    found = divisors(number)
    assert found == sorted(set(found))
    assert all(number % part == 0 for part in found)
    left, count, prime = number, 1, 2
    while prime * prime <= left:
        power = 0
        while left % prime == 0:
            left, power = left // prime, power + 1
        count, prime = count * (power + 1), prime + 1
    assert len(found) == count * (1 + (left > 1))
