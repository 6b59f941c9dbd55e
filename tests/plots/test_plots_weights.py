import itertools

import matplotlib
import pytest

matplotlib.use("agg")

import matplotlib.pyplot as plt

from glmhelpers.plots import weights as plots_weights
from glmhelpers.utils.markdown import markdown_table
from glmhelpers.utils.units import GIB
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


def test_the_bar_that_passes_the_limit_is_the_one_that_kills():
    axes = plots_weights.draw_loading([2 * GIB, 3 * GIB, GIB], limit=6 * GIB, streamed=GIB // 16, taken=GIB // 2)
    assert axes.get_title("left") == "killed in file 2: 1 of 3 files done, 33 %"
    heights = [max(bar.get_y() + bar.get_height() for bar in axes.patches[4 * place :][:4]) for place in range(3)]
    assert heights == [0.5 + 4, 0.5 + 2 + 6, 0.5 + 5 + 2]
    assert plots_weights.draw_loading([GIB], limit=6 * GIB, streamed=0).get_title("left") == ""


def test_markdown_table_keeps_text_as_text():
    table = markdown_table([{"a": "x_y | <sop> [gMASK]", "b": 1}], ["b", "a"])
    assert table.splitlines() == ["| b | a |", "| --- | --- |", r"| 1 | x\_y \| &lt;sop> \[gMASK\] |"]
