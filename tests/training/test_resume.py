"""Killed at a random step and started again: the same losses, bit for bit. And checkpoints that must not be used."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from glmhelpers.lora.attach import adapter_from, adapter_weights, attach_lora, lora_config
from glmhelpers.tokens.collate import RightPadCollator
from glmhelpers.training import finetune as training
from glmhelpers.training.checkpoint_manager import (
    MARKER,
    checkpoints,
    keep_last,
    last_complete,
    mark_complete,
    read_state,
    rows_digest,
    run_folder,
    run_settings,
    what_is_wrong,
)
from glmhelpers.training.guards import TrainingStoppedError
from glmhelpers.training.progress import EveryMinutes, Watch
from tests.helpers.reference import fresh_model, tokenizer
from tests.helpers.resumable_run import STEPS, PrintSteps, StopAt, rows, run

PROJECT = Path(__file__).resolve().parents[2]


def numbers(log):
    """The losses of a log, without times."""
    return [(entry["step"], entry.get("loss"), entry.get("eval_loss")) for entry in log]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted")
    log, _ = run(output)
    (folder,) = output.iterdir()
    return numbers(log), folder


def kill_at(step, output):
    """Start the training in a process of its own and kill -9 it when it has printed this step."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.helpers.resumable_run", str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        seen = []
        for line in process.stdout:
            seen.append(line)
            if line == f"STEP {step}\n":
                process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, "".join(seen)
    return seen


def same_state(one, other):
    """Every file of two checkpoints that training depends on holds the same bits."""
    left, right = load_file(one / "adapter_model.safetensors"), load_file(other / "adapter_model.safetensors")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    for name in ("optimizer.pt", "scheduler.pt", "scaler.pt"):
        first, second = (torch.load(folder / name, weights_only=True) for folder in (one, other))
        assert str(first) == str(second), name
    first, second = (torch.load(folder / "rng_state.pth", weights_only=False) for folder in (one, other))
    assert torch.equal(first["cpu"], second["cpu"])
    assert first["python"] == second["python"]


def test_killed_twice_and_started_again_gives_the_same_bits(uninterrupted, tmp_path):
    want, folder = uninterrupted
    chosen = random.SystemRandom()
    first, second = chosen.randrange(1, STEPS // 2), chosen.randrange(STEPS // 2, STEPS)
    print(f"killed at steps {first} and {second}")
    kill_at(first, tmp_path)
    seen = kill_at(second, tmp_path)
    assert any("goes on from step" in line for line in seen)
    assert f"STEP {first - 5}\n" not in seen, "it started from the beginning"
    log, _ = run(tmp_path)
    assert numbers(log) == want
    (again,) = tmp_path.iterdir()
    assert again.name == folder.name
    same_state(again / f"checkpoint-{STEPS}", folder / f"checkpoint-{STEPS}")


@pytest.mark.parametrize("step", [1, 9, 10, 15])
def test_interrupted_before_at_and_after_a_checkpoint_or_an_epoch(step, uninterrupted, tmp_path, capsys):
    """9 steps are 3 epochs: the order of the rows must come back at a border as well as within an epoch."""
    with pytest.raises(KeyboardInterrupt, match=f"stopped at step {step}; the same call will go on from checkpoint-"):
        run(tmp_path, [StopAt(step)])
    assert f"stopped at step {step}; the same call will go on from checkpoint-" in capsys.readouterr().out
    assert numbers(run(tmp_path)[0]) == uninterrupted[0]


def test_damaged_checkpoints_are_passed_over_with_a_reason(uninterrupted, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [StopAt(17)])
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-15", "checkpoint-10"]
    (folder / "checkpoint-15" / MARKER).unlink()
    capsys.readouterr()
    log, _ = run(tmp_path)
    said = capsys.readouterr().out
    assert "checkpoint-15 is skipped: it has no complete.json" in said
    assert "goes on from step 10 of 26" in said
    assert numbers(log) == uninterrupted[0]


def test_killed_while_the_first_checkpoint_was_written(uninterrupted, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [StopAt(1)])
    (folder,) = tmp_path.iterdir()
    (folder / "checkpoint-0" / MARKER).unlink()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [StopAt(1)])
    assert "checkpoint-0 is skipped" in capsys.readouterr().out
    assert last_complete(folder) == folder / "checkpoint-0", "it was written again"
    assert numbers(run(tmp_path)[0]) == uninterrupted[0]


def test_a_finished_run_is_read_back(uninterrupted, capsys):
    want, folder = uninterrupted
    watch = Watch(live=False)
    log, model = run(folder.parent, [StopAt(1)], watch=watch)
    assert "is finished: step 26 of 26" in capsys.readouterr().out
    assert numbers(log) == want
    assert [point["step"] for point in watch.points] == [entry["step"] for entry in log]
    assert re.match(r"steps +0 of 26 now: the run was finished before, .* read back\ntime +not measured", watch.table())
    assert "tokens/s" not in watch.table()
    stored = load_file(folder / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    mine = dict(model.named_parameters())
    for name, tensor in stored.items():
        assert torch.equal(mine[name.replace(".weight", ".default.weight")], tensor)


def test_other_settings_are_another_run_and_lose_nothing(uninterrupted, tmp_path):
    run(tmp_path, learning_rate=1e-3, max_steps=2)
    run(tmp_path, learning_rate=2e-3, max_steps=2)
    first, second = sorted(tmp_path.iterdir())
    rates = {json.loads((folder / "settings.json").read_text())["learning_rate"] for folder in (first, second)}
    assert rates == {1e-3, 2e-3}
    assert all((folder / "checkpoint-2").is_dir() for folder in (first, second))


def test_another_start_is_another_run():
    """A fresh adapter must not go on where an imported one stopped, and the other way round."""
    arguments = training.training_arguments("nowhere", False, max_steps=2)
    names = set()
    for seed in (0, 1):
        model = attach_lora(fresh_model(), seed=seed)
        names.add(json.dumps(run_settings(model, rows(), arguments)))
        tensors = {name: weight.detach() + seed for name, weight in adapter_weights(model).items()}
        loaded = adapter_from(fresh_model(), lora_config(8, 32, 0.1, ("query_key_value",)), tensors, "x")
        names.add(json.dumps(run_settings(loaded, rows(), arguments)))
    assert len(names) == 4


def test_how_the_work_is_cut_is_no_other_run(uninterrupted, tmp_path):
    """Four rows twice or two rows four times: eight rows a step, in the same order."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [StopAt(6)])
    log, _ = run(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert len(list(tmp_path.iterdir())) == 1
    assert [step for step, *_ in numbers(log)] == [step for step, *_ in uninterrupted[0]]


def test_only_the_last_checkpoints_are_kept(uninterrupted):
    names = [path.name for path in checkpoints(uninterrupted[1])]
    assert names == ["checkpoint-26", "checkpoint-25"]
    assert read_state(uninterrupted[1] / "checkpoint-26")["global_step"] == STEPS


# The marker ------------------------------------------------------------------------------------------------------------


def make(run_, step, complete=True):
    folder = run_ / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "adapter.bin").write_bytes(b"12345")
    if complete:
        mark_complete(folder, step=step)
    return folder


def test_every_kind_of_damage_is_named(tmp_path):
    good = make(tmp_path, 1)
    assert what_is_wrong(good) is None
    (good / "adapter.bin").write_bytes(b"123")
    assert what_is_wrong(good) == "adapter.bin has 3 bytes, 5 were written"
    (good / "adapter.bin").unlink()
    assert what_is_wrong(good) == "adapter.bin is missing"
    (good / MARKER).write_text("{")
    assert what_is_wrong(good) == "its complete.json cannot be read"
    assert "stopped while it was written" in what_is_wrong(make(tmp_path, 2, complete=False))


def test_the_newest_complete_one_counts_by_number_not_by_name(tmp_path):
    for step in (5, 10, 100):
        make(tmp_path, step)
    make(tmp_path, 105, complete=False)
    (tmp_path / "checkpoint-note").mkdir()
    said = []
    assert last_complete(tmp_path, said.append) == tmp_path / "checkpoint-100"
    assert len(said) == 1
    assert "checkpoint-105 is skipped" in said[0]
    assert last_complete(tmp_path / "nothing") is None


def test_pruning_counts_complete_ones_only(tmp_path):
    for step in (5, 10, 15):
        make(tmp_path, step)
    make(tmp_path, 12, complete=False)
    make(tmp_path, 20, complete=False)
    keep_last(tmp_path, None)
    assert len(checkpoints(tmp_path)) == 5
    keep_last(tmp_path, 2)
    assert [path.name for path in checkpoints(tmp_path)] == [
        "checkpoint-20",
        "checkpoint-15",
        "checkpoint-12",
        "checkpoint-10",
    ]
    keep_last(tmp_path, 0)  # never the last one
    assert last_complete(tmp_path, lambda _: None) == tmp_path / "checkpoint-15"


def test_one_changed_label_is_another_run(tmp_path):
    examples = rows(4)
    count, digest = rows_digest(examples)
    assert count == 4
    table = datasets.Dataset.from_list(examples)
    assert rows_digest(table) == (count, digest), "the same rows, however they are kept"
    assert rows_digest(table.select([0, 1, 3, 2]))[1] != digest
    examples[2]["labels"][-1] += 1
    assert rows_digest(examples)[1] != digest
    assert run_folder(tmp_path, {"rows": digest}) != run_folder(tmp_path, {"rows": "other"})


def test_checkpoints_by_minutes(tmp_path):
    now = [0.0]

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            now[0] += 60.0

    every = EveryMinutes(3, clock=lambda: now[0])
    run(tmp_path, [Clock(), every, PrintSteps()], save_steps=1000, max_steps=8, save_total_limit=None)
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in checkpoints(folder)] == [f"checkpoint-{step}" for step in (8, 6, 3, 0)]


# What a tester found ---------------------------------------------------------------------------------------------------


def short(folder, model, **changes):
    how = {"max_steps": 2, "learning_rate": 2e-3, "logging_steps": 1, "save_steps": 1, **changes}
    arguments = training.training_arguments(folder, False, **how)
    return training.train(model, rows(), RightPadCollator(tokenizer()), arguments, watch=Watch(live=False))


def test_a_trained_model_starts_a_run_of_its_own(tmp_path, capsys):
    """A second stage must not stand in the place of a fresh run with the same settings."""
    model = attach_lora(fresh_model())
    short(tmp_path, model, learning_rate=1e-2)
    second = short(tmp_path, model)
    assert "not fresh" in capsys.readouterr().out
    again = short(tmp_path, model)
    assert "is finished" in capsys.readouterr().out
    assert numbers(again) == numbers(second)
    fresh = short(tmp_path, attach_lora(fresh_model()))
    assert "finished" not in capsys.readouterr().out
    assert numbers(fresh) != numbers(second)
    assert len(list(tmp_path.glob("run-*"))) == 3


def test_the_same_cell_again_on_a_stopped_model_goes_on(tmp_path, capsys):
    model = attach_lora(fresh_model())
    with pytest.raises(KeyboardInterrupt):
        training.train(
            model,
            rows(),
            RightPadCollator(tokenizer()),
            training.training_arguments(tmp_path, False, max_steps=4, save_steps=1),
            callbacks=[StopAt(3)],
        )
    training.train(
        model,
        rows(),
        RightPadCollator(tokenizer()),
        training.training_arguments(tmp_path, False, max_steps=4, save_steps=1),
    )
    assert re.search(r"goes on from step [23] of 4", capsys.readouterr().out)
    assert len(list(tmp_path.glob("run-*"))) == 1


class Spoil(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            next(iter(adapter_weights(model).values())).data[0, 0] = float("nan")


@pytest.mark.parametrize(("step", "saving"), [(2, "steps"), (3, "steps"), (3, "no")])
def test_spoilt_weights_become_no_checkpoint(step, saving, tmp_path):
    arguments = training.training_arguments(
        tmp_path, False, max_steps=3, save_steps=1, save_strategy=saving, save_total_limit=1
    )
    with pytest.raises(TrainingStoppedError, match=rf"after step {step}, .*lora_A.weight holds NaN or infinity"):
        training.train(
            attach_lora(fresh_model()),
            rows(),
            RightPadCollator(tokenizer()),
            arguments,
            callbacks=[Spoil(step)],
        )
    kept = [folder.name for run_ in tmp_path.glob("run-*") for folder in checkpoints(run_)]
    assert kept == ([] if saving == "no" else [f"checkpoint-{step - 1}"])


def test_a_setting_that_changes_the_result_makes_another_run():
    model, names = attach_lora(fresh_model()), set()
    for changes in (
        {},
        {"lr_scheduler_kwargs": {"num_cycles": 2}},
        {"optim_args": "x=1"},
        {"neftune_noise_alpha": 5},
        {"dataloader_drop_last": True},
    ):
        arguments = training.training_arguments("nowhere", False, max_steps=2, **changes)
        names.add(run_folder("x", run_settings(model, rows(), arguments)))
    assert len(names) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing_factor": 0.5}, "label_smoothing_factor"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1},
            "load_best_model",
        ),
    ],
)
def test_settings_that_would_be_ignored_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        short(tmp_path, attach_lora(fresh_model()), **changes)


def test_no_rows_and_rows_without_labels_are_refused(tmp_path):
    for found, message in (([], "no rows to train on"), ([{"input_ids": [5, 2657, 2660]}], "have no labels")):
        with pytest.raises(ValueError, match=message):
            training.train(
                attach_lora(fresh_model()),
                found,
                RightPadCollator(tokenizer()),
                training.training_arguments(tmp_path, False, max_steps=1),
            )


def test_several_sets_for_the_evaluation_are_refused(tmp_path):
    arguments = training.training_arguments(tmp_path, False, max_steps=1)
    with pytest.raises(ValueError, match="several sets of rows for evaluation"):
        training.train(attach_lora(fresh_model()), rows(), RightPadCollator(tokenizer()), arguments, {"a": rows()})


def test_a_marker_of_something_else_and_a_file_in_the_place_of_a_folder(tmp_path):
    folder = make(tmp_path, 4)
    (folder / MARKER).write_text('{"files": []}')
    (tmp_path / "checkpoint-8").write_text("a file")
    assert what_is_wrong(folder) == "its complete.json cannot be read"
    assert last_complete(tmp_path, lambda _: None) is None
