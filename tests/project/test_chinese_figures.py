"""A figure drawn twice: with the words of the catalogue, then as it was; with no font, its words are noted only."""

import io
import json
from types import SimpleNamespace

import chinese_figures as figures
import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

KNOWN = {"peak (GiB)": "HOEHE (GiB)", "GPU {1}": "KARTE {1}", "limit {1}": "GRENZE {1}", "bars of {1}": "BALKEN {1}"}
FONT = "DejaVu Sans"  # no Chinese is needed to see whether words change


@pytest.fixture
def figure():
    shown, (left, right) = plt.subplots(1, 2, sharey=True)
    for axes in (left, right):
        axes.barh(range(2), [3, 4])
    left.set_yticks(range(2), ["GPU 0", "GPU 1"])
    left.set_xlabel("peak (GiB)")
    right.axvline(3.5, label="limit 3.5")
    right.legend()
    shown.alternative_text = "bars of 2"
    shown.canvas.draw()
    yield shown
    plt.close(shown)


def printed(figure):
    """PNG of a figure, and its alternative text."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue(), figure.alternative_text


def words_of(figure):
    figure.canvas.draw()
    return [text for text in figures.every_text(figure) if text]


def test_all_words_are_others_while_it_is_drawn_and_as_before_afterwards(figure):
    before, plain = words_of(figure), printed(figure)
    seen = []
    drawn = figures.chinese_picture(
        figure, lambda shown: (seen.extend(words_of(shown)), printed(shown))[1], FONT, KNOWN
    )
    assert {"KARTE 0", "KARTE 1", "HOEHE (GiB)", "GRENZE 3.5", "BALKEN 2"} <= set(seen)
    assert not {"GPU 0", "GPU 1", "peak (GiB)", "limit 3.5", "bars of 2"} & set(seen)
    assert drawn != plain
    assert words_of(figure) == before
    assert printed(figure) == plain


def test_a_figure_is_as_before_after_an_error_too(figure):
    before = words_of(figure)
    with pytest.raises(ZeroDivisionError):
        figures.chinese_picture(figure, lambda shown: 1 / 0, FONT, KNOWN)
    assert words_of(figure) == before


@pytest.mark.parametrize("font", [None, FONT])
def test_words_are_noted_with_a_font_and_without_one(figure, font, tmp_path, monkeypatch):
    met = tmp_path / "words.jsonl"
    monkeypatch.setenv(figures.FILE_VARIABLE, str(met))
    monkeypatch.setattr("glmhelpers.plots.cjk_font", lambda: font)
    monkeypatch.setattr(figures, "words", lambda: KNOWN)
    png = SimpleNamespace(lookup_by_type=lambda kind: printed)
    shell = SimpleNamespace(display_formatter=SimpleNamespace(formatters={"image/png": png}))
    from IPython.core.formatters import BaseFormatter

    monkeypatch.setattr(BaseFormatter, "__init__", lambda self, **settings: None)
    figures.load_ipython_extension(shell)
    second = shell.display_formatter.formatters[figures.PICTURE]
    assert second("a text") is None
    assert (second(figure) is None) == (font is None)  # English alone, never boxes
    assert {json.loads(line) for line in met.read_text(encoding="utf-8").splitlines()} == set(KNOWN)


@pytest.mark.parametrize(
    "text", ["▁The", "_is", "<sop>", "[gMASK] <sop>", "[g\nMASK]", "$x_{ab}$", "cut_off.json", "3.5", "层"]
)
def test_names_and_numbers_are_no_words(text):
    assert figures.message_of(text) == ("", [])


def test_a_list_of_numbers_is_one_place():
    message, found = figures.message_of("steps 1, 1,024, 7.5 of 9")
    assert (message, found) == ("steps {1} of {2}", ["1, 1,024, 7.5", "9"])
    assert figures.put("{2} hat {1}", found) == "9 hat 1, 1,024, 7.5"
    assert figures.message_of("at 10, 0.5 there")[0] == "at {1}, {2} there"


def test_fewer_colours_look_the_same(figure):
    picture = printed(figure)[0]
    small = figures.fewer_colours(picture)
    assert len(small) < len(picture)
    first, second = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=int) for data in (picture, small))
    assert np.abs(first - second).max() < 32
    assert b"Software" not in small


def test_translations_keep_the_places_of_their_numbers():
    for message, translation in figures.words().items():
        count = len(set(figures.PLACE.findall(message)))
        assert set(figures.PLACE.findall(translation)) == {str(place + 1) for place in range(count)}, message
