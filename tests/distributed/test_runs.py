"""Runs of many processes: the Trainer's losses, adapter and checkpoints, taken up by each other."""

import json

import pytest
import torch

from glmhelpers.inference.scores import held_out_loss
from glmhelpers.lora.adapter import load_adapter, save_adapter
from glmhelpers.lora.attach import origin_of
from glmhelpers.tokens.collate import RightPadCollator
from glmhelpers.tokens.encode import encode_file
from tests.helpers.one_process import matrices, one_run
from tests.helpers.process_cases import TINY
from thuglm import ChatGLMForConditionalGeneration, ChatGLMTokenizer


@pytest.fixture(scope="module")
def right(runs):
    """(losses, model) of one process that was never stopped."""
    log, model = one_run(runs, "unbroken")
    return [entry["loss"] for entry in log], model


def close(found, wanted):
    """Adam enlarges rounding: one process differs as much from itself when it cuts its batches otherwise."""
    return all((found[name] - wanted[name]).norm() <= 5e-5 * wanted[name].norm() for name in wanted)


def losses_of(folder, kind="loss"):
    return [entry[kind] for entry in json.loads((folder / "losses.json").read_text()) if kind in entry]


def loaded_from(folder):
    base = ChatGLMForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)
    return load_adapter(base, folder / "adapter", "chatglm")


@pytest.mark.parametrize(("name", "count"), [("begun_by_one", 1), ("started", 2)])
def test_evaluation_loss_is_that_of_one_process(name, count, results, runs):
    tokenizer = ChatGLMTokenizer.from_pretrained(TINY)
    rows = encode_file(runs / "rows.jsonl", tokenizer)
    found = losses_of(runs / name, "eval_loss")
    assert len(found) == count
    wanted = held_out_loss(loaded_from(runs / name), rows, RightPadCollator(tokenizer)).loss
    assert found[-1] == pytest.approx(wanted, rel=1e-5)


def test_a_run_that_starts_from_an_adapter_is_the_trainers(results, runs):
    """Its settings are the adapter's own, it begins with the adapter's loss, and is known by the same digest."""
    first = loaded_from(runs / "two")
    note = json.loads((runs / "started" / "adapter" / "course.json").read_text())
    assert note["settings"]["starts_from"] == origin_of(first).starts_from
    assert note["settings"]["r"] == 8
    assert losses_of(runs / "started")[0] < losses_of(runs / "two")[0] / 2


@pytest.mark.parametrize("name", ["two", "begun_by_one"])
def test_run_has_losses_and_adapter_of_the_trainer(name, results, runs, right):
    losses, model = right
    # The Trainer writes four digits.
    assert losses_of(runs / name) == pytest.approx(losses, abs=2e-4)
    loaded = matrices(loaded_from(runs / name))
    wanted = matrices(model)
    assert sorted(loaded) == sorted(wanted)
    assert close(loaded, wanted)


def test_trainer_goes_on_from_a_checkpoint_of_many(results, runs, right, capsys):
    losses, model = right
    log, finished = one_run(runs, "handed_over")
    assert "goes on from step 4 of 12" in capsys.readouterr().out
    assert [entry["loss"] for entry in log] == pytest.approx(losses, abs=2e-4)
    assert close(matrices(finished), matrices(model))


def test_folder_is_the_one_that_one_process_saves(results, runs, right, tmp_path):
    save_adapter(right[1], tmp_path / "adapter")
    ours, one = (
        {path.name: path for path in folder.iterdir()} for folder in (runs / "two" / "adapter", tmp_path / "adapter")
    )
    assert sorted(ours) == sorted(one)
    configs = [json.loads(files["adapter_config.json"].read_text()) for files in (ours, one)]
    assert configs[0] == configs[1]
    notes = [json.loads(files["course.json"].read_text()) for files in (ours, one)]
    assert notes[0]["base"] == notes[1]["base"]
    assert notes[0]["template"] == notes[1]["template"]


def test_overflow_on_one_rank_makes_all_skip_the_step(results):
    ranks = results["overflow"]
    first, second, *fused = zip(*ranks, strict=True)
    assert [(taken, scale, moved) for taken, scale, _, moved in first] == [(False, 512.0, 0.0)] * 4
    assert all(taken and scale == 512.0 and moved > 0 for taken, scale, _, moved in second)
    # One norm for all: what both stages of a pipeline move by is the learning rate times the clipped norm.
    assert len({norm for _, _, norm, _ in second}) == 1
    assert second[0][2] > 0.5
    moved = [moved for *_, moved in second]
    assert (moved[0] ** 2 + moved[1] ** 2) ** 0.5 == pytest.approx(0.1 * 0.5, rel=1e-4)
    assert moved[:2] == pytest.approx(moved[2:], rel=1e-6)
    assert [(taken, scale, moved > 0) for taken, scale, _, moved in fused[0]] == [(False, 256.0, False)] * 4
    assert [(taken, scale, moved > 0) for taken, scale, _, moved in fused[1]] == [(True, 256.0, True)] * 4
