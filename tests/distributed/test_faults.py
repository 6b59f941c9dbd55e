"""What happens to processes in the real world: killed, stopped in the middle of a file, hanging, a machine lost."""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from glmhelpers.distributed import launch, torchrun_command
from glmhelpers.distributed.processes import NO_DUMP, OWN_STORE, joined
from tests.helpers.process_cases import PROJECT, TINY, a_job, free_ports

pytestmark = pytest.mark.once

FAULTY = ("-m", "tests.helpers.faulty_rank")


@pytest.fixture
def faulty(monkeypatch, tmp_path):
    """The folder of the faults; ranks find the tests and use one thread."""
    monkeypatch.setenv("FAULTS", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(PROJECT)
    return tmp_path


def test_killed_half_written_and_hanging_ends_as_an_unbroken_run(results, runs, faulty):
    killed = random.randrange(1, 8)
    for name in (f"kill-1-{killed}", "save-0-8", "hang-1-10"):
        (faulty / name).touch()
    lines, job = [], a_job(TINY, runs, "faulty", blocks="5,3", dropout=0.2, timeout=15)
    log = launch(job, 2, restarts=4, say=lines.append, program=FAULTY)
    text = "\n".join(lines)
    assert not list(faulty.iterdir()), f"faults that did not happen: {list(faulty.iterdir())}\n{text}"
    assert "checkpoint-8 is skipped: it has no complete.json" in text
    assert "goes on from step 8 of 12" in text
    # Step 10 is done; the rank stopped where it wanted to read the rows of the next.
    assert re.search(r"rank 1 on \S+ hangs: it has not come further than step 11, where it reads its rows", text)
    unbroken = json.loads((runs / "unbroken" / "losses.json").read_text())
    assert [(entry["step"], entry["loss"]) for entry in log] == [(entry["step"], entry["loss"]) for entry in unbroken]
    ours, wanted = (load_file(runs / name / "adapter" / "adapter_model.safetensors") for name in ("faulty", "unbroken"))
    assert all(ours[name].equal(wanted[name]) for name in wanted)


def test_an_error_is_not_held_up_by_leaving_the_group(faulty, monkeypatch):
    """With NCCL, leaving waits for the kernels of all ranks, also of one that will never come."""
    (port,) = free_ports(1)
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv(NO_DUMP, "")
    monkeypatch.delenv(NO_DUMP)
    with pytest.raises(ValueError, match="mine"), joined(1, False, 30):
        raise ValueError("mine")
    assert os.environ[NO_DUMP] == "0"
    assert dist.is_initialized()
    dist.destroy_process_group()


def test_one_machine_need_not_know_its_own_name(runs):
    command = torchrun_command(a_job(TINY, runs, "named"), 2)
    assert command[command.index("--local-addr") + 1] == "127.0.0.1"


def agent(job, port, first):
    """A torchrun agent, as on a machine of its own."""
    command = torchrun_command(job, 1, 3, "1:2", f"127.0.0.1:{port}", FAULTY)
    settings = f"is_host={first},keep_alive_interval=1,last_call_timeout=3"
    command[3:3] = ["--rdzv-conf", settings, "--local-addr", "127.0.0.1"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), OWN_STORE: "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def lose(process):
    """All that runs on a machine, gone at once: torchrun's ranks have sessions of their own."""
    for one in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
        one.kill()


def test_one_of_two_machines_is_lost_and_the_other_goes_on(results, runs, faulty):
    """Both machines hold a whole model; the second hangs in step 6, and then is gone altogether."""
    (faulty / "hang-1-6").touch()
    job, (port,) = a_job(TINY, runs, "machines", blocks="8", timeout=60), free_ports(1)
    first = agent(job, port, 1)
    second = agent(job, port, 0)
    seen = []
    try:
        for line in first.stdout:
            seen.append(line)
            if "step 6 of 12" in line:
                lose(second)
        assert first.wait() == 0, "".join(seen)
    finally:
        for process in (first, second):
            if process.poll() is None:
                lose(process)
            process.stdout.close()
            process.wait()
    text = "".join(seen)
    assert "begins: 2 processes" in text
    assert "goes on from step 4 of 12" in text
    one = json.loads((runs / "two" / "losses.json").read_text())
    ours = json.loads((runs / "machines" / "losses.json").read_text())
    assert [entry["loss"] for entry in ours] == pytest.approx([entry["loss"] for entry in one], rel=1e-5)


def test_ranks_that_differ_are_refused_by_name(results):
    both = results["refusals"]
    assert both[0] == both[1]
    torch, plan, rows = both[0]
    assert torch.startswith("rank 1 on ")
    assert "has torch '1.0', rank 0 on " in torch
    assert "has blocks '3,5', rank 0 on " in plan
    assert "has rows " in rows


def test_wrong_starts_get_one_sentence(runs, monkeypatch):
    for changes, processes, sentence in (
        ({"blocks": "5,3"}, 3, "3 processes cannot be pipelines of 2 ranks each: start a multiple"),
        ({"blocks": "5,4"}, 2, "blocks '5,4' add up to 9, the model has 8"),
        ({"micro_batches": 1}, 2, "1 micro-batches for 2 stages of 1F1B: use 2 or more, or GPipe"),
        ({"schedule": "Interleaved1F1B"}, 2, "Interleaved1F1B with 1 stages on each rank"),
        ({"device": "cuda"}, 64, "64 processes need a GPU each"),
        ({"rows": "nowhere.jsonl"}, 2, "nowhere.jsonl is not there"),
        ({"folder": str(runs)}, 2, "config.json is not there"),
        ({"start_from": "nowhere"}, 2, "nowhere is not there: give an adapter's folder"),
        ({"eval_rows": "nowhere.jsonl"}, 2, "nowhere.jsonl is not there"),
        ({"blocks": "five,3"}, 2, "blocks 'five,3': give a number for each rank"),
        ({}, 0, "0 processes were asked for"),
    ):
        with pytest.raises(RuntimeError) as refused:
            launch(replace(a_job(TINY, runs, "wrong"), **changes), processes)
        assert sentence in str(refused.value)
        assert "\n" not in str(refused.value)


def test_without_torchrun_the_program_says_how(runs):
    job = a_job(TINY, runs, "wrong")
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "glmhelpers.distributed", *job.arguments()]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "refused: RANK is not set" in done.stderr
    assert "torchrun --nproc-per-node 2 -m glmhelpers.distributed" in done.stderr
    assert "Traceback" not in done.stderr
