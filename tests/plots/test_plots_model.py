"""Pictures of the model: the numbers they show are those they were given, and all can be read at 700 pixels."""

import itertools
from functools import partial
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter
from matplotlib.figure import Figure

matplotlib.use("agg")

import matplotlib.pyplot as plt

from glmhelpers.plots import model as plots_model
from glmhelpers.plots import weights as plots_weights
from glmhelpers.plots.style import COLORS, describe, use_style
from thuglm import ChatGLMConfig

CONFIG = ChatGLMConfig(hidden_size=64, num_layers=5, inner_hidden_size=256, num_attention_heads=4, vocab_size=200)
STATES = [np.linspace(-1, 1, 64) * (place + 1) for place in range(6)]
LABELS = [
    "_What",
    "_is",
    "_",
    "3",
    "_pl",
    "us",
    "_",
    "4",
    "?",
    "[gMASK]",
    "<sop>",
    "_",
    "3",
    "+",
    "4",
    "=",
    "7",
    ".",
    "<eop>",
]
VISIBLE = np.array([[column < 10 or column <= row for column in range(19)] for row in range(19)])
POSITIONS = np.array([np.minimum(np.arange(19), 9), np.maximum(0, np.arange(19) - 9)])


@pytest.fixture(autouse=True)
def style():
    use_style()
    yield
    plt.close("all")


def model_picture():
    return plots_model.draw_model(CONFIG, "token 'x' (id 7)", STATES, {"y": 0.75, "z": 0.2}, 7.483)


PICTURES = {
    "model": model_picture,
    "mask": lambda: plots_model.draw_mask(VISIBLE, 10, LABELS),
    "positions": lambda: plots_model.draw_positions(POSITIONS, 10, LABELS),
    "parts": lambda: plots_weights.draw_parts(ChatGLMConfig())[0],
    "shards": lambda: plots_weights.draw_shards(ChatGLMConfig()),
    "loading": lambda: plots_weights.draw_loading([2 * 10**9] * 8, 12 * 10**9, 10**8, 10**9),
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_picture_can_be_read_at_700_pixels_and_has_words(name):
    figure = PICTURES[name]().figure
    figure.set_dpi(700 / figure.get_figwidth())
    figure.canvas.draw()
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text() and text.get_visible()]
    # Points are 1/72 inch.
    assert min(text.get_fontsize() for text in texts) * figure.get_dpi() / 72 >= 11
    drawn = figure.get_tightbbox()
    assert drawn.x0 >= -0.01
    assert drawn.x1 <= figure.get_figwidth() + 0.01
    assert len(figure.alternative_text) > 80


def test_the_strips_are_the_token_s_vectors():
    axes = model_picture()
    strips = [image.get_array().ravel().tolist() for image in axes.images]
    assert strips == [STATES[place][: plots_model.SHOWN].tolist() for place in (0, 1, 2, 4, 5)]
    said = {text.get_text() for text in axes.texts}
    assert {"token 'x' (id 7)", "most likely next:  y 75%   z 20%", "blocks 2 to 3", "block 4"} <= said
    assert sum(text == "× 7.48" for text in (t.get_text() for t in axes.texts)) == 2


def test_letters_of_the_model_do_not_cover_each_other():
    axes = model_picture()
    axes.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_mask_has_one_square_for_each_visible_pair():
    visible = np.array([[column < 3 or column <= row for column in range(6)] for row in range(6)])
    axes = plots_model.draw_mask(visible, 3, list("abcdef"))
    squares = [(int(patch.get_y()), int(patch.get_x()), patch.get_gid()) for patch in axes.patches]
    assert {(row, column) for row, column, kind in squares if kind == "seen"} == {
        (int(row), int(column)) for row, column in zip(*np.nonzero(visible), strict=True)
    }
    assert len(squares) == 36
    colors = {
        (column < 3, kind): patch.get_facecolor()
        for patch, (_, column, kind) in zip(axes.patches, squares, strict=True)
    }
    assert len(set(colors.values())) == 3
    # White has its entry, and every column its name.
    named = {text.get_text() for text in axes.get_legend().get_texts()}
    assert named == {"sees it: prompt", "sees it: answer", "does not see it"}
    assert [label.get_text() for label in axes.get_xticklabels()] == list("abcdef")


def test_prompt_and_answer_differ_in_a_grey_print():
    lightness = [np.dot(matplotlib.colors.to_rgb(COLORS[name]), (0.299, 0.587, 0.114)) for name in ("blue", "orange")]
    assert lightness[1] - lightness[0] > 0.2


def test_positions_are_drawn_as_they_are():
    positions = np.array([[0, 1, 2, 2, 2], [0, 0, 0, 1, 2]])
    axes = plots_model.draw_positions(positions, 3, list("abcde"))
    drawn = [line.get_ydata().tolist() for line in axes.lines if len(line.get_ydata()) == 5]
    assert drawn == positions.tolist()
    assert [text.get_text() for text in axes.texts[:10]] == [str(value) for value in positions.ravel()]


def test_numbers_of_the_positions_do_not_cover_each_other():
    axes = plots_model.draw_positions(POSITIONS, 10, LABELS)
    axes.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 2 * 19 + 2
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_words_of_a_figure_go_beside_its_picture(monkeypatch):
    shell = SimpleNamespace(display_formatter=DisplayFormatter())
    formatter = shell.display_formatter.formatters["image/png"]
    formatter.for_type(Figure, lambda figure: b"pixels")
    monkeypatch.setattr("glmhelpers.plots.style.get_ipython", lambda: shell)
    show = partial(shell.display_formatter.format, include={"image/png"})
    silent, (loud, axes) = plt.figure(), plt.subplots(1, 2)
    for text in ("nothing yet", "seven bars"):  # it is not wrapped twice
        describe(axes[0], text)
    assert show(loud) == ({"image/png": b"pixels"}, {"image/png": {"alt": "seven bars"}})
    describe(axes[1], "Two lines.")
    assert show(loud)[1] == {"image/png": {"alt": "seven bars Two lines."}}
    assert show(silent) == ({"image/png": b"pixels"}, {})
