"""The search with its bounds on whole settings finds what it finds without them, whatever the settings are."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmhelpers.devicemap.bounds import Bounds
from glmhelpers.devicemap.plan import DoesNotFit, plan_device_map

SMALL = {
    "num_layers": 5,
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "inner_hidden_size": 4096,
    "vocab_size": 32000,
}
TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


def found(gpus, how):
    try:
        plan = plan_device_map(SMALL, gpus, **how)
    except DoesNotFit as refusal:
        return refusal.changes
    return plan.seconds, plan.peak_bytes, plan.device_map, plan.micro_batches, plan.checkpointed_layers


@pytest.mark.once
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
    with_bounds = found(gpus, how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bounds, "that_may_fit", lambda self, variants: variants)
        patch.setattr(Bounds, "least_seconds", lambda self, setting: 0.0)
        patch.setattr(Bounds, "_find_least_time", lambda self, setting, gpu, count: (0.0, 0.0))
        without = found(gpus, how)
    assert with_bounds == without
