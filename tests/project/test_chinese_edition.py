"""The Chinese edition: texts cut and joined, catalogues kept, links moved, pictures paired; and both editions in step."""

import json
import re
from base64 import b64decode

import chinese_edition as edition
import nbformat
import pytest
from chinese_figures import fewer_colours, in_chinese, message_of, put, svg_in_chinese
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

PIECES = st.lists(
    st.sampled_from(
        ["# Title", "a text\nof two lines", "", "\n", "```\ncode", "```", "- one\n- two", "<details>", "| a |"]
    )
)


# One red pixel.
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="


@given(PIECES)
@settings(deadline=None)
def test_blocks_joined_are_the_text(pieces):
    text = "\n\n".join(pieces)
    assert "\n\n".join(edition.blocks(text)) == text


def test_code_with_blank_lines_is_one_block_and_no_message():
    text = "Before.\n\n```python\na = 1\n\nb = 2\n```\n\nAfter it."
    assert edition.blocks(text) == ["Before.", "```python\na = 1\n\nb = 2\n```", "After it."]
    assert [block for block in edition.blocks(text) if edition.is_message(block)] == ["Before.", "After it."]


@pytest.mark.parametrize("block", ["```\nwords\n```", "<details>", "`a_name`", "| 12 | 3.5 |", "![](picture.png)", ""])
def test_what_has_no_words_is_no_message(block):
    assert not edition.is_message(block)


GLOSSARY = """[中文版](GLOSSARY.zh-CN.md)

# Glossary

Words.

词。

<a id="one"></a>

**one · 一** ([01](notebooks/01_one.ipynb))<br>
The first.<br>
第一个。
"""


@pytest.fixture
def course(tmp_path):
    """A project with one notebook, an appendix and a README."""
    cells = [
        new_markdown_cell("# One\n\nSee [two](appendix/A_two.ipynb#part) and [words](../GLOSSARY.md#token)."),
        new_code_cell("print('kept')", outputs=[new_output("stream", text="kept\n")]),
        new_markdown_cell("Take 3 of `these`."),
    ]
    (tmp_path / "notebooks" / "appendix").mkdir(parents=True)
    nbformat.write(new_notebook(cells=cells), tmp_path / "notebooks" / "01_one.ipynb")
    nbformat.write(
        new_notebook(cells=[new_markdown_cell("# Two")]), tmp_path / "notebooks" / "appendix" / "A_two.ipynb"
    )
    (tmp_path / "README.md").write_text("# Course\n\nRead [one](notebooks/01_one.ipynb).\n", encoding="utf-8")
    (tmp_path / "GLOSSARY.md").write_text(GLOSSARY, encoding="utf-8")
    return tmp_path


def fill(course, name, known):
    """Write translations into a catalogue."""
    path = edition.catalog_path(name, course)
    edition.update(path, edition.messages(edition.sources(course)[name]))
    text = path.read_text(encoding="utf-8")
    for message, translation in known.items():
        quoted = json.dumps(message, ensure_ascii=False)
        assert f"msgid {quoted}\n" in text
        text = text.replace(
            f'msgid {quoted}\nmsgstr ""', f"msgid {quoted}\nmsgstr {json.dumps(translation, ensure_ascii=False)}"
        )
    path.write_text(text, encoding="utf-8")


CHINESE = {
    "01_one": {
        "# One": "# 一",
        "See [two](appendix/A_two.ipynb#part) and [words](../GLOSSARY.md#token).": "见[二](appendix/A_two.ipynb#part)和[词汇](../GLOSSARY.md#token)。",
        "Take 3 of `these`.": "取 3 个 `these`。",
    },
    "A_two": {"# Two": "# 二"},
    "README": {"# Course": "# 课程", "Read [one](notebooks/01_one.ipynb).\n": "读[一](notebooks/01_one.ipynb)。\n"},
}


@pytest.fixture
def translated(course):
    for name, known in CHINESE.items():
        fill(course, name, known)
    for path in [*edition.sources(course).values(), course / "GLOSSARY.md"]:
        edition.write(path, project=course)
    return course


def test_text_in_chinese_code_and_outputs_to_the_byte(translated):
    english = nbformat.read(translated / "notebooks" / "01_one.ipynb", as_version=4)
    chinese = nbformat.read(translated / "notebooks" / "zh" / "01_one.ipynb", as_version=4)
    assert (
        chinese.cells[0].source == "# 一\n\n见[二](appendix/A_two.ipynb#part)和[词汇](../../GLOSSARY.zh-CN.md#token)。"
    )
    assert chinese.cells[1] == english.cells[1]
    assert (translated / "README.zh-CN.md").read_text(
        encoding="utf-8"
    ) == "# 课程\n\n读[一](notebooks/zh/01_one.ipynb)。\n"
    assert edition.faults(translated) == []


def test_every_link_of_both_editions_leads_to_the_same_file(translated):
    here, there = translated / "notebooks" / "01_one.ipynb", translated / "notebooks" / "zh" / "01_one.ipynb"
    moved = edition.move_links(
        '[a](../data/x.json) <img src="assets/y.png"> [b](#here) [c](https://h/p)', here, there, translated
    )
    assert moved == '[a](../../data/x.json) <img src="../assets/y.png"> [b](#here) [c](https://h/p)'


def test_a_changed_sentence_keeps_its_translation_and_is_refused(translated):
    path = translated / "notebooks" / "01_one.ipynb"
    path.write_text(path.read_text(encoding="utf-8").replace("Take 3 of", "Please take 3 of"), encoding="utf-8")
    assert any("not in the PO file" in fault for fault in edition.faults(translated))
    edition.update(edition.catalog_path("01_one", translated), edition.messages(path))
    assert any("take out 'fuzzy': Please take 3" in fault for fault in edition.faults(translated))
    catalog = edition.catalog_path("01_one", translated).read_text(encoding="utf-8")
    assert "取 3 个 `these`。" in catalog
    assert '#| msgid "Take 3 of' in catalog
    edition.write(path, project=translated)
    twin = nbformat.read(edition.twin(path, translated), as_version=4)
    assert twin.cells[2].source == "Please take 3 of `these`."  # never an old translation of a new sentence


def test_an_update_without_changes_changes_nothing(translated):
    path = edition.catalog_path("01_one", translated)
    before = path.read_bytes()
    edition.update(path, edition.messages(translated / "notebooks" / "01_one.ipynb"))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("message", "translation", "fault"),
    [
        ("Take `x`.", "取 `y`。", "code"),
        ("[a](b.md) it", "[甲](c.md)", "link"),
        ("It takes 12.5 GB.", "要 12 GB。", "numbers are missing: ['12.5']"),
        ("<details>yes</details>", "<details>是", "tag"),
    ],
)
def test_what_a_translation_lost_is_named(message, translation, fault):
    assert any(fault in found for found in edition.message_faults(message, translation))
    assert list(edition.message_faults(message, message)) == []


def test_pictures_of_one_run_find_each_other(translated):
    path = translated / "notebooks" / "01_one.ipynb"
    english = nbformat.read(path, as_version=4)
    metadata = {"image/png": {"alt": "One bar."}, edition.PICTURE: {"alt": "一根柱子。"}}
    data = {"image/png": "RU5HTElTSA==", edition.PICTURE: PNG}
    english.cells[1].outputs = [new_output("display_data", data, metadata=metadata)]
    pictures = edition.take_pictures(english)
    assert english.cells[1].outputs[0].data == {"image/png": "RU5HTElTSA=="}
    nbformat.write(english, path)
    edition.keep({path: pictures}, translated / "none", translated)
    shown = nbformat.read(edition.twin(path, translated), as_version=4).cells[1].outputs[0]
    assert b64decode(shown.data["image/png"]) == fewer_colours(b64decode(PNG))
    assert shown.metadata["image/png"]["alt"] == "一根柱子。"
    edition.write(path, project=translated)  # without a run: the picture stays while the English one is the same
    assert nbformat.read(edition.twin(path, translated), as_version=4).cells[1].outputs[0] == shown
    english.cells[1].outputs[0].data["image/png"] = "T1RIRVI="
    nbformat.write(english, path)
    edition.write(path, project=translated)
    assert any("1 English pictures" in fault for fault in edition.faults(translated))


def test_new_outputs_alone_do_not_fail_the_tests(translated):
    path = translated / "notebooks" / "01_one.ipynb"
    path.write_text(path.read_text(encoding="utf-8").replace("kept\\n", "kept today\\n"), encoding="utf-8")
    assert edition.faults(translated, with_outputs=False) == []
    assert edition.faults(translated) == ["notebooks/zh/01_one.ipynb: not what its PO file gives"]


def test_a_fault_names_the_file_and_the_message(translated):
    path = translated / "notebooks" / "01_one.ipynb"
    path.write_text(path.read_text(encoding="utf-8").replace("print('kept')", "print('new')"), encoding="utf-8")
    assert edition.faults(translated, with_outputs=False) == ["notebooks/zh/01_one.ipynb: not what its PO file gives"]
    (translated / "README.md").write_text("# A course\n\nRead [one](notebooks/01_one.ipynb).\n", encoding="utf-8")
    assert "locale/zh_CN/README.po: not in the PO file: # A course" in edition.faults(translated, with_outputs=False)


def test_a_chinese_notebook_without_an_english_one_is_named(translated):
    path = translated / "notebooks" / "zh" / "07_old.ipynb"
    path.write_text("{}", encoding="utf-8")
    assert edition.faults(translated) == ["notebooks/zh/07_old.ipynb: the English one is gone, remove it"]


def test_the_glossary_in_chinese_is_its_own_half(translated):
    text = (translated / "GLOSSARY.zh-CN.md").read_text(encoding="utf-8")
    assert text.startswith("[English, 中英对照](GLOSSARY.md) · [README](README.zh-CN.md)\n\n# 术语表\n\n词。\n")
    assert text.endswith('<a id="one"></a>\n\n**一** · one ([01](notebooks/zh/01_one.ipynb))<br>\n第一个。\n')


def test_words_of_figures_go_with_the_last_notebook_that_shows_them(translated):
    edition.meet({"01_one": ["peak", "limit {1}", "peak"], "A_two": ["peak"]}, translated)
    edition.meet({"01_one": ["limit {1}"]}, translated)
    catalog = edition.read_catalog(edition.catalog_path("figures", translated))
    assert {one.id: one.auto_comments for one in catalog if one.id} == {"limit {1}": ["01_one"], "peak": ["A_two"]}
    edition.meet({"A_two": []}, translated)
    catalog = edition.read_catalog(edition.catalog_path("figures", translated))
    assert [one.id for one in catalog if one.id] == ["limit {1}"]


@given(st.text(st.sampled_from("ab 12.,{}")))
def test_a_message_with_its_numbers_is_the_text(text):
    message, found = message_of(text)
    if message and not re.search(r"\{\d+\}", text):
        assert put(message, found) == text


def test_words_of_figures_are_looked_up_without_their_numbers():
    known = {"GPU {1}: {2} GiB": "第 {1} 块 GPU：{2} GiB", "peak": "峰值"}
    assert in_chinese("GPU 0: 6.32 GiB", known) == "第 0 块 GPU：6.32 GiB"
    assert in_chinese("GPU 0: 6.32", known) == "GPU 0: 6.32"
    assert message_of("你好 world") == message_of("12.5 s") == ("", [])
    assert svg_in_chinese("<svg><title>peak</title><text x='1'>GPU 1: 2 GiB</text></svg>", known) == (
        "<svg><title>峰值</title><text x='1'>第 1 块 GPU：2 GiB</text></svg>"
    )
