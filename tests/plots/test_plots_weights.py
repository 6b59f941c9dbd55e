import itertools

import matplotlib
import numpy as np
import pytest

matplotlib.use("agg")

import matplotlib.pyplot as plt

from glmhelpers.plots import weights as plots_weights
from glmhelpers.utils.markdown import markdown_table
from glmhelpers.weights.layout import part_bytes, published_shards, stored_bytes
from thuglm import ChatGLMConfig

CONFIG = ChatGLMConfig()


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def test_bars_are_as_long_as_the_parts_are_large():
    whole, block = plots_weights.draw_parts(CONFIG)
    assert [bar.get_width() for bar in whole.patches] == list(part_bytes(CONFIG).values())
    matrices = sum(bar.get_width() for bar in block.patches)
    assert len(block.patches) == 4
    assert 0 < part_bytes(CONFIG)["transformer.layers.0"] - matrices < 110_000


def test_one_bar_of_the_right_length_for_each_file():
    axes = plots_weights.draw_shards(CONFIG)
    shards = published_shards(CONFIG)
    ends = [
        max(bar.get_x() + bar.get_width() for bar in axes.patches if round(bar.get_y() + 0.35) == row)
        for row in range(8)
    ]
    wanted = [sum(stored_bytes(*tensor) for tensor in shard.items()) / 1e9 for shard in shards]
    assert ends == pytest.approx(wanted)
    # Bars that touch must differ in look: neighbouring blocks by shade, embedding and head by hatch.
    for row in range(8):
        bars = [bar for bar in axes.patches if round(bar.get_y() + 0.35) == row]
        looks = [(bar.get_facecolor(), bar.get_hatch()) for bar in bars]
        assert all(one != other for one, other in itertools.pairwise(looks))


def test_mask_has_one_square_for_each_visible_pair():
    visible = np.array([[column < 3 or column <= row for column in range(6)] for row in range(6)])
    axes = plots_weights.draw_mask(visible, 3, list("abcdef"))
    squares = {(int(patch.get_y()), int(patch.get_x())) for patch in axes.patches}
    assert squares == {(int(row), int(column)) for row, column in zip(*np.nonzero(visible), strict=True)}


def test_positions_are_drawn_as_they_are():
    positions = np.array([[0, 1, 2, 2, 2], [0, 0, 0, 1, 2]])
    axes = plots_weights.draw_positions(positions, 3, list("abcde"))
    drawn = [line.get_ydata().tolist() for line in axes.lines if len(line.get_ydata()) == 5]
    assert drawn == positions.tolist()
    assert [text.get_text() for text in axes.texts] == [str(value) for value in positions.ravel()]


def test_numbers_of_the_positions_do_not_cover_each_other():
    context, length = 4, 16
    places = np.arange(length)
    positions = np.array([np.minimum(places, context - 1), np.maximum(0, places - context + 1)])
    axes = plots_weights.draw_positions(positions, context, [str(place) for place in places])
    axes.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 2 * length
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_markdown_table_keeps_text_as_text():
    table = markdown_table([{"a": "x_y | <sop> [gMASK]", "b": 1}], ["b", "a"])
    assert table.splitlines() == ["| b | a |", "| --- | --- |", r"| 1 | x\_y \| &lt;sop> \[gMASK\] |"]
