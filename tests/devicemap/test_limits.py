"""Sizes that no machine has are refused by the name of what is wrong, and never end in an error of arithmetic."""

import pytest

from glmhelpers.devicemap.plan import DoesNotFit, plan_device_map
from tests.helpers.tiny_models import SMALL_SIZES

ABSURD = (float("inf"), float("-inf"), float("nan"), 10**30, -1, 2.5, "4", None, True)


@pytest.mark.parametrize("name", ["batch_size", "seq_length", "lora_rank", "loss_chunk", "kv_length"])
@pytest.mark.parametrize("value", ABSURD, ids=repr)
def test_absurd_sizes_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name) as refusal:
        plan_device_map(SMALL_SIZES, ["T4", "T4"], **{name: value})
    assert not isinstance(refusal.value, DoesNotFit)


@pytest.mark.parametrize("value", [value for value in ABSURD if value not in (None, 2.5, "4")], ids=repr)
def test_absurd_memory_is_refused(value):
    for gpus, reserve, name in ((["T4", value], 0, "gpus"), (["T4", "T4"], value, "reserve")):
        with pytest.raises((ValueError, TypeError), match=name):
            plan_device_map(SMALL_SIZES, gpus, reserve=reserve)


@pytest.mark.parametrize("objective", ["speed", "memory"])
def test_the_largest_batch_on_16_unlike_gpus(objective):
    """735,134,400 has the most divisors of all batches that may be asked for: 1,344."""
    gpus = [f"{2 + place / 8}GiB" for place in range(16)]
    with pytest.raises(DoesNotFit) as refusal:
        plan_device_map(SMALL_SIZES, gpus, 735_134_400, 1, objective)
    plan = plan_device_map(SMALL_SIZES, gpus, refusal.value.changes["batch_size"], 1, objective)
    assert plan.fits
