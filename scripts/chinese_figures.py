"""Figures in two languages from one run: an IPython extension, and the words that it meets.

    a cell shows a figure --> image/png        as ever
                          --> image/x-zh+png   the same figure, its words looked up in locale/zh_CN/figures.po
                          --> GLM_FIGURE_WORDS a file with every text of it, one JSON string a line

A message is a text with its numbers (and lists of three or more) taken out: "GPU 0: 6.32 GiB" is the message "GPU {1}:
{2} GiB", and its translation may use {1} and {2} in another order. What has no word of two letters, what is Chinese
already, and names (tokens, files, formulas) are no messages.

Without an installed font that has Chinese glyphs the words are noted all the same, but there is no second picture, and
nothing is drawn as boxes.
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
NUMBERS = re.compile(r"\d+(?:[.,]\d+)*(?:(?:, \d+(?:[.,]\d+)*){2,})?")  # 1,024 is one; "3, 1,024, 7" is one list
PLACE = re.compile(r"\{(\d+)\}")
SVG_TEXT = re.compile(r"(?<=>)[^<>]+(?=</(?:text|title|desc|tspan)>)")
NAME = re.compile(r"[▁_]\S*|<\w+>|\[[\w\n]+\]( <\w+>)?|\$.*\$|[\w.]+\.\w+")
FONT_OF_NUMBERS = "DejaVu Sans"


def message_of(text: str) -> tuple[str, list[str]]:
    """The text with {1}, {2} ... for its numbers, and the numbers; ("", []) if there is no word to translate."""
    if not re.search(r"[A-Za-z]{2,}", text) or re.search(r"[\u4e00-\u9fff]", text) or NAME.fullmatch(text):
        return "", []
    found: list[str] = []

    def take(number: re.Match[str]) -> str:
        found.append(number[0])
        return f"{{{len(found)}}}"

    return NUMBERS.sub(take, text), found


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


def every_text(figure: Any) -> Iterator[str]:
    """All that is to be translated of a figure: its texts, names of ticks among them, and its alternative text."""
    from matplotlib.text import Text

    yield from (text.get_text() for text in figure.findobj(Text))
    yield getattr(figure, "alternative_text", None) or ""


def named_ticks(figure: Any) -> Iterator[Any]:
    """The axes whose ticks have names: their formatter makes texts anew at every drawing."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if any(message_of(label.get_text())[0] for label in axis.get_ticklabels()):
                yield axis


def chinese_picture(figure: Any, printer: Any, font: str, known: dict[str, str]) -> Any:
    """What `printer` makes of the figure with Chinese words; the figure itself is left as it was.

    Args:
        figure: a matplotlib figure, described or not.
        printer: figure -> PNG, or PNG and its metadata.
        font: family with Chinese glyphs.
        known: message -> translation.
    """
    from matplotlib.text import Text
    from matplotlib.ticker import Formatter, FuncFormatter

    def chinese_names(names: Formatter) -> Formatter:
        return FuncFormatter(lambda value, place: in_chinese(names(value, place), known))

    before = [(text, text.get_text(), text.get_fontfamily()) for text in figure.findobj(Text)]
    ticks = [(axis, axis.get_major_formatter()) for axis in named_ticks(figure)]
    described = getattr(figure, "alternative_text", None)
    try:
        for axis, formatter in ticks:
            axis.set_major_formatter(chinese_names(formatter))
        for text, said, _ in before:
            text.set_text(in_chinese(said, known))
            text.set_fontfamily([FONT_OF_NUMBERS, font])
        if described:
            figure.alternative_text = in_chinese(described, known)
        return printer(figure)
    finally:
        for axis, formatter in ticks:
            axis.set_major_formatter(formatter)
        for text, said, family in before:
            text.set_text(said)
            text.set_fontfamily(family)
        if described:
            figure.alternative_text = described


def fewer_colours(png: bytes) -> bytes:
    """A PNG with at most 256 colours, and no notes in it: a third of the bytes, and nobody sees the difference."""
    from PIL import Image

    small = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def load_ipython_extension(shell: Any) -> None:
    """Give every figure that the shell shows its Chinese twin, where a font is there."""
    from IPython.core.formatters import BaseFormatter
    from traitlets import ObjectName, Unicode

    from glmhelpers.plots import cjk_font

    font, known, formatters = cjk_font(), words(), shell.display_formatter.formatters

    class ChinesePicture(BaseFormatter):
        format_type = Unicode(PICTURE)
        print_method = ObjectName("_repr_zh_png_")

        # Not a printer for the type: the inline backend takes those of every formatter away when it wakes.
        def __call__(self, shown: Any) -> Any:
            if "matplotlib.figure" not in sys.modules or not isinstance(shown, sys.modules["matplotlib.figure"].Figure):
                return None
            for text in every_text(shown):
                note(text)
            return font and chinese_picture(shown, formatters["image/png"].lookup_by_type(type(shown)), font, known)

    formatters[PICTURE] = ChinesePicture(parent=shell.display_formatter)
