"""Saving an adapter: all of it or nothing, whoever else is at work, and nothing of the user's is touched."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from glmhelpers.data import convert_alpaca
from glmhelpers.lora import attach_lora, export_merged, load_adapter, save_adapter
from glmhelpers.lora.adapter_files import ADAPTER_FILES
from glmhelpers.utils.files import _HERE, alone, clear_leftovers, current, whole_file, whole_files
from glmhelpers.weights import convert_to_safetensors
from tests.helpers.reference import CHECKPOINT, fresh_model

PROJECT = Path(__file__).resolve().parents[2]

SAVER = """
import sys
from tests.lora.test_saving import trained
from glmhelpers.lora import save_adapter
models = [trained(seed) for seed in map(int, sys.argv[2].split(","))]
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[3])):
    for model in models:
        save_adapter(model, sys.argv[1])
"""


def trained(seed: int):
    """An adapter that can be told from others in each of its files: another rank, other tensors, other settings."""
    model = attach_lora(fresh_model(), r=2 + seed, seed=seed)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    return model


def saver(folder, seeds, rounds):
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SAVER, str(folder), seeds, str(rounds)]
    process = subprocess.Popen(
        command, cwd=PROJECT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def go(process):
    process.stdin.write("\n")
    process.stdin.flush()


def digests(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_folder_with_other_things_in_it_keeps_them_to_the_byte(tmp_path):
    folder = tmp_path / "work"
    for name in ("notes.txt", "README.md", "run-1/checkpoint-5/optimizer.pt", "tokenizer_config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine: {name}")
    mine = digests(folder)
    for seed in (1, 2):
        save_adapter(trained(seed), folder)
        after = digests(folder)
        assert {name: after[name] for name in mine} == mine
        assert set(after) - set(mine) == set(ADAPTER_FILES)
    assert load_adapter(fresh_model(), folder).peft_config["default"].r == 4
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_a_link_stays_a_link_and_can_be_saved_through_twice(tmp_path):
    (tmp_path / "drive").mkdir()
    (tmp_path / "adapter").symlink_to("drive")
    for seed in (1, 2):
        save_adapter(trained(seed), tmp_path / "adapter")
    assert (tmp_path / "adapter").is_symlink()
    assert sorted(path.name for path in (tmp_path / "drive").iterdir()) == sorted(ADAPTER_FILES)


def test_a_folder_under_the_name_of_a_file_is_refused_before_anything_is_replaced(tmp_path):
    folder = save_adapter(trained(1), tmp_path / "adapter")
    (folder / "course.json").unlink()
    (folder / "course.json").mkdir()
    before = digests(folder)
    with pytest.raises(IsADirectoryError, match="a file belongs there"):
        save_adapter(trained(2), folder)
    assert digests(folder) == before
    (folder / "course.json").rmdir()
    save_adapter(trained(2), folder)


def test_the_active_one_of_several_adapters_is_saved(tmp_path):
    model = trained(1)
    model.add_adapter("other", model.peft_config["default"])
    save_adapter(model, tmp_path / "adapter")
    assert load_adapter(fresh_model(), tmp_path / "adapter").peft_config["default"].r == 3


def test_two_names_of_one_folder_are_one(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    with alone(tmp_path / "a"), pytest.raises(OSError, match="another process is"), alone(tmp_path / "b", wait=False):
        pass


def test_what_is_no_folder_is_refused_and_stays(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "gone").symlink_to("nowhere")
    for name, what in (("file", "a file"), ("gone", "a link to something that is gone")):
        with pytest.raises(NotADirectoryError, match=f"is {what}, not a folder"):
            save_adapter(trained(1), tmp_path / name)
    assert (tmp_path / "file").read_text() == "x"


def test_files_have_the_permissions_of_any_new_file(tmp_path):
    folder = save_adapter(trained(1), tmp_path / "adapter")
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {(tmp_path / "plain").stat().st_mode}


@pytest.mark.once
def test_killed_at_any_moment_the_folder_holds_one_whole_adapter(tmp_path):
    folder, whole = tmp_path / "adapter", {1: trained(1), 2: trained(2)}
    save_adapter(whole[1], folder)
    for attempt in range(12):
        process = saver(folder, "1,2", 1000)
        go(process)
        time.sleep(0.02 + 0.017 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = load_adapter(fresh_model(), folder)
        rank = found.peft_config["default"].r
        wanted = dict(whole[rank - 2].named_parameters())
        for name, parameter in found.named_parameters():
            assert torch.equal(parameter, wanted[name]), (attempt, name)
    save_adapter(whole[2], folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(ADAPTER_FILES)


@pytest.mark.parametrize("moved", range(4))
def test_a_move_that_was_cut_off_is_finished_also_where_nothing_can_be_written(tmp_path, moved, monkeypatch):
    folder = save_adapter(trained(1), tmp_path / "adapter")
    newer = save_adapter(trained(2), tmp_path / "newer")
    (folder / ".adapter.next").mkdir()
    for number, path in enumerate(sorted(newer.iterdir())):
        os.replace(path, (folder if number < moved else folder / ".adapter.next") / path.name)
    with monkeypatch.context() as frozen:
        frozen.setattr("glmhelpers.lora.adapter_files.finish", lambda *_: (_ for _ in ()).throw(PermissionError()))
        assert load_adapter(fresh_model(), folder).peft_config["default"].r == 4
    assert load_adapter(fresh_model(), folder).peft_config["default"].r == 4
    assert sorted(path.name for path in folder.iterdir()) == sorted(ADAPTER_FILES)


@pytest.mark.once
def test_two_processes_that_save_into_one_folder_never_mix(tmp_path):
    folder = tmp_path / "adapter"
    processes = [saver(folder, str(seed), 25) for seed in (1, 2)]
    for process in processes:
        go(process)
    seen = set()
    while any(process.poll() is None for process in processes):
        if (folder / ADAPTER_FILES[0]).exists():
            seen.add(load_adapter(fresh_model(), folder).peft_config["default"].r)
    assert all(process.returncode == 0 for process in processes)
    seen.add(load_adapter(fresh_model(), folder).peft_config["default"].r)
    assert seen <= {3, 4}
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {len(tensor) for name, tensor in tensors.items() if "lora_A" in name} == {config["r"]}


# The mechanism, and the others who use it


def test_threads_that_convert_to_one_output_leave_one_of_the_two(tmp_path):
    rows = {name: [{"instruction": f"{name}{i}", "input": "", "output": "a"} for i in range(300)] for name in "xy"}
    errors = []

    def work(name):
        try:
            for _ in range(10):
                convert_alpaca(rows[name], tmp_path / "train.jsonl")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "xy"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    first = {json.loads(line)["instruction"][0] for line in (tmp_path / "train.jsonl").read_text().splitlines()}
    assert len(first) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.jsonl", "train.report.json"]


@pytest.mark.parametrize("moved", ["train.jsonl", "train.report.json", None])
def test_a_conversion_that_was_killed_between_its_renames_can_be_repeated(tmp_path, moved):
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "a", "input": "", "output": "b"}]))
    convert_alpaca(tmp_path, tmp_path / "train.jsonl")
    (tmp_path / ".train.jsonl.next").mkdir()
    for name in ("train.jsonl", "train.report.json"):
        if name != moved:
            os.replace(tmp_path / name, tmp_path / ".train.jsonl.next" / name)
    assert convert_alpaca(tmp_path, tmp_path / "train.jsonl").rows_valid == 1


def test_a_folder_of_the_users_beside_an_export_stays(tmp_path):
    adapter = save_adapter(trained(1), tmp_path / "adapter")
    base = tmp_path / "base"
    base.mkdir()
    for path in [*CHECKPOINT.iterdir(), *(CHECKPOINT.parent / "tokenizer").iterdir()]:
        (base / path.name).write_bytes(path.read_bytes())
    (tmp_path / "merged.part").mkdir()
    (tmp_path / "merged.part" / "thesis.txt").write_text("years")
    with alone(tmp_path / "merged"), pytest.raises(OSError, match="another process is exporting to"):
        export_merged(base, adapter, tmp_path / "merged", progress=False)
    export_merged(base, adapter, tmp_path / "merged", progress=False)
    assert (tmp_path / "merged.part" / "thesis.txt").read_text() == "years"
    with alone(base), pytest.raises(OSError, match="another process is converting to"):
        convert_to_safetensors(base)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_a_copy_has_the_permissions_of_new_files_whatever_its_original_has(tmp_path, mask):
    (tmp_path / "base").mkdir()
    for path in [*CHECKPOINT.iterdir(), *(CHECKPOINT.parent / "tokenizer").iterdir()]:
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
        (tmp_path / "base" / path.name).chmod(0o600)
    before = os.umask(mask)
    try:
        copied = convert_to_safetensors(tmp_path / "base", tmp_path / "copy")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in copied.iterdir()} == {0o666 & ~mask}


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    nobody = next(pid for pid in range(4_000_000, 0, -1) if not psutil.pid_exists(pid))
    dead, alive, other = (
        f".{key}.{_HERE}.{pid}.x.tmp" for key, pid in (("a", nobody), ("a", os.getpid()), ("b", nobody))
    )
    drive = f".a.elsewhere.{nobody}.x.tmp"  # a folder that two machines share
    for name in (dead, alive, other, drive, "a"):
        (tmp_path / name).touch()
    clear_leftovers(tmp_path, "a", ".tmp")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alive, other, drive, "a"])
    with whole_file(tmp_path / "b") as unfinished:
        unfinished.write_text("new")
    assert not (tmp_path / other).exists()


def test_an_error_leaves_the_old_files_alone(tmp_path):
    with whole_files(tmp_path, "set") as draft:
        (draft / "one").write_text("old")
    with suppress(KeyError), whole_files(tmp_path, "set") as draft:
        (draft / "one").write_text("new")
        raise KeyError
    assert current(tmp_path, "set", "one").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_work_goes_on_where_no_lock_can_be_had(tmp_path, monkeypatch):
    def no_locks(*_, **__):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("glmhelpers.utils.files.FileLock.acquire", no_locks)
    with pytest.warns(UserWarning, match="no lock can be had"), alone(tmp_path / "x"):
        (tmp_path / "x").touch()
    assert (tmp_path / "x").exists()
