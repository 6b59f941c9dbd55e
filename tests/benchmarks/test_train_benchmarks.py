"""The programs that time training: what they count is what was trained, checked on the tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from glmhelpers.devicemap.plan import plan_device_map

pytestmark = pytest.mark.once

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def rows_module(monkeypatch):
    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    import rows

    return rows


def lines_of(program: str, *options: str) -> list[dict]:
    command = [sys.executable, str(PROJECT / "benchmarks" / program), "--tiny", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_lengths_have_the_published_distribution(rows_module):
    lengths = np.array(rows_module.draw_lengths(50_000, 1024))
    for share, length in rows_module.POINTS[1:-1]:
        assert np.quantile(lengths, share) == pytest.approx(length, rel=0.05)
    assert lengths.max() == 1024


def test_both_ways_train_on_the_same_tokens(rows_module):
    config = rows_module.ChatGLMConfig.from_pretrained(PROJECT / "data" / "tiny-chatglm")
    rows = [rows_module.make_row(config, length) for length in rows_module.draw_lengths(97, 256)]
    padded = rows_module.make_batches(config, rows, 4, 256, alike=False)
    alike = rows_module.make_batches(config, rows, 4, 256, alike=True)

    def texts(batches):
        return sorted(
            (tuple(ids[real == 1].tolist()), tuple(labels[real == 1].tolist()))
            for batch in batches
            for ids, real, labels in zip(*(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True)
        )

    assert texts(padded) == texts(alike) == sorted((tuple(r["input_ids"]), tuple(r["labels"])) for r in rows)
    assert {batch["input_ids"].shape[1] for batch in padded} == {256}
    assert sum(batch["input_ids"].numel() for batch in alike) < sum(len(r["input_ids"]) for r in rows) * 1.6


def test_rows_reports_real_tokens_only(rows_module):
    padded, alike = lines_of("rows.py", "--rows", "24", "--length", "128", "--batches", "4", "--seconds", "60")
    real = sum(rows_module.draw_lengths(24, 128))
    for line in (padded, alike):
        assert line["rows"] == 24
        assert line["tokens_per_s"] * line["seconds"] == pytest.approx(real, rel=0.05)
    assert padded["padding_share"] == pytest.approx(1 - real / (24 * 128), abs=1e-3)
    assert alike["padding_share"] < padded["padding_share"]


def test_planned_measures_each_stage_of_the_planners_choice(monkeypatch):
    """The tiny model is not worth a cut: it is one stage. The real one is two."""
    (line,) = lines_of("train_step.py", "--suite", "planned", "--steps", "1")
    assert (line["gpus"], line["stage"], line["cut"]) == (1, 0, [8])
    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    import train_step

    first, last = train_step.planned_cases(train_step.ChatGLMConfig())
    plan = plan_device_map(train_step.ChatGLMConfig(), ["15GiB"] * 2, 4, 1024)
    assert (first.stage, last.stage, first.gpus) == (0, 1, 2)
    assert list(first.cut) == [len(blocks) for blocks in plan.blocks]
    assert first == train_step.replace(last, stage=0)


def test_launch_reports_what_the_cpu_needs():
    command = [sys.executable, str(PROJECT / "benchmarks" / "launch.py")]
    line = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=500).stdout)
    assert all(line[key] > 0 for key in line if key.endswith("_us"))
