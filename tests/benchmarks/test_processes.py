"""The program that lays processes beside one process, in its reduced form: every road, one loss, nothing left behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

PROJECT = Path(__file__).parents[2]


def test_reduced_run_measures_every_road_and_all_have_one_loss(tmp_path, reduced):
    printed = reduced("processes.py")
    lines = [json.loads(text) for text in (tmp_path / "processes.jsonl").read_text().splitlines()]
    assert lines == [json.loads(text) for text in printed.splitlines()]
    measured = [line for line in lines if "loss" in line]
    assert {line["schedule"] for line in measured} == {"one process", "GPipe", "1F1B", "Interleaved1F1B"}
    assert {line["pipelines"] for line in measured} == {1, 2}
    for rows in (8, 4):
        losses = [line["loss"] for line in measured if line["rows"] == rows]
        assert max(losses) - min(losses) < 1e-4
        assert len(losses) >= 5
    assert len([line for line in lines if line.get("figure") == "compare"]) == len(measured)


def test_a_case_that_fails_is_told_and_the_next_one_runs(tmp_path):
    script = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(PROJECT)!r})
from benchmarks.processes import Book, run_cases
from benchmarks.road_bench import Case
two = dict(rows=2, length=8, schedule="GPipe")
book = Book(Path({str(tmp_path)!r}) / "lines.jsonl", "test")
run_cases([Case(**two, parts=2, stages_per_rank=9), Case(**two)], True, book, time.monotonic() + 300)
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    wrong, right = [json.loads(text) for text in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert "every stage needs at least one block" in wrong["error"]
    assert (wrong["parts"], right["parts"]) == (2, 1)
    assert right["loss"] > 0
    assert "==== " in (tmp_path / "lines.stderr.txt").read_text()


def test_a_rank_that_hangs_is_told_with_the_place_where_it_hangs(tmp_path):
    script = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(PROJECT)!r})
from benchmarks import processes
from benchmarks.road_bench import Case
processes.CASE, processes.PATIENCE = 0.3, 60
book = processes.Book(Path({str(tmp_path)!r}) / "lines.jsonl", "test")
processes.run_cases([Case(2, 512, 1, "GPipe")], True, book, time.monotonic() + 300)
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    (hung,) = [json.loads(text) for text in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert hung["error"].startswith("it hung: ")
    assert "most recent call first" in hung["error"]
    text = (tmp_path / "lines.stderr.txt").read_text()
    assert text.count("roads.py") >= 2
    assert "---- rank 1" in text
