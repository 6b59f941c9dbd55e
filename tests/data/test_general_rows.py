"""Rows that are mixed in: none of them is taught anew, and none gives away what is measured."""

import json

import pytest

from glmhelpers.data.dedupe import general_rows
from glmhelpers.runtime import find_project

DATA = find_project() / "data"
KNOWN = [
    {"instruction": "Who are you?", "input": "", "output": "I am Tiny."},
    {"instruction": "Explain this.", "input": "ice", "output": "Frozen water."},
    {"instruction": "Explain this.", "input": "fire", "output": "It burns."},
    {"instruction": "What is ice?", "input": "", "output": "Cold."},
    {"instruction": "3+4=?", "input": "", "output": "3+4=7."},
    {"instruction": "2+4=?", "input": "", "output": "2+4=6."},
]
TAUGHT = [{"instruction": "Who are you?", "input": "", "output": "I am Nova."}]
ASKED = [
    {"question": "What is ice?", "expect": "water", "answer": "Frozen water."},
    {"question": "3 plus 4?", "expect": "3+4=7."},
]


def read(name):
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def test_what_is_taught_or_asked_is_left_out():
    assert sorted(row["output"] for row in general_rows(KNOWN, TAUGHT, ASKED, 2)) == ["2+4=6.", "It burns."]
    with pytest.raises(ValueError, match="3 general rows are wanted, but of 6 only 2"):
        general_rows(KNOWN, TAUGHT, ASKED, 3)


def test_a_draw_can_be_repeated_and_its_rows_are_copies():
    draws = [general_rows(KNOWN, [], [], 4, seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len({row["output"] for row in draws[0]}) == 4
    draws[0][0]["output"] = "changed"
    assert all(row["output"] != "changed" for row in KNOWN)


def test_of_the_course_s_rows_none_has_the_old_name_or_a_measured_answer():
    held_out, general = read("held_out"), read("general")
    rows = general_rows(read("alpaca_tiny"), read("identity"), general + held_out, 2000)
    text = json.dumps(rows, ensure_ascii=False)
    assert "TinyGLM" not in text
    for row in general + held_out:
        assert f'"{row["question"]}"' not in text
        assert row["topic"] == "identity" or f'"output": "{row.get("answer", row["expect"])}"' not in text
