"""Figures in two languages from one run: an IPython extension, and the words that it meets.

    a cell shows a figure --> image/png        as ever
                          --> image/x-zh+png   the same figure, its words looked up in locale/zh_CN/figures.po
                          --> GLM_FIGURE_WORDS a file with every text of it, one JSON string a line

A message is a text with its numbers taken out: "GPU 0: 6.32 GiB" is the message "GPU {1}: {2} GiB", and its translation
may use {1} and {2} in another order. What has no word of two letters, and what is Chinese already, is no message.

Without an installed font that has Chinese glyphs there is no second picture, and nothing is drawn as boxes.
"""

import io
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from babel.messages.pofile import read_po

EXTENSION = "chinese_figures"
PICTURE = "image/x-zh+png"
FILE_VARIABLE = "GLM_FIGURE_WORDS"
CATALOG = Path(__file__).resolve().parents[1] / "locale" / "zh_CN" / "figures.po"
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
PLACE = re.compile(r"\{(\d+)\}")
SVG_TEXT = re.compile(r"(?<=>)[^<>]+(?=</(?:text|title|desc|tspan)>)")
FONT_OF_NUMBERS = "DejaVu Sans"


def message_of(text: str) -> tuple[str, list[str]]:
    """The text with {1}, {2} ... for its numbers, and the numbers; ("", []) if there is no word to translate."""
    if not re.search(r"[A-Za-z]{2,}", text) or re.search(r"[\u4e00-\u9fff]", text):
        return "", []
    found: list[str] = []

    def take(number: re.Match[str]) -> str:
        found.append(number[0])
        return f"{{{len(found)}}}"

    return NUMBER.sub(take, text), found


def put(translation: str, found: list[str]) -> str:
    """The translation with the numbers in their places."""
    return PLACE.sub(lambda place: found[int(place[1]) - 1], translation)


def words(path: Path = CATALOG) -> dict[str, str]:
    """Message -> translation."""
    if not path.is_file():
        return {}
    catalog = read_po(io.BytesIO(path.read_bytes()), locale="zh_CN")
    return {str(one.id): str(one.string) for one in catalog if one.id and one.string and not one.fuzzy}


def in_chinese(text: str, known: dict[str, str]) -> str:
    """The text translated, or itself."""
    message, found = message_of(text)
    return put(known[message], found) if message in known else text


def svg_in_chinese(svg: str, known: dict[str, str]) -> str:
    """An SVG picture with its texts translated."""
    return SVG_TEXT.sub(lambda text: in_chinese(text[0], known), svg)


def note(text: str) -> None:
    """Keep the message of a text in the file of messages."""
    message, _ = message_of(text)
    if message and (path := os.environ.get(FILE_VARIABLE)):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(message, ensure_ascii=False) + "\n")


def written_in(figure: Any) -> Iterator[Any]:
    """Every text of a figure that is not made by a tick's formatter."""
    from matplotlib.text import Text

    ticks = {id(label) for axes in figure.axes for label in (*axes.get_xticklabels(), *axes.get_yticklabels())}
    yield from (text for text in figure.findobj(Text) if id(text) not in ticks and text.get_text())


def tick_lists(figure: Any) -> Iterator[list[str]]:
    """The lists of labels of all axes whose ticks have names."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            names = getattr(axis.get_major_formatter(), "seq", None)
            if isinstance(names, list):
                yield names


def chinese_picture(figure: Any, printer: Any, font: str, known: dict[str, str]) -> Any:
    """What `printer` makes of the figure with Chinese words; the figure itself is left as it was.

    Args:
        figure: a matplotlib figure, described or not.
        printer: figure -> PNG, or PNG and its metadata.
        font: family with Chinese glyphs.
        known: message -> translation.
    """
    from matplotlib.text import Text

    before = [(text, text.get_text(), text.get_fontfamily()) for text in figure.findobj(Text)]
    names = [(labels, list(labels)) for labels in tick_lists(figure)]
    described = getattr(figure, "alternative_text", None)
    try:
        for text in written_in(figure):
            note(text.get_text())
            text.set_text(in_chinese(text.get_text(), known))
        for labels, _ in names:
            for place, label in enumerate(labels):
                note(label)
                labels[place] = in_chinese(label, known)
        for text in figure.findobj(Text):
            text.set_fontfamily([FONT_OF_NUMBERS, font])
        if described:
            note(described)
            figure.alternative_text = in_chinese(described, known)
        return printer(figure)
    finally:
        for text, said, family in before:
            text.set_text(said)
            text.set_fontfamily(family)
        for labels, said in names:
            labels[:] = said
        if described:
            figure.alternative_text = described


def load_ipython_extension(shell: Any) -> None:
    """Give every figure that the shell shows its Chinese twin, where a font is there."""
    from IPython.core.formatters import BaseFormatter
    from traitlets import ObjectName, Unicode

    from glmhelpers.plots import cjk_font

    font, known, formatters = cjk_font(), words(), shell.display_formatter.formatters
    if font is None:
        return

    class ChinesePicture(BaseFormatter):
        format_type = Unicode(PICTURE)
        print_method = ObjectName("_repr_zh_png_")

        # Not a printer for the type: the inline backend takes those of every formatter away when it wakes.
        def __call__(self, shown: Any) -> Any:
            if "matplotlib.figure" not in sys.modules or not isinstance(shown, sys.modules["matplotlib.figure"].Figure):
                return None
            return chinese_picture(shown, formatters["image/png"].lookup_by_type(type(shown)), font, known)

    formatters[PICTURE] = ChinesePicture(parent=shell.display_formatter)
