"""The tutorial runner on small notebooks of its own: success, three kinds of failure, rewriting without noise."""

import base64
import re
import struct
import zlib

import clean_notebook
import nbformat
import pytest
import run_tutorial
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

REPORT = """\
import json, os, pathlib
folder = pathlib.Path(os.environ["GLM_OUTPUT"]) / "results"
folder.mkdir(parents=True, exist_ok=True)
_ = (folder / "{name}.json").write_text(json.dumps({result!r}))"""


@pytest.fixture
def course(tmp_path):
    """A project folder with an empty notebooks/; `course.add(name, *cells)` writes a notebook."""
    folder = tmp_path / "course" / "notebooks"
    folder.mkdir(parents=True)

    def add(name, *cells):
        cells = [new_markdown_cell(f"# {name}"), *(new_code_cell(cell) for cell in cells)]
        path = folder / f"{name}.ipynb"
        nbformat.write(new_notebook(cells=cells), path)
        return path

    def command(*arguments):
        return run_tutorial.main(
            ["--notebooks", str(folder), "--build", str(tmp_path / "course" / "build"), "--jobs", "1", *arguments]
        )

    add.folder, add.build, add.command = folder, tmp_path / "course" / "build", command
    return add


@pytest.fixture(autouse=True)
def environment_restored(monkeypatch):
    for name in (*run_tutorial.SETTINGS, "GLM_OUTPUT"):
        monkeypatch.setenv(name, "0")


def test_runs_in_order_and_ends_with_a_table(course, capsys):
    course("02_second", "print(open('left_by_first').read())", REPORT.format(name="02_second", result={"rows": 7}))
    course("01_first", "open('left_by_first', 'w').write('hello')", "import os; print(os.getcwd())")
    course("notes", "1 / 0")  # neither numbered nor the solutions: not part of the course
    course("solutions", "answer = 6 * 7", "answer")

    assert course.command() == 0

    printed = capsys.readouterr().out
    rows = re.findall(r"^(\w+) +(\d+\.\d)  (.*)$", printed, flags=re.M)
    assert [(name, result) for name, _, result in rows] == [
        ("01_first", "-"),
        ("02_second", "rows=7"),
        ("solutions", "-"),
    ]
    assert sorted(path.name for path in course.build.glob("*.*")) == sorted(
        f"{name}.{kind}" for name in ("01_first", "02_second", "solutions") for kind in ("ipynb", "html")
    )
    executed = nbformat.read(course.build / "02_second.ipynb", as_version=4)
    nbformat.validate(executed)
    assert executed.cells[1].outputs[0].text == "hello\n"
    assert "hello" in (course.build / "02_second.html").read_text()
    untouched = nbformat.read(course.folder / "02_second.ipynb", as_version=4)
    assert all(not cell.outputs for cell in untouched.cells if cell.cell_type == "code")


def test_kernels_see_the_tiny_model_and_the_cpu_only(course, monkeypatch, capsys):
    monkeypatch.setenv("GLM_WEIGHTS", "real")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    names = ["GLM_WEIGHTS", "GLM_DEVICES", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "GLM_OUTPUT"]
    course("01_first", f"import os\nfor name in {names}: print(repr(os.environ[name]))")
    assert course.command() == 0
    shown = nbformat.read(course.build / "01_first.ipynb", as_version=4).cells[1].outputs[0].text
    assert shown.splitlines() == ["'tiny'", "'cpu'", "''", "'1'", "'outputs'"]


def test_another_checkpoint_stands_for_the_real_one_and_branches_are_counted(course, monkeypatch, tmp_path, capsys):
    for name in ("PYTHONPATH", "GLM_CELL_COVERAGE"):
        monkeypatch.setenv(name, "")
    course(
        "01_first", "import os\nprint(os.environ['GLM_WEIGHTS'])", "if os.environ['GLM_WEIGHTS'] == 'tiny':\n    1 / 0"
    )
    assert course.command("--weights", str(tmp_path)) == 0
    assert nbformat.read(course.build / "01_first.ipynb", as_version=4).cells[1].outputs[0].text.strip()
    assert "01_first: 0 of 1 branches ran" in (printed := capsys.readouterr().out)
    assert "01 [2] line 2: 1 / 0" in printed


def test_results_of_an_earlier_run_are_gone(course):
    stale = course.build / "outputs" / "adapter"
    stale.mkdir(parents=True)
    course("01_first", "import os, pathlib\nassert not (pathlib.Path(os.environ['GLM_OUTPUT']) / 'adapter').exists()")
    assert course.command() == 0


WAIT = """\
import os, pathlib, time
for _ in range(600):
    if pathlib.Path({name!r}).exists(): break
    time.sleep(0.1)
else: raise TimeoutError({name!r})"""


def test_two_at_a_time_run_beside_each_other_and_the_numbered_ones_in_order(course, capsys):
    """Each waits for what another one writes: one at a time none of them would end."""
    course("01_first", "open('first', 'w').close()", WAIT.format(name="solved"), "open('second_may', 'w').close()")
    course(
        "02_second", "import os\nassert os.path.exists('second_may')", REPORT.format(name="02_second", result={"n": 2})
    )
    course(
        "solutions",
        WAIT.format(name="first"),
        "open('solved', 'w').close()",
        "print(os.environ['GLM_OUTPUT'], not os.listdir(os.environ['GLM_OUTPUT']))",
        REPORT.format(name="solutions", result={"n": 3}),
    )
    assert course.command("--jobs", "2") == 0
    rows = re.findall(r"^(\w+) +\d+\.\d  (.*)$", capsys.readouterr().out, flags=re.M)
    assert rows == [("01_first", "-"), ("02_second", "n=2"), ("solutions", "n=3")]
    solved = nbformat.read(course.build / "solutions.ipynb", as_version=4)
    assert solved.cells[3].outputs[0].text == "outputs True\n"


def test_after_a_failure_nothing_more_is_started(course, capsys):
    course("01_bad", "1 / 0")
    course("02_never", "open('reached', 'w')")
    course("solutions", "6 * 7")
    assert course.command("--jobs", "2") == 1
    assert "FAILED: 01_bad, cell 2 of 2" in capsys.readouterr().err
    assert not (course.folder / "reached").exists()


def test_failing_cell_is_named_and_nothing_is_written_back(course, capsys):
    good = course("01_good", "print('fine')")
    course("02_bad", "print('fine')", "a = 1\nb = 0\n\nprint(a)\na / b\n'sixth'\n'seventh'")
    course("03_never", "open('reached', 'w')")
    before = good.read_text()

    assert course.command("--write") == 1

    error = capsys.readouterr().err
    assert "FAILED: 02_bad, cell 3 of 3 (code cell 2)" in error
    assert "    | a = 1\n    | b = 0\n" in error
    assert "ZeroDivisionError: division by zero" in error
    assert "seventh" not in error
    assert "\x1b" not in error
    assert good.read_text() == before
    assert not (course.folder / "reached").exists()
    as_far_as_it_came = nbformat.read(course.build / "02_bad.ipynb", as_version=4)
    assert as_far_as_it_came.cells[1].outputs[0].text == "fine\n"


@pytest.mark.parametrize(
    ("cell", "reason"),
    [("import time\ntime.sleep(60)", "still running after 2 seconds"), ("import os\nos._exit(3)", "the kernel died")],
)
def test_hanging_cell_and_dead_kernel_are_named(cell, reason, tmp_path):
    notebook = new_notebook(cells=[new_code_cell("1"), new_code_cell(cell)])
    with pytest.raises(run_tutorial.CellFailedError, match=f"(?s)01_x, cell 2 of 2.*{reason}"):
        run_tutorial.execute(notebook, "01_x", tmp_path, cell_seconds=2)


def test_missing_notebook_is_an_error(course, capsys):
    assert course.command() == 1
    assert "no notebook in" in capsys.readouterr().err
    course("01_first", "1")
    assert course.command("01_first", "09_nothing") == 1
    assert "no 09_nothing.ipynb in" in capsys.readouterr().err


NOISY = """\
import os, sys, tempfile, time, ipywidgets
from pathlib import Path
print(Path.cwd() / "rows.json", os.environ["GLM_OUTPUT"] + "/adapter", object())
print(tempfile.gettempdir() + "/ipykernel_%d/%d.py:3: UserWarning" % (os.getpid(), time.time_ns()))
print(f"took {time.time() % 10:.3f} s", flush=True)
display(ipywidgets.IntSlider(value=3))
from tqdm.notebook import tqdm
for _ in tqdm(range(3), disable=False): pass
os.path.abspath("..")"""


def test_a_widget_keeps_the_picture_that_it_has_for_pages(tmp_path):
    view, svg = {clean_notebook.WIDGET_VIEW: {"model_id": "7"}}, {"image/svg+xml": f"<svg>{tmp_path}</svg>"}
    output = nbformat.v4.new_output("display_data", {**view, **svg, "text/plain": "Explorer"})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[output])])
    clean_notebook.clean(notebook, tmp_path, tmp_path / "outputs")
    (kept,) = notebook.cells[0].outputs
    assert kept.data == {"text/plain": clean_notebook.WIDGET_LINE, "image/svg+xml": "<svg>.</svg>"}


def test_written_notebooks_hold_no_noise(course):
    path = course("01_noisy", NOISY, "%matplotlib inline\nimport matplotlib.pyplot as plt\n_ = plt.plot([1, 2, 3])")
    assert course.command("--write") == 0
    first = path.read_text()
    assert str(course.folder.parent) not in first
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert [cell.metadata for cell in notebook.cells] == [{}, {}, {}]
    outputs = notebook.cells[1].outputs
    assert outputs[0].text.startswith("./notebooks/rows.json outputs/adapter <object object at 0x...>\n<cell>:3: User")
    assert outputs[1].data == {"text/plain": clean_notebook.WIDGET_LINE}
    assert outputs[2].data["text/plain"] == "'.'"
    assert b"matplotlib" not in base64.b64decode(notebook.cells[2].outputs[0].data["image/png"])

    assert course.command("--write") == 0
    assert path.read_text() == first, "a second run must give the same file"
    assert course.command("--write", "--fresh") == 0
    assert re.sub(r"took [\d.]+ s", "", path.read_text()) == re.sub(r"took [\d.]+ s", "", first)
    assert path.read_text() != first


def cells_with(text):
    notebook = new_notebook(cells=[new_code_cell("print(report())")])
    notebook.cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
    clean_notebook.clean(notebook, run_tutorial.PROJECT, run_tutorial.PROJECT / "outputs")
    return notebook


@pytest.mark.parametrize(
    ("committed", "fresh", "kept"),
    [
        ("60 steps in 41.2 s, 880 tokens/s", "60 steps in 39.0 s, 912 tokens/s", True),
        ("[OK] RAM 22 GiB free", "[OK] RAM 7 GiB free", True),
        ("00:41 left", "01:02 left", True),
        (
            f"CPU    {'##':.<20}  allocated  2.10  reserved  2.10  free 20.00  of 23.54 GiB  highest  2.10",
            f"CPU    {'#':.<20}  allocated  1.50  reserved  1.50  free 21.00  of 15.61 GiB  highest  1.50",
            True,
        ),
        ("loss 0.41", "loss 0.42", False),
        ("60 steps in 41.2 s", "61 steps in 41.2 s", False),
        ("holds 13.1 GiB", "holds 13.2 GiB", False),
    ],
)
def test_only_durations_keep_the_committed_output(committed, fresh, kept):
    new = cells_with(fresh)
    clean_notebook.keep_committed(new, cells_with(committed))
    assert new.cells[0].outputs[0].text == (committed if kept else fresh)


def test_changed_cell_gets_its_fresh_output():
    old, new = cells_with("1 s"), cells_with("2 s")
    new.cells[0].source = "print(other())"
    clean_notebook.clean(new, run_tutorial.PROJECT, run_tutorial.PROJECT)
    clean_notebook.keep_committed(new, old)
    assert new.cells[0].outputs[0].text == "2 s"


def test_cell_ids_follow_the_text_and_stay_unique():
    def ids(*sources):
        notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
        clean_notebook.clean(notebook, run_tutorial.PROJECT, run_tutorial.PROJECT)
        nbformat.validate(notebook)
        return [cell.id for cell in notebook.cells]

    a, b, again = ids("a", "b", "a")
    assert len({a, b, again}) == 3
    assert ids("x", "a", "b", "a")[1:] == [a, b, again], "inserting a cell must not rename the others"


def test_strip_png_keeps_the_pixels():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    signature, header = b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    pixels, end = chunk(b"IDAT", zlib.compress(b"\0\x7f")), chunk(b"IEND", b"")
    noisy = signature + header + chunk(b"tEXt", b"Software\0someone 1.2") + pixels + chunk(b"tIME", b"1234567") + end
    assert clean_notebook.strip_png(noisy) == signature + header + pixels + end
    assert clean_notebook.strip_png(b"no picture") == b"no picture"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{project}/data/x", "./data/x"),
        ("saved to {project}.", "saved to .."),
        ("{project}-old/data", "{project}-old/data"),
        ("/mnt{project}/data", "/mnt{project}/data"),
        ("{project}/build/outputs/adapter", "outputs/adapter"),
        ("build/outputs/adapter", "outputs/adapter"),
        ("rebuild/outputs/adapter", "rebuild/outputs/adapter"),
        ("0x7f3a12345678 and 0xff", "0x... and 0xff"),
        ("project: ., commit 1a2b3c4 of 2026-11-26, with changes of your own", "project: ., commit ... of ..."),
    ],
)
def test_normalise_text(text, expected, tmp_path):
    text, expected = text.format(project=tmp_path), expected.format(project=tmp_path)
    shown = clean_notebook.normalise_text(text, tmp_path, tmp_path / "build" / "outputs")
    assert shown.replace("/tmp/tmp", "") == expected.replace("/tmp/tmp", "")
