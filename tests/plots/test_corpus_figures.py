"""The figures of the real data set: their sums, what was found with the real files by others, and the pictures."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from corpus_figures import TARGET, VARIABLE, as_text, make, real_data

from glmhelpers.plots.corpus import WIDTH, draw_corpus, draw_pieces
from glmhelpers.plots.style import COLORS, use_style

matplotlib.use("agg")

FIGURES = json.loads(TARGET.read_text("utf-8"))
STEPS = [(name, step) for name, steps in FIGURES["corpora"].items() for step in steps]


@pytest.fixture(autouse=True)
def _style():
    use_style()
    yield
    plt.close("all")


def spread(figures: dict) -> np.ndarray:
    """The length of every row."""
    lengths = {int(length): count for length, count in figures["lengths"].items()}
    return np.repeat(list(lengths), list(lengths.values()))


@pytest.mark.parametrize(("name", "step"), STEPS)
def test_the_sums_hold(name, step):
    figures = FIGURES["corpora"][name][step]
    lengths = spread(figures)
    assert figures["rows"] == figures["valid"] + sum(figures["rejected"].values())
    assert len(lengths) == figures["valid"]
    assert lengths.sum() == figures["tokens"] > figures["targets"] > 0
    for share, length in figures["percentiles"].items():
        # The smallest length that this share of the rows does not exceed.
        assert np.quantile(lengths, float(share) / 100, method="inverted_cdf") == length
    for cost in figures["limits"]:
        longer = lengths > cost["limit"]
        assert (cost["dropped"], cost["kept"]) == (longer.sum(), (~longer).sum())
        assert cost["tokens_if_dropped"] == pytest.approx(lengths[longer].sum() / lengths.sum(), abs=1e-6)
        assert cost["tokens_if_cut"] == pytest.approx((lengths[longer] - cost["limit"]).sum() / lengths.sum(), abs=1e-6)
    assert [cost["limit"] for cost in figures["limits"]] == [128, 256, 384, 512, 768, 1024]


def test_what_others_found_with_the_same_files():
    """Counted on 2026-11-26 by another program, with the published tokenizer's own encoder."""
    every, chinese = (FIGURES["corpora"][name]["as found"] for name in ("all", "chinese"))
    assert (every["rows"], every["valid"], every["tokens"]) == (82_561, 82_520, 5_904_171)
    assert (chinese["files"], chinese["valid"], chinese["tokens"]) == (25, 30_546, 1_796_444)
    # They took the row below where a percentile falls between two rows: only the last but one differs, 392 for our 395.
    for figures, found in ((every, [54, 137, 275, 451, 1132]), (chinese, [42, 114, 245, 392, 949])):
        assert np.quantile(spread(figures), [0.5, 0.9, 0.99, 0.999, 1], method="lower").tolist() == found
    assert [cost["dropped"] for cost in chinese["limits"]] == [2212, 246, 36, 13, 4, 0]
    lost = {cost["limit"]: round(100 * cost["tokens_if_dropped"], 1) for cost in chinese["limits"]}
    assert (lost[128], lost[256], lost[512]) == (22.9, 4.5, 0.5)
    assert {"repairs": {"comma before ]": 1}, "rows": 2801} in every["repaired"]
    valid = [FIGURES["corpora"]["chinese"][step]["valid"] for step in ("dedupe", "drop_untranslated")]
    assert valid == [29_371, 28_538]


def test_the_row_is_prompt_marks_and_answer():
    row = FIGURES["row"]
    assert len(row["input_ids"]) == len(row["labels"]) == len(row["pieces"])
    start = row["pieces"].index("<sop>") + 1
    assert row["labels"] == [-100] * start + row["input_ids"][start:]
    assert row["pieces"][start - 2] == "[gMASK]"
    assert row["pieces"][-1] == "<eop>"
    texts = ("".join(part).replace("▁", " ").strip() for part in (row["pieces"][: start - 2], row["pieces"][start:-1]))
    assert list(texts) == [f"{row['instruction']}<n>{row['input']}", row["output"]]


def test_the_file_is_what_the_script_makes():
    real = real_data()
    if real is None:
        pytest.skip(f"{VARIABLE} names no folder with the real data set and tokenizer, which are not in the project")
    assert as_text(make(real)) == TARGET.read_text("utf-8")


def test_the_script_finds_nothing_where_there_is_nothing(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert real_data() is None
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert real_data() is None


def words(figure) -> list[str]:
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def test_the_picture_says_what_the_figures_say():
    figure = draw_corpus(FIGURES, Counter({10: 5, 20: 3, 49: 2}), "mine.json")
    top, bottom = figure.axes
    said = words(figure)
    for part in (
        "mine.json: 10 rows, longest 49",
        "real, its Chinese files: 30,546 rows, longest 949",
        "real, all files: 82,520 rows, longest 1,132",
        "9,999 rows (12.1 %)",
        "31.1 % of the tokens",
        "1 row (0.0012 %)",
    ):
        assert part in said
    for stairs in (patch for patch in top.patches if hasattr(patch, "get_data")):
        assert stairs.get_data().values.sum() == pytest.approx(100)
    lost = [bar.get_width() for bar in bottom.patches]
    every = FIGURES["corpora"]["all"]["as found"]
    assert lost[::2] == pytest.approx([100 * cost["dropped"] / every["valid"] for cost in every["limits"]])
    assert lost[1::2] == pytest.approx([100 * cost["tokens_if_dropped"] for cost in every["limits"]])


def test_the_picture_can_be_read_at_700_pixels():
    figure = draw_corpus(FIGURES, {10: 5, 20: 3})
    figure.set_dpi(700 / figure.get_figwidth())
    figure.canvas.draw()
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text() and text.get_visible()]
    # Points are 1/72 inch; ten pixels and no letters over the edge.
    assert min(text.get_fontsize() for text in texts) * figure.get_dpi() / 72 >= 10
    drawn = figure.get_tightbbox()
    assert drawn.x0 >= -0.01
    assert drawn.x1 <= figure.get_figwidth() + 0.01


def test_the_pieces_stay_in_the_picture_in_their_order():
    row = FIGURES["row"]
    root = ElementTree.fromstring(draw_pieces(row).data)
    name = "{http://www.w3.org/2000/svg}"
    cells = root.findall(f"{name}g")
    assert [[text.text for text in cell.findall(f"{name}text")] for cell in cells] == [
        [piece, str(token)] for piece, token in zip(row["pieces"], row["input_ids"], strict=True)
    ]
    boxes = [
        {key: float(value) for key, value in cell[0].attrib.items() if key in ("x", "y", "width")} for cell in cells
    ]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= WIDTH for box in boxes)
    assert all(a["y"] < b["y"] or a["x"] + a["width"] <= b["x"] for a, b in pairwise(boxes))
    kinds = [cell.get("data-kind") for cell in cells]
    start = row["pieces"].index("<sop>") + 1
    assert kinds == ["prompt"] * (start - 2) + ["mark"] * 2 + ["answer"] * (len(kinds) - start)
    fills = {cell.get("data-kind"): cell[0].get("fill") for cell in cells}
    assert fills == {"prompt": COLORS["sky"], "mark": COLORS["yellow"], "answer": COLORS["orange"]}
    assert root.find(f"{name}title").text.startswith("▁ | 把")


def test_pieces_of_any_text_are_escaped():
    row = {"pieces": ["<n>", "a&b", '"'], "input_ids": [4, 5, 6], "labels": [-100, -100, 6]}
    assert "a&amp;b" in draw_pieces(row).data


def test_no_row_of_the_data_set_is_in_the_project():
    """Beside the row of this course, the file holds names of settings and counts only."""

    def texts(value):
        if isinstance(value, dict):
            for name, each in value.items():
                yield name
                yield from texts(each)
        elif isinstance(value, list):
            for each in value:
                yield from texts(each)
        elif isinstance(value, str):
            yield value

    rest = {name: value for name, value in FIGURES.items() if name != "row"}
    assert all(text.isascii() and len(text) <= 64 for text in texts(rest))
    assert Path(TARGET).stat().st_size < 50_000
