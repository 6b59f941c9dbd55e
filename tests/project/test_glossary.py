"""The glossary has every word that a notebook links to, each once and in both languages."""

import re
from pathlib import Path

import nbformat

PROJECT = Path(__file__).resolve().parents[2]
TEXT = (PROJECT / "GLOSSARY.md").read_text(encoding="utf-8")
ANCHORS = re.findall(r'<a id="([\w-]+)"></a>', TEXT)


def test_every_link_of_the_notebooks_has_its_word():
    for path in sorted((PROJECT / "notebooks").rglob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        linked = {name for cell in cells for name in re.findall(r"GLOSSARY(?:\.zh-CN)?\.md#([\w-]+)", cell.source)}
        assert linked <= set(ANCHORS), f"{path.name} links to {sorted(linked - set(ANCHORS))}"


def test_each_word_is_there_once_in_both_languages():
    assert len(ANCHORS) == len(set(ANCHORS)) >= 40
    entries = re.findall(r"^\*\*(.+?) · (.+?)\*\* .*\n(.+)\n(.+)$", TEXT, re.MULTILINE)
    assert len(entries) == len(ANCHORS)
    for _, _, english, chinese in entries:
        assert not re.search(r"[\u4e00-\u9fff]", english)
        assert re.search(r"[\u4e00-\u9fff]", chinese)
