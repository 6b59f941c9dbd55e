"""The program for four GPUs in its reduced form: every road, one gradient, a killed rank that nobody notices."""

import json

import pytest

pytestmark = pytest.mark.once


def test_reduced_run_takes_every_road_and_survives_a_killed_rank(tmp_path, reduced):
    reduced("four_gpus.py")
    lines = [json.loads(text) for text in (tmp_path / "four_gpus.jsonl").read_text().splitlines()]
    roads = {(line["gpus"], line["pipelines"]): line for line in lines if "ms" in line and "loss" in line}
    assert set(roads) == {(1, 1), (4, 1), (2, 2), (1, 4)}
    assert max(road["loss"] for road in roads.values()) - min(road["loss"] for road in roads.values()) < 1e-4

    gradients = [line for line in lines if line.get("figure") == "gradients"]
    assert {line["road"] for line in gradients} == {"pp 4", "dp 2 x pp 2", "dp 4"}
    assert all(line["same_matrices"] and line["distance"] < 1e-3 for line in gradients)
    (ranking,) = [line for line in lines if line.get("figure") == "ranking"]
    assert sorted(ranking["planned_ms"]) == sorted(ranking["ms"])
    assert len(ranking["ms"]) == 4
    (killed,) = [line for line in lines if line.get("figure") == "killed"]
    assert "goes on from step 5" in killed["resumed"][0]
    assert killed["largest_difference"] == 0
    assert (tmp_path / "8x32-one-process-1x4-0.png").stat().st_size > 3000
