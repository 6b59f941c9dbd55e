"""The first cell of every notebook, run as a program of its own from many working folders."""

import re
import shutil
import subprocess

import first_cell
import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tests.helpers.first_cell_case import PROJECT, cell, preflight_of, put_project, run_cell, stopped

GIT = ["git", "-c", "user.name=n", "-c", "user.email=e@x"]


@pytest.fixture
def project(tmp_path):
    """A folder that looks like the project; its `preflight` only tells which copy was imported."""
    return put_project(tmp_path / "cloud" / "my-fork")


@pytest.mark.parametrize("below", [".", "notebooks", "notebooks/deeper/still"])
def test_finds_the_project_from_the_working_folder_upwards(project, below):
    folder = project / below
    folder.mkdir(parents=True, exist_ok=True)
    done = run_cell(folder)
    assert preflight_of(done) == project
    assert done.stdout.startswith(f"project: {project}, a copy without git's history\n")


@pytest.mark.parametrize(
    "place",
    [
        "kaggle/working/fork",
        "kaggle/input/fork",
        "kaggle/input/datasets/owner/fork",
        "kaggle/input/notebooks/owner/download/course",
        "kaggle/input/models/o/m/f/v/1/a/b",
    ],
)
def test_finds_the_project_where_kaggle_puts_it(place, tmp_path):
    there = put_project(tmp_path / "root" / place)
    (tmp_path / "elsewhere").mkdir()
    assert preflight_of(run_cell(tmp_path / "elsewhere", root=tmp_path / "root")) == there


def test_the_nearest_copy_wins_and_a_huge_data_set_hides_none(tmp_path):
    for number in range(6000):  # more than the cell looks into
        (tmp_path / "root/kaggle/input/a" / f"{number:04}").mkdir(parents=True)
    put_project(tmp_path / "root/kaggle/input/datasets/o/old")
    near = put_project(tmp_path / "root/kaggle/input/z/course")
    assert preflight_of(run_cell(tmp_path, root=tmp_path / "root")) == near


def test_a_clone_beside_the_working_folder_is_found(project):
    assert preflight_of(run_cell(project.parent, root=project.parent / "no")) == project


def test_the_working_folder_wins_over_other_copies(project, tmp_path):
    put_project(tmp_path / "root" / "kaggle" / "input" / "older")
    assert preflight_of(run_cell(project / "notebooks", root=tmp_path / "root")) == project


# ---- the clone ----


@pytest.fixture
def bare(project, tmp_path):
    """The project as a bare repository, as a fork's address would give it: two commits."""
    repository = tmp_path / "fork with blanks; echo.git"
    subprocess.run([*GIT, "init", "-q"], cwd=project, check=True)
    for message in ("one", "two"):
        commit(project, message)
    subprocess.run([*GIT, "clone", "-q", "--bare", project, repository], check=True)
    shutil.rmtree(project)
    return repository


def commit(folder, message):
    subprocess.run([*GIT, "add", "."], cwd=folder, check=True)
    subprocess.run([*GIT, "commit", "-q", "--allow-empty", "-m", message], cwd=folder, check=True)


def head(folder):
    command = ["git", "log", "-1", "--format=commit %h of %cs"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def working(tmp_path):
    (tmp_path / "kaggle" / "working").mkdir(parents=True)
    return tmp_path / "kaggle" / "working"


def test_a_fork_is_cloned_once_and_its_commit_is_said(bare, working, tmp_path):
    put_project(tmp_path / "kaggle/input/older")  # an attached copy must not win over FORK
    first = run_cell(working, root=tmp_path, fork=bare.as_uri())
    assert preflight_of(first) == working / "course"
    assert f"project: {working / 'course'}, {head(bare)}\n" in first.stdout
    count = subprocess.run(["git", "rev-list", "--count", "HEAD"], cwd=working / "course", capture_output=True)
    assert count.stdout == b"1\n"  # only the newest commit
    assert [path.name for path in working.iterdir()] == ["course"]
    for folder in (working, working / "course"):  # in the next notebook the clone is found, also without FORK
        assert preflight_of(run_cell(folder, root=tmp_path)) == working / "course"


def test_a_clone_is_brought_up_to_date_or_what_it_is_is_said(bare, working, tmp_path):
    run_cell(working, root=tmp_path, fork=bare.as_uri())
    subprocess.run([*GIT, "clone", "-q", bare, tmp_path / "work"], check=True)
    (tmp_path / "work" / "news").touch()
    commit(tmp_path / "work", "three")
    subprocess.run(["git", "push", "-q"], cwd=tmp_path / "work", check=True)
    second = run_cell(working, root=tmp_path, fork=bare.as_uri())
    assert (working / "course" / "news").is_file()
    assert f", {head(bare)}\n" in second.stdout
    (working / "course" / "pyproject.toml").open("a").write("\n")
    bare.rename(tmp_path / "gone.git")  # no network, say
    third = run_cell(working, root=tmp_path, fork=bare.as_uri())
    assert preflight_of(third) == working / "course"
    assert re.search(r"commit \w+ of [\d-]+, with changes of your own \(not updated: ", third.stdout)


def test_a_clone_of_another_address_is_not_taken_for_the_fork(bare, working, tmp_path):
    run_cell(working, root=tmp_path, fork=bare.as_uri())
    done = run_cell(working, root=tmp_path, fork="https://example.org/other.git")
    assert "is a clone of another address than FORK: rename that folder" in stopped(done)
    same = run_cell(working, root=tmp_path, fork=bare.as_uri().removesuffix(".git") + "/")
    assert preflight_of(same) == working / "course"


def test_a_clone_that_was_cut_off_is_made_anew(bare, working, tmp_path):
    (working / "course.123" / ".git").mkdir(parents=True)
    assert preflight_of(run_cell(working, root=tmp_path, fork=bare.as_uri())) == working / "course"


def test_nothing_of_the_users_is_replaced_by_a_clone(bare, working, tmp_path):
    (working / "course").mkdir()
    (working / "course" / "notes").touch()
    said = stopped(run_cell(working, root=tmp_path, fork=bare.as_uri()))
    assert said.startswith("rename course, then run again (mv: cannot move")
    assert [path.name for path in (working / "course").iterdir()] == ["notes"]


def test_a_fork_is_not_cloned_where_the_project_is(project):
    assert preflight_of(run_cell(project / "notebooks", fork="https://example.org/fork")) == project


@pytest.mark.parametrize(
    ("fork", "said", "why"),
    [
        ("", "check FORK, Settings > Internet > On, then run again", "repository '' does not exist"),
        (
            "no-such.git",
            "check FORK, Settings > Internet > On, then run again",
            "repository 'no-such.git' does not exist",
        ),
        (
            "file:///no/such.git",
            "check FORK, Settings > Internet > On, then run again",
            "does not appear to be a git repository",
        ),
        ("https://host.invalid/x.git", "check FORK, Settings > Internet > On, then run again", "Could not resolve"),
        ("http://127.0.0.1:9/x.git", "check FORK, Settings > Internet > On, then run again", "Failed to connect"),
    ],
)
def test_without_the_project_one_sentence_says_how_to_get_it(working, tmp_path, fork, said, why):
    sentence = stopped(run_cell(working, root=tmp_path, fork=fork))
    assert sentence.startswith(said)
    assert why in sentence
    assert list(working.iterdir()) == []


def test_without_git_one_sentence_says_so(working, tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("sh", "head", "mv"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    done = run_cell(working, root=tmp_path, fork="https://example.org/x.git", path=str(tmp_path / "bin"))
    assert stopped(done).startswith("install git, then run again")


def test_jupyter_shows_one_line_and_no_later_cell_runs(working, tmp_path):
    notebook = new_notebook(cells=[new_code_cell(cell(tmp_path, "no-such.git")), new_code_cell("print('on')")])
    with pytest.raises(CellExecutionError):
        NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(working)}}).execute()
    (output,) = notebook.cells[0].outputs
    assert output.traceback == [
        "Stop: check FORK, Settings > Internet > On, then run again (fatal: repository 'no-such.git' does not exist)"
    ]
    assert notebook.cells[1].outputs == []


def test_the_real_project_says_what_is_here():
    done = run_cell(PROJECT / "notebooks", before="import os; os.environ['CUDA_VISIBLE_DEVICES'] = ''")
    assert done.returncode == 0, done.stderr
    assert "[OK]" in done.stdout


def test_is_short_enough_to_be_read():
    lines = first_cell.source_for("solutions").splitlines()
    assert len(lines) <= 10
    assert max(map(len, lines)) <= 120


def test_check_names_and_write_sets_the_cell(tmp_path, capsys):
    right, wrong = new_code_cell(first_cell.source_for("a")), new_code_cell("import torch")
    nbformat.write(new_notebook(cells=[new_markdown_cell("# A"), right]), tmp_path / "a.ipynb")
    nbformat.write(new_notebook(cells=[new_markdown_cell("# B"), wrong, new_code_cell("1")]), tmp_path / "b.ipynb")
    arguments = ["--notebooks", str(tmp_path)]

    assert first_cell.main(["--check", *arguments]) == 1
    printed = capsys.readouterr().out
    assert "b.ipynb" in printed
    assert "a.ipynb" not in printed
    untouched = (tmp_path / "a.ipynb").read_bytes()
    assert first_cell.main(["--write", *arguments]) == 0
    assert first_cell.main(["--check", *arguments]) == 0
    assert [cell.source for cell in nbformat.read(tmp_path / "b.ipynb", 4).cells] == [
        "# B",
        first_cell.source_for("b"),
        "1",
    ]
    assert (tmp_path / "a.ipynb").read_bytes() == untouched


def test_a_notebook_without_code_cannot_be_set(tmp_path, capsys):
    nbformat.write(new_notebook(cells=[new_markdown_cell("# A")]), tmp_path / "a.ipynb")
    assert first_cell.main(["--write", "--notebooks", str(tmp_path)]) == 1
    assert "a.ipynb" in capsys.readouterr().out


def test_is_the_right_one_in_every_notebook():
    assert first_cell.main(["--check"]) == 0
