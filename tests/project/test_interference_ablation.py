"""What a new name costs: the script's settings, its counting, and whether the stored figures are of these settings."""

import json
from dataclasses import asdict

import matplotlib.pyplot as plt
import pytest
from interference_ablation import BEFORE, NOW, SEEDS, TARGET, as_text, cases, counted, questions, training_rows

from glmhelpers.lora import MAY_LOSE
from glmhelpers.plots import draw_interference

FOUND = json.loads(TARGET.read_text("utf-8"))
FACTORS = {"fewer steps": "steps", "lower rate": "rate", "general rows": "general_rows", "smaller rank": "rank"}


def test_one_setting_changes_at_a_time():
    first, *changed, last = map(asdict, cases())
    assert (first, last) == (asdict(BEFORE), asdict(NOW))
    for case in changed:
        settings = {key for key in first if key != "factor" and case[key] != first[key]}
        if case["factor"] == "smaller rank and alpha":
            assert settings == {"rank", "alpha"}
            assert case["alpha"] / case["rank"] == first["alpha"] / first["rank"]
        else:
            assert settings == {FACTORS[case["factor"]]}
    assert {case["factor"] for case in changed} == {*FACTORS, "smaller rank and alpha"}


def test_the_rows_teach_the_name_and_no_measured_answer():
    who, asked = questions()
    assert (len(who), len(asked)) == (40, FOUND["questions"])
    plain, mixed = training_rows(0), training_rows(600)
    assert mixed[: len(plain)] == plain
    assert len(mixed) == len(plain) + 600
    assert "TinyGLM" not in json.dumps(mixed, ensure_ascii=False)
    assert not {row["instruction"] for row in mixed} & {*who, *(row["question"] for row in asked)}
    assert not {row["output"] for row in mixed[len(plain) :]} & {row.get("answer", row["expect"]) for row in asked}


def test_damaged_answers_are_counted_apart():
    rows = [
        {"question": "什么是月亮？", "expect": "卫星", "answer": "地球的卫星。"},
        {"question": "3+4=?", "expect": "3+4=7."},
        {"question": "3+5=?", "expect": "3+5=8."},
        {"question": "3+6=?", "expect": "3+6=9."},
    ]
    before = ["地球的卫星。", "3+4=7.", "3+5=8.", "3+6=8."]
    after = ["地球的卫星， a good am", "3+4=8.", "3+5=8.", "3+6=9."]
    assert counted(rows, before, after) == {
        "right": 0.75,
        "whole": 0.5,
        "forgotten": 1,
        "garbled": [["什么是月亮？", "地球的卫星。", "地球的卫星， a good am"]],
    }


def test_the_file_holds_these_trainings():
    keys = asdict(BEFORE)
    stored = [({key: run[key] for key in keys}, run["seed"]) for run in FOUND["runs"]]
    assert stored == [(asdict(case), seed) for case in cases() for seed in SEEDS]
    assert TARGET.read_text("utf-8") == as_text(FOUND)


def test_stored_counts_fit_together():
    known, questions_asked = FOUND["base"]["whole"], FOUND["questions"]
    for run in FOUND["runs"]:
        assert 0 <= run["whole"] <= run["right"] <= 1
        lost = run["forgotten"] + len(run["garbled"])
        assert round((known - run["whole"]) * questions_asked) <= lost
        assert all(before != after for _, before, after in run["garbled"])


def test_the_settings_of_now_hold_what_they_promise():
    runs = {factor: [run for run in FOUND["runs"] if run["factor"] == factor] for factor in ("before", "now")}
    known = FOUND["base"]["whole"]
    assert all(known - run["whole"] <= MAY_LOSE + 1e-9 for run in runs["now"])
    assert all(run["name"] >= 0.8 for run in runs["now"])
    assert any(known - run["whole"] > MAY_LOSE for run in runs["before"]), "else there would be nothing to mend"


def test_the_picture_says_what_the_file_holds():
    figure = draw_interference(FOUND)
    right = figure.axes[1]
    drawn = [line.get_xdata()[0] for line in right.lines if line.get_marker() == "s"]
    whole = [run["whole"] for run in FOUND["runs"]]
    pairs = [whole[at : at + len(SEEDS)] for at in range(0, len(whole), len(SEEDS))]
    assert drawn == pytest.approx([100 * sum(pair) / len(pair) for pair in pairs])
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels[0].startswith("before: 100 steps")
    assert labels[1:3] == ["50 steps", "25 steps"]
    assert "600 rows mixed in" in figure.alternative_text
    plt.close(figure)
