"""Which branches of cells ran: counted in a real kernel, without changing what the cells do."""

import ast
import json

import cell_coverage
import pytest
import run_tutorial
from nbformat.v4 import new_code_cell, new_notebook

CELL = """\
def f(x):
    "Doc."
    if x > 1:
        return "large"
    elif x < 0:
        return "negative"
    return x or "zero"

seen = [f(2), f(0), f(1)]
side = "left" if seen else "right"
for nothing in []:
    seen.append(nothing)
try:
    both = seen and side and f.__doc__
except ValueError:
    both = "never"
(seen, side, both)"""


def test_branches_of_a_kernel(tmp_path, monkeypatch):
    written = tmp_path / "01_x.jsonl"
    monkeypatch.setenv(cell_coverage.FILE_VARIABLE, str(written))
    monkeypatch.setenv("PYTHONPATH", str(run_tutorial.PROJECT / "scripts"))
    notebook = new_notebook(cells=[new_code_cell("a = 1"), new_code_cell(CELL), new_code_cell("a if a else 2")])
    run_tutorial.execute(notebook, "01_x", tmp_path, extension=cell_coverage.EXTENSION)
    shown = notebook.cells[1].outputs[0]["data"]["text/plain"]
    assert ast.literal_eval(shown) == (["large", "zero", 1], "left", "Doc.")
    branches = [json.loads(line) for line in written.read_text().splitlines()]
    missed = [(branch["cell"], branch["line"], branch["source"]) for branch in branches if not branch["reached"]]
    assert sorted(missed) == [
        (2, 6, "return 'negative'"),
        (2, 10, "'right'"),
        (2, 12, "seen.append(nothing)"),
        (2, 16, "both = 'never'"),
        (3, 1, "2"),
    ]
    assert len(branches) == 14
    said = cell_coverage.report([written])
    assert "01_x: 9 of 14 branches ran" in said
    assert "01 [2] line 6: return 'negative'" in said


def test_report_counts_what_is_for_the_tiny_model_apart(tmp_path):
    facts = {"cell": 3, "line": 2, "source": "tiny()", "guard": "run.is_tiny", "reached": False}
    (tmp_path / "04_x.jsonl").write_text(json.dumps(facts) + "\n")
    assert "04_x: 0 of 1 branches ran\nnot run, for the tiny model only: 1" in cell_coverage.report(
        [tmp_path / "04_x.jsonl"]
    )


def test_outputs_of_another_checkpoint_are_not_written_back(tmp_path):
    with pytest.raises(SystemExit):
        run_tutorial.main(["--write", "--weights", str(tmp_path)])
