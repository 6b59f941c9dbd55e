"""Badges and the machine asked for: in step with the address, written once, kept by the cleaner, right in both editions."""

import copy
import re

import badges
import chinese_edition
import clean_notebook
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

NOTEBOOKS = sorted((badges.PROJECT / "notebooks").glob("**/*.ipynb"))
LINKS = re.compile(r'<a href="([^"]*)"><img src="https://[^"]*\.svg" alt="Open in (\w+)"></a>')


def test_committed_notebooks_are_in_step(capsys):
    assert badges.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_badges_of_every_notebook_open_that_notebook(path):
    notebook = nbformat.read(path, as_version=4)
    owner_and_name = re.search(
        r"repository-code: https://github\.com/(\S+)", (badges.PROJECT / "CITATION.cff").read_text()
    )
    place = f"{owner_and_name[1]}/blob/main/{path.relative_to(badges.PROJECT).as_posix()}"
    assert {cloud: link for link, cloud in LINKS.findall(notebook.cells[0].source)} == {
        "Colab": f"https://colab.research.google.com/github/{place}",
        "Kaggle": f"https://kaggle.com/kernels/welcome?src=https://github.com/{place}",
    }
    everywhere = sum(len(LINKS.findall(cell.source)) for cell in notebook.cells)
    assert everywhere == 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_who_chooses_devices_asks_for_a_gpu_and_who_does_not_asks_for_none(path):
    notebook = nbformat.read(path, as_version=4)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    needs = re.search(r"runtime\.choose\((?:WEIGHTS|source)", code) is not None
    assert (notebook.metadata.get("accelerator") == "GPU") is needs
    assert notebook.metadata.kaggle.isGpuEnabled is needs
    assert (notebook.metadata.kaggle.accelerator == "nvidiaTeslaT4") is needs


@pytest.fixture
def course(tmp_path):
    """A project with a notebook that has a title and nothing else, and one that was opened in a cloud."""
    (tmp_path / "CITATION.cff").write_text('title: x\nrepository-code: "https://github.com/some.one/a-fork.git"\n')
    folder = tmp_path / "notebooks" / "appendix"
    folder.mkdir(parents=True)
    nbformat.write(new_notebook(cells=[new_markdown_cell("# One")]), tmp_path / "notebooks" / "01_one.ipynb")
    cells = [new_markdown_cell("# Two\nSecond line.\n\nA paragraph."), new_code_cell("1")]
    nbformat.write(new_notebook(cells=cells, metadata={"accelerator": "TPU"}), folder / "A_two.ipynb")
    return tmp_path


def test_written_once_and_again_for_another_address(course, capsys):
    assert badges.main(["--check"], course) == 1
    assert "01_one.ipynb: badges or metadata differ" in capsys.readouterr().out
    assert badges.main(["--write"], course) == 0
    assert badges.main(["--check"], course) == 0
    two = nbformat.read(course / "notebooks" / "appendix" / "A_two.ipynb", as_version=4)
    title, links, *rest = two.cells[0].source.split("\n\n")
    assert title == "# Two"
    assert links.count("some.one/a-fork/blob/main/notebooks/appendix/A_two.ipynb") == 2
    assert rest == ["Second line.", "A paragraph."]
    assert "accelerator" not in two.metadata
    before = {path: path.read_bytes() for path in course.glob("notebooks/**/*.ipynb")}
    badges.main(["--write"], course)
    assert before == {path: path.read_bytes() for path in course.glob("notebooks/**/*.ipynb")}
    (course / "CITATION.cff").write_text("repository-code: https://github.com/you/other\n")
    badges.main(["--write"], course)
    text = (course / "notebooks" / "01_one.ipynb").read_text()
    assert text.count("you/other/blob") == 2
    assert "some.one" not in text


@pytest.mark.parametrize(
    "line", ["", "repository-code: https://example.org/a/b", "repository-code: https://github.com/a"]
)
def test_an_address_that_no_cloud_opens_is_refused(line, course):
    (course / "CITATION.cff").write_text(f"title: x\n{line}\n")
    with pytest.raises(ValueError, match=r"CITATION\.cff: no line 'repository-code: https://github\.com/OWNER/NAME'"):
        badges.main(["--write"], course)


@pytest.mark.parametrize("first", [new_code_cell("# no title"), new_markdown_cell("no title")])
def test_a_notebook_without_title_is_named(first, course):
    nbformat.write(new_notebook(cells=[first]), course / "notebooks" / "02_x.ipynb")
    with pytest.raises(ValueError, match=r"notebooks/02_x\.ipynb: the first cell must be"):
        badges.main(["--write"], course)


def test_the_cleaner_keeps_what_is_asked_for_and_nothing_that_a_cloud_adds(course):
    badges.main(["--write"], course)
    notebook = nbformat.read(course / "notebooks" / "01_one.ipynb", as_version=4)
    asked = copy.deepcopy(notebook.metadata)
    notebook.metadata |= {"papermill": {}, "kaggle": {**asked["kaggle"], "dataSources": [1], "language": "python"}}
    notebook.metadata["colab"] |= {"provenance": [], "name": "mine.ipynb"}
    clean_notebook.clean(notebook, course, course / "outputs")
    assert {key: notebook.metadata[key] for key in asked} == asked
    assert notebook.metadata.keys() == asked.keys() | {"kernelspec", "language_info"}


def test_the_chinese_notebook_opens_itself_and_has_nothing_new_to_translate(course):
    path = course / "notebooks" / "01_one.ipynb"
    before = chinese_edition.messages(path)
    badges.main(["--write"], course)
    assert chinese_edition.messages(path) == before
    chinese_edition.write(path, project=course)
    chinese = nbformat.read(chinese_edition.twin(path, course), as_version=4)
    assert [link.rsplit("/blob/main/")[1] for link, _ in LINKS.findall(chinese.cells[0].source)] == [
        "notebooks/zh/01_one.ipynb"
    ] * 2
    assert chinese.metadata == nbformat.read(path, as_version=4).metadata
