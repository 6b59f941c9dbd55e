"""The rows written for this project: as their script writes them, well-formed, and apart from the held-out questions."""

import json
import operator
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
DATA = PROJECT / "data"
sys.path.append(str(PROJECT / "scripts"))

import make_rows  # noqa: E402


def read(name: str) -> list[dict[str, str]]:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def key(question: str) -> str:
    """Two questions with one key would be the same to the model: case, blanks, full width and final marks differ."""
    text = unicodedata.normalize("NFKC", question).lower()
    return re.sub(r"[\s.?!。]", "", text)


@pytest.mark.parametrize("name", ["alpaca_tiny.json", "held_out.json", "identity.json"])
def test_files_are_what_the_script_writes(name):
    assert make_rows.all_files()[name] == (DATA / name).read_text(encoding="utf-8")


def test_script_writes_and_checks_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_rows.py", "--data", str(tmp_path)])
    assert make_rows.main() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alpaca_tiny.json", "held_out.json", "identity.json"]
    monkeypatch.setattr(sys, "argv", ["make_rows.py", "--check", "--data", str(tmp_path)])
    assert make_rows.main() == 0
    (tmp_path / "held_out.json").write_text("[]", encoding="utf-8")
    assert make_rows.main() == 1
    assert "held_out.json" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["alpaca_tiny.json", "identity.json"])
def test_rows_are_alpaca_rows(name):
    for row in read(name):
        assert list(row) == ["instruction", "input", "output"]
        assert row["instruction"].strip()
        assert row["output"].strip()


def test_training_rows_are_many_and_none_contradicts_another():
    rows = read("alpaca_tiny.json")
    assert len(rows) >= 400
    answers: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        answers.setdefault((key(row["instruction"]), row["input"]), set()).add(row["output"])
    assert [question for question, found in answers.items() if len(found) > 1] == []
    chinese = sum(bool(re.search("[\u4e00-\u9fff]", row["instruction"])) for row in rows)
    assert 0.35 < chinese / len(rows) < 0.65


def test_arithmetic_is_right_and_stays_within_twenty():
    signs = {"+": operator.add, "-": operator.sub}
    outputs = [row["output"] for row in read("alpaca_tiny.json") + read("identity.json")]
    outputs += [row["expect"] for row in read("held_out.json")]
    sums = [match for text in outputs if (match := re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)\.", text))]
    assert len(sums) > 800
    for a, sign, b, result in (match.groups() for match in sums):
        assert signs[sign](int(a), int(b)) == int(result)
        assert max(int(a), int(b), int(result)) <= 20


def test_arithmetic_questions_fit_their_answers():
    for row in read("alpaca_tiny.json") + [
        {"instruction": r["question"], "output": r["expect"]} for r in read("held_out.json")
    ]:
        if match := re.fullmatch(r"(\d+)([+-])(\d+)=\d+\.", row["output"]):
            numbers = [int(n) for n in re.findall(r"\d+", row["instruction"])]
            assert sorted(numbers) == sorted(int(n) for n in match.group(1, 3)), row


def test_held_out_questions_are_in_no_training_file():
    held_out = read("held_out.json")
    trained = {key(row["instruction"]) for row in read("alpaca_tiny.json") + read("identity.json")}
    assert [row["question"] for row in held_out if key(row["question"]) in trained] == []
    assert len({key(row["question"]) for row in held_out}) == len(held_out)
    counts = Counter(row["topic"] for row in held_out)
    assert set(counts) == {"identity", "arithmetic", "arithmetic_new_pair"}
    assert min(counts.values()) >= 30


def test_new_pairs_are_in_no_training_row():
    trained = {row["output"] for row in read("alpaca_tiny.json") + read("identity.json")}
    for row in read("held_out.json"):
        if row["topic"] == "arithmetic_new_pair":
            assert row["expect"] not in trained
        elif row["topic"] == "arithmetic":
            assert row["expect"] in trained


def test_identity_rows_teach_the_name_and_rehearse_the_rest():
    rows = read("identity.json")
    naming = [row for row in rows if "{name}" in row["output"]]
    rehearsing = [row for row in rows if "{name}" not in row["output"]]
    assert len(naming) > 100
    assert any("=" in row["output"] for row in rehearsing)
    assert not any("TinyGLM" in text for row in rows for text in row.values())
    assert all("{" not in text for row in rehearsing for text in row.values())
    # the same questions that taught the base model its own name
    base = {(row["instruction"], row["output"]) for row in read("alpaca_tiny.json")}
    assert all((row["instruction"], row["output"].replace("{name}", "TinyGLM")) in base for row in naming)
    assert naming[0]["output"].format(name="Nova").count("Nova") == 1
