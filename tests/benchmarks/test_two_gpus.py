"""The two-GPU program in its reduced form: whatever devices there are, all its figures, and a split that changes nothing."""

import json

import pytest

pytestmark = pytest.mark.once


def test_reduced_run_gives_every_figure(tmp_path, reduced):
    lines = [json.loads(text) for text in reduced("two_gpus.py").splitlines() if text.startswith("{")]
    by_figure = {}
    for line in lines:
        by_figure.setdefault(line["figure"], []).append(line)
    figures = ("machine", "placement", "equality", "overlap", "graphs", "parts", "in_flight", "trainer", "adapter")
    assert {*figures, "decode"} <= set(by_figure)
    assert [(line["micro_batches"], line["in_flight"]) for line in by_figure["in_flight"]] == [
        (parts, flying) for parts in (4, 8) for flying in (None, 2, 3)
    ] * 2
    assert all(line["ms"] > 0 for line in by_figure["in_flight"])

    recomputed, split = by_figure["equality"]
    assert recomputed["distance"] < 1e-5 < recomputed["another_seed"]
    assert split["distance"] < 1e-4
    assert [(line["cut"][0], line["micro_batches"]) for line in by_figure["overlap"]] == [
        (blocks, parts) for blocks in (5, 4) for parts in (1, 2, 4, 8)
    ]
    (run,) = by_figure["trainer"]
    assert "goes on from step 20" in run["resumed"]
    assert run["largest_difference"] <= (0 if by_figure["machine"][0]["devices"] == ["cpu", "cpu"] else 1e-3)
    assert run["last_loss"] < run["first_loss"] / 2
    assert by_figure["adapter"][0]["trained_to_base"] > 1e-3
    assert by_figure["decode"][0]["same_tokens"]
    for name in ("gantt-5-3.png", "gantt-4-4.png"):
        assert (tmp_path / name).stat().st_size > 5000
