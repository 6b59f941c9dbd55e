"""The committed editions, English and Chinese, say the same: texts, code, links, pictures with words, numbers.

Outputs are not compared: each run of the notebooks changes some, and `make notebooks` writes both editions.
"""

import os
import re

import chinese_edition as edition
import nbformat
import pytest

PAIRS = {path.stem: (path, edition.twin(path)) for path in edition.sources().values()}
NOTEBOOKS = [name for name, (path, _) in PAIRS.items() if path.suffix == ".ipynb"]
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def test_every_message_is_translated_and_looked_at():
    behind = edition.faults(with_outputs=False)
    assert not behind, "\n".join([*behind, edition.ADVICE])


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_code_cells_are_the_same_bytes(name):
    english, chinese = (
        [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        for path in PAIRS[name]
    )
    assert english == chinese


@pytest.mark.parametrize("name", PAIRS)
def test_text_is_chinese_but_for_names(name):
    """Each block of prose: what has no Chinese letter is the same in both languages, as a list of papers is."""
    known = edition.translations(edition.read_catalog(edition.catalog_path(name, edition.PROJECT)))
    for message, translation in known.items():
        assert CHINESE.search(translation) or translation == message, message[:80]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_pictures_of_the_text_have_words(name):
    for text, where in edition.texts(PAIRS[name][1]):
        shown = re.findall(r"!\[([^\]]*)\]\(", text) + [
            (re.search(r'alt="([^"]*)"', tag) or [tag, ""])[1] for tag in re.findall(r"<img\b[^>]*>", text)
        ]
        for alt in shown:
            assert CHINESE.search(alt) or alt.startswith("Open in "), (
                f"{name}, {where}: a picture without Chinese words: {alt!r}"
            )


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_chinese_picture_has_chinese_words(name):
    for output in edition.outputs(nbformat.read(PAIRS[name][1], as_version=4)):
        about = output.get("metadata", {}).get("image/png", {})
        if edition.SOURCE_OF in about:
            assert CHINESE.search(about["alt"])


@pytest.mark.parametrize("name", [*PAIRS, "GLOSSARY"])
def test_every_link_leads_to_a_file(name):
    english, there = PAIRS.get(name) or (path := edition.PROJECT / "GLOSSARY.md", edition.twin(path))
    for path in (english, there):
        for text, where in edition.texts(path):
            for link in edition.LINK.finditer(text):
                target = path.parent / link["to"]
                assert os.path.exists(target), f"{path.name}, {where}: {link['to']} leads to no file"
                if english != there and CHINESE.search(text) and target.suffix == ".ipynb" and path == there:
                    assert "zh" in target.parts, f"{path.name}, {where}: {link['to']} leads to the English edition"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_numbers_of_the_translation_alone_are_printed_by_the_notebook(name):
    """The Chinese text may say what an output says in English: the number must be there, whatever the run."""
    path, _ = PAIRS[name]
    printed = "\n".join(
        f"{output.get('text', '')} {output.get('metadata', '')} "
        + " ".join(str(text) for kind, text in output.get("data", {}).items() if kind != "image/png")
        for output in edition.outputs(nbformat.read(path, as_version=4))
    )
    known = edition.translations(edition.read_catalog(edition.catalog_path(name, edition.PROJECT)))
    for message, translation in known.items():
        plain = re.sub(r"[A-Za-z]\d+", "", translation)  # sha256, float16
        more = set(edition.numbers(plain)) - set(edition.numbers(message))
        for number in more:
            small = number.isdigit() and int(number) <= 20  # "two", "the twelfth"
            assert small or re.search(rf"(?<![\d.]){re.escape(number)}(?![\d])", printed), (
                f"locale/zh_CN/{name}.po: {number} is neither in the English nor in an output: {message[:60]}"
            )


def test_both_pages_name_the_other_edition_in_their_first_line():
    for name in ("README.md", "GLOSSARY.md"):
        english = edition.PROJECT / name
        chinese = edition.twin(english)
        for here, there in ((english, chinese), (chinese, english)):
            assert f"]({there.name})" in here.read_text(encoding="utf-8").splitlines()[0]
