"""What all processes did, and what one process does: made once for the room."""

import os
import subprocess
import sys

import pytest
import torch

from tests.helpers.one_process import one_run
from tests.helpers.process_cases import CASES, PROJECT, TINY, write_rows
from tests.helpers.resumable_run import StopAt


@pytest.fixture(scope="session")
def folders(grown):
    """Checkpoint -> its folder."""
    return {"tiny": TINY, "grown": grown}


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """The folder of all runs, with the rows in it and a run that one process has begun."""
    folder = tmp_path_factory.mktemp("runs")
    write_rows(folder)
    with pytest.raises(KeyboardInterrupt):
        one_run(folder, "begun_by_one", [StopAt(6)])
    return folder


@pytest.fixture(scope="session")
def results(folders, runs):
    """Case -> what the group of processes found, see `process_cases`; their runs lie in `runs`."""
    command = [sys.executable, "-m", "tests.helpers.process_cases", folders["tiny"], folders["grown"], runs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(map(str, command), cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return {name: case for world in CASES for name, case in torch.load(runs / f"{world}.pt").items()}
