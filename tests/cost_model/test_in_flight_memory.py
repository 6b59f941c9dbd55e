"""Memory of a step that keeps a few micro-batches in flight: the formula against the real step, byte by byte."""

import pytest

from glmhelpers.cost_model.sizes import Setting, Shape
from glmhelpers.cost_model.step_memory import Stage, predict, slack_bytes, stage_terms
from glmhelpers.devicemap.check import part_names
from tests.cost_model.test_memory_formula import MIDDLE, PUBLISHED, seed_map, track_model


@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize(
    ("rows", "length", "kept", "share", "chunk", "rank", "when"),
    [
        (8, 1024, 0, 1.0, 512, 8, "loss of the last micro-batch"),
        (4, 512, 1, 0.5, 128, 8, "loss of the last micro-batch"),
        (4, 512, 4, 0.25, 64, 256, "loss of the last micro-batch"),
        (4, 1024, 0, 0.001, 1, 8, "backward of its block 4 of 4"),
        (8, 1024, 4, 0.001, 1, 8, "forward of its last block"),
        (4, 1024, 2, 0.001, 1, 8, "forward of its last block"),
    ],
)
def test_a_step_with_few_micro_batches_in_flight_equals_the_real_model(
    rows, length, kept, share, chunk, rank, when, lanes
):
    shape = Shape.of(MIDDLE)
    marks = [layer < shape.layers - kept for layer in range(shape.layers)]
    stage = Stage(tuple(marks), embedding=True, head=True, shared=True, first=True)
    setting = Setting(rows, length, 4, rank, label_share=share, loss_chunk=chunk, in_flight=lanes)
    moment, terms = stage_terms(shape, setting, stage)
    assert moment == when
    kept_before = ("weights", "embedding", "lora", "adam", "workspace")
    predicted = sum(size for term, size in terms.items() if term not in kept_before)
    real = track_model(MIDDLE, rows, length, 4, marks, share, chunk, rank, lanes=lanes)
    assert real == pytest.approx(predicted, rel=1e-4)


def test_in_flight_none_or_all_are_one_thing_and_fewer_need_less():
    shape, stage = Shape.of(PUBLISHED), Stage.of(14, 3, head=True)
    terms = {
        flying: stage_terms(shape, Setting(24, 1024, 12, in_flight=flying), stage, 2**20)[1]
        for flying in (None, 12, 11, 3, 2, 1)
    }
    assert terms[None] == terms[12]
    peaks = [sum(size for name, size in each.items() if name != "workspace") for each in terms.values()]
    assert peaks == sorted(peaks, reverse=True)
    assert [each["workspace"] >> 20 for each in terms.values()] == [2, 2, 22, 6, 4, 2]


@pytest.mark.parametrize("wrong", [0, 5, -1, 1.5, "2", True])
def test_in_flight_is_checked(wrong):
    with pytest.raises(ValueError, match=r"in_flight is .* from 1 to 4"):
        Setting(8, 16, 4, in_flight=wrong)


def test_those_that_share_a_prefix_or_are_replayed_are_all_in_flight():
    assert Setting(8, 16, 4, in_flight=2).flying == 2
    assert Setting(8, 16, 4, lora_rank=0, prefix_length=4, in_flight=2).flying == 4
    assert Setting(8, 16, 4, cuda_graphs=True, in_flight=2).flying == 4
    assert Setting(8, 2048, 4, cuda_graphs=True, in_flight=2).flying == 2


def test_slack_has_what_comes_and_goes_once_for_each_lane_of_a_split_model():
    one = predict(PUBLISHED, dict.fromkeys(part_names(28), 0), 4, 1024, micro_batches=4, in_flight=1)
    alone = predict(PUBLISHED, dict.fromkeys(part_names(28), 0), 4, 1024, micro_batches=4, in_flight=2)
    for prediction in (one, alone):
        assert prediction.with_outside[0]["slack"] == slack_bytes(prediction.breakdown[0])
    split = predict(PUBLISHED, seed_map(1), 4, 1024, micro_batches=4, in_flight=3)
    for terms, parts in zip(split.breakdown, split.with_outside, strict=True):
        assert parts["slack"] - slack_bytes(terms) == 2 * (terms["block"] + terms["loss"] + terms["transfer"])
