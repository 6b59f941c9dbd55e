"""The search with its bounds on whole settings finds what it finds without them, whatever the settings are."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from glmhelpers.devicemap.bounds import Bounds
from glmhelpers.devicemap.plan import DoesNotFit, plan_device_map
from tests.helpers.tiny_models import SMALL_SIZES

TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


def found(gpus, how):
    try:
        plan = plan_device_map(SMALL_SIZES, gpus, **how)
    except DoesNotFit as refusal:
        return refusal.changes
    flying = plan.setting.flying
    return plan.seconds, plan.peak_bytes, plan.device_map, plan.micro_batches, flying, plan.checkpointed_layers


COMMON = {
    "label_share": 0.0,
    "lora_targets": ("query_key_value", "dense_h_to_4h", "dense"),
    "training": True,
}


@pytest.mark.once
@example(  # copies of a prefix, in each of the micro-batches
    ["1GiB"],
    {"batch_size": 12, "seq_length": 1, "objective": "speed", "checkpointed": "auto", **COMMON},
    {"prefix_length": 2000, "prefix_projection": 0},
)
@example(  # a large adapter: its gradients are there while the other micro-batches still are
    ["700MiB"],
    {"batch_size": 12, "seq_length": 512, "objective": "speed", "checkpointed": "none", **COMMON},
    {"lora_rank": 256},
)
@given(
    st.lists(
        st.sampled_from(["380MiB", "450MiB", "520MiB", "700MiB", "1GiB", "2GiB", "T4", "L4"]), min_size=1, max_size=4
    ),
    st.fixed_dictionaries(
        {
            "batch_size": st.sampled_from([1, 4, 6, 12, 60]),
            "seq_length": st.sampled_from([1, 8, 100, 512]),
            "objective": st.sampled_from(["speed", "memory"]),
            "checkpointed": st.sampled_from(["auto", "all", "none"]),
            "label_share": st.sampled_from([0.0, 0.01, 0.37, 1.0]),
            "lora_targets": st.lists(st.sampled_from(TARGETS), min_size=1, unique=True).map(tuple),
            "training": st.sampled_from([True, True, False]),
            "in_flight": st.sampled_from([None, None, 1, 3]),
        }
    ),
    st.one_of(
        st.fixed_dictionaries({"lora_rank": st.sampled_from([0, 8, 256])}),
        st.fixed_dictionaries(
            {"prefix_length": st.sampled_from([1, 128, 2000]), "prefix_projection": st.sampled_from([0, 0, 64])}
        ),
    ),
)
@settings(max_examples=60, deadline=None)
def test_bounds_exclude_no_best_plan(gpus, how, trained):
    how = {**how, **trained}
    if how.get("in_flight"):
        how["in_flight"] = min(how["in_flight"], how["batch_size"])
    with_bounds = found(gpus, how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bounds, "that_may_fit", lambda self, variants, ceiling=None: variants)
        patch.setattr(Bounds, "quick_seconds", lambda self, costs: 0.0)
        patch.setattr(Bounds, "least_seconds", lambda self, costs: 0.0)
        without = found(gpus, how)
    assert with_bounds == without
