"""The page of the full size: made from executed notebooks, and in step with the links to it."""

import base64
import io
import json

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from scripts import full_size_docs as docs


def png(width: int) -> str:
    out = io.BytesIO()
    Image.new("RGB", (width, 30), "red").save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def run_of(text: str, width: int = 0, lines: int = 1):
    """An executed notebook with one tagged cell."""
    outputs = [new_output("stream", text="".join(f"{text} {number}\n" for number in range(lines)))]
    if width:
        data = {"image/png": png(width), "text/plain": "<Figure>"}
        outputs.append(new_output("display_data", data, metadata={"image/png": {"alt": "two bars"}}))
    cell = new_code_cell("x", outputs=outputs, metadata={"tags": ["full-size-loading"]})
    return new_notebook(cells=[new_code_cell("y", outputs=[new_output("stream", text="not this")]), cell])


@pytest.fixture
def rehearsal(tmp_path):
    for road, notebook in (("2_gpus", run_of("shard", 2000, 90)), ("1_gpus", run_of("other"))):
        (tmp_path / road).mkdir()
        nbformat.write(notebook, tmp_path / road / "01_weights.ipynb")
    (tmp_path / "machine.json").write_text(json.dumps({"text": "2 x H100"}))
    (tmp_path / "table.md").write_text("| GPUs |\n")
    return tmp_path


def test_text_and_pictures_of_each_road(rehearsal):
    page = rehearsal / "docs" / "README.md"
    docs.write_page(rehearsal, page)
    text = page.read_text()
    assert text.index("2 x H100") < text.index("| GPUs |") < text.index("### loading") < text.index("**1 GPU**")
    assert "not this" not in text
    assert "shard 0\n" in text
    assert "shard 89\n" in text
    assert "... 50 lines left out ..." in text
    assert "![two bars](01_loading_2_gpus.png)" in text
    assert Image.open(page.parent / "01_loading_2_gpus.png").width == docs.WIDEST


def test_a_cell_that_failed_is_refused(rehearsal):
    path = rehearsal / "1_gpus" / "01_weights.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells[1].outputs = [new_output("error", ename="E", evalue="", traceback=[])]
    nbformat.write(notebook, path)
    with pytest.raises(ValueError, match="full-size-loading failed"):
        docs.write_page(rehearsal, rehearsal / "README.md")


def test_what_ran_on_the_cpu_is_left_out(rehearsal):
    for road, peak in (("1_gpus", 0), ("2_gpus", 7)):
        row = {"gpus": int(road[0]), "notebook": "01_weights", "ok": True, "peak_bytes": [peak]}
        (rehearsal / f"{road}.json").write_text(json.dumps([row]))
    docs.write_page(rehearsal, rehearsal / "README.md")
    text = (rehearsal / "README.md").read_text()
    assert "**2 GPUs**" in text
    assert "**1 GPU**" not in text
    assert "was not kept" not in text


def test_what_the_table_calls_failed_is_left_out(rehearsal):
    notebook = new_notebook(cells=[new_code_cell("x", metadata={"tags": ["full-size-loading"]})])
    for road, stem in (("1_gpus", "01_weights"), ("2_gpus", "02_rows")):
        nbformat.write(notebook, rehearsal / road / f"{stem}.ipynb")
        row = {"gpus": int(road[0]), "notebook": stem, "ok": False}
        (rehearsal / f"{road}.json").write_text(json.dumps([row]))
    docs.write_page(rehearsal, rehearsal / "README.md")
    text = (rehearsal / "README.md").read_text()
    assert "What 02_rows showed was not kept" in text
    assert "**2 GPUs**" in text
    assert "**1 GPU**" not in text


def test_tags_and_links_without_a_section_are_named(tmp_path):
    notebook = run_of("x")
    notebook.cells.append(new_markdown_cell("[there](../docs/full_size/README.md#chat)"))
    nbformat.write(notebook, tmp_path / "a.ipynb")
    page = tmp_path / "README.md"
    page.write_text("### loading\n")
    assert docs.faults(tmp_path, page) == ["a.ipynb links to #chat, which README.md does not have"]
    page.unlink()
    assert len(docs.faults(tmp_path, page)) == 2


def test_the_committed_page_has_what_the_notebooks_point_at():
    assert docs.faults(docs.PROJECT / "notebooks", docs.PAGE) == []
