"""The benchmark of the data path: its corpus is what it says, and both ways give the rows they should."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.reference import tokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benchmarks import convert  # noqa: E402
from benchmarks.corpus import write_corpus  # noqa: E402

ROWS, FILES = 2000, 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("corpus")
    return folder, write_corpus(folder, ROWS, FILES)


def read(folder: Path) -> list[list[dict]]:
    """The rows of each file without a broken one."""
    files = []
    for path in sorted(folder.rglob("*.json")):
        try:
            files.append(json.loads(path.read_text("utf-8")))
        except ValueError:
            continue
    return files


def test_the_corpus_has_the_lengths_of_the_data_set(corpus):
    rows = [row for file in read(corpus[0]) for row in file]
    prompts = [len(row["instruction"]) + len(row["input"].replace("无输入", "")) for row in rows]
    answers = [len(row["output"]) for row in rows]
    for lengths, points in ((prompts, (53, 117, 289)), (answers, (99, 536, 1078))):
        shares = [np.mean(np.array(lengths) <= point) for point in points]
        # 1500 rows: three deviations of the shares are 0.039, 0.023 and 0.008.
        assert shares[0] == pytest.approx(0.5, abs=0.039)
        assert shares[1] == pytest.approx(0.9, abs=0.023)
        assert shares[2] == pytest.approx(0.99, abs=0.008)


def test_the_corpus_is_the_same_for_the_same_seed_and_counts_its_broken_rows(corpus, tmp_path):
    folder, whole = corpus
    assert write_corpus(tmp_path, ROWS, FILES) == whole
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*.json"))
    assert len(paths) == FILES
    assert all((folder / path).read_bytes() == (tmp_path / path).read_bytes() for path in paths)
    # One row in 1000 of one file in four: here one in each of two files.
    assert (whole, len(read(folder))) == (ROWS - 2, FILES - 2)


def test_both_ways_give_the_rows_they_can_read(corpus, tmp_path):
    folder, whole = corpus
    (tmp_path / "new").mkdir()
    (tmp_path / "old").mkdir()
    new = convert.ours(folder, tokenizer(), tmp_path / "new")
    assert (new["rows_found"], new["rows_valid"], new["rows_rejected"], new["rows"]) == (ROWS, whole, 2, whole)
    old = convert.way_of_2023(folder, tokenizer(), tmp_path / "old")
    assert (old["rows"], old["files_passed_over"]) == (sum(map(len, read(folder))), 2)
    assert 0 < old["tokens"] < new["tokens"]


def test_the_results_in_the_notes_are_those_of_the_file():
    lines = (ROOT / "benchmarks" / "results" / "convert_cpu.jsonl").read_text("utf-8").splitlines()
    results, notes = [json.loads(line) for line in lines], (ROOT / "benchmarks" / "NOTES.md").read_text("utf-8")
    for result in results:
        if "rows_per_s" in result:
            assert f"{result['rows_per_s']:,.0f}" in notes
            assert f"{result['rows']:,}" in notes
