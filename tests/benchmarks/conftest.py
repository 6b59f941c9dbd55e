"""Runs a program of `benchmarks/` in its reduced form."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def reduced(tmp_path):
    """Name of a program -> what it printed on the tiny model, once it ended well; its files are in `tmp_path`."""

    def run(name):
        command = [sys.executable, str(BENCHMARKS / name), "--tiny", "--out", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        return done.stdout

    return run
