"""Costs of limits against counting by hand; the pictures show what they say."""

from collections import Counter

import matplotlib
import matplotlib.pyplot as plt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmhelpers.data.convert import convert_alpaca
from glmhelpers.plots import data as plots_data
from glmhelpers.plots import style as plots
from glmhelpers.tokens.collate import RightPadCollator
from glmhelpers.tokens.encode import encode_example
from glmhelpers.tokens.lengths import limit_costs, quantile
from tests.helpers.reference import CHECKPOINT, logit_cases, tensors, tokenizer
from thuglm import ChatGLMConfig

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def _style():
    plots.use_style()
    yield
    plt.close("all")


many = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(many, st.integers(1, 70))
def test_cost_of_a_limit(lengths, limit):
    (cost,) = limit_costs(Counter(lengths), [limit])
    assert cost.kept == sum(n <= limit for n in lengths)
    assert cost.kept + cost.dropped == len(lengths)
    assert cost.tokens_if_dropped == pytest.approx(sum(n for n in lengths if n > limit) / sum(lengths))
    assert cost.tokens_if_cut == pytest.approx(sum(max(0, n - limit) for n in lengths) / sum(lengths))


@given(many, st.floats(0.01, 1))
def test_quantile(lengths, share):
    found = quantile(Counter(lengths), share)
    assert found in lengths
    assert sum(n <= found for n in lengths) >= share * len(lengths) - 1e-9
    assert sum(n < found for n in lengths) < share * len(lengths)


def test_no_examples():
    with pytest.raises(ValueError, match="no examples"):
        limit_costs({}, [5])
    with pytest.raises(ValueError, match="no examples"):
        quantile({}, 0.5)


def words(figure) -> str:
    figure.canvas.draw()
    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def test_the_report_as_a_picture(tmp_path):
    source = tmp_path / "s"
    source.mkdir()
    (source / "good.json").write_text('[{"instruction": "a", "output": "b"}]')
    (source / "bad.json").write_text('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]')
    (source / "空.json").write_text("")
    axes = plots_data.draw_report(convert_alpaca(source, tmp_path / "out.jsonl"))
    text = words(axes.figure)
    for part in ("3 rows found, 2 written", "bad.json", "1 of 2", "no output", "empty", "1 other files"):
        assert part in text


def test_the_lengths_as_a_picture():
    figure = plots_data.draw_lengths(Counter({10: 5, 20: 3, 600: 2}), 512)
    text = words(figure)
    for part in ("limit 512", "8 fit", "2 are longer", "512: 20.0 %", "longest 600"):
        assert part in text
    heights = Counter()
    for bar in figure.axes[0].patches:
        heights[bar.get_x() >= 512] += bar.get_height()
    assert heights == {False: 8, True: 2}
    colors = {(bar.get_x() >= 512, bar.get_facecolor()) for bar in figure.axes[0].patches}
    blue, red = (matplotlib.colors.to_rgba(plots.COLORS[name]) for name in ("blue", "vermillion"))
    assert colors == {(False, blue), (True, red)}


@pytest.mark.parametrize(("longest", "marker", "at"), [(40, "v", 40), (5000, ">", None)])
def test_the_longest_row_is_marked(longest, marker, at):
    figure = plots_data.draw_lengths(Counter({10: 500, 20: 300, longest: 1}), 32)
    above = figure.axes[0]
    (mark,) = (line for line in above.lines if line.get_marker() == marker)
    assert mark.get_xdata()[0] == (at or above.get_xlim()[1])
    assert f"longest {longest:,} (triangle)" in words(figure)


@pytest.mark.parametrize("lengths", [{1: 1}, {5: 3}, {2048: 1}, {7: 1, 5000: 1}])
def test_the_lengths_as_a_picture_of_few_rows(lengths):
    assert "fit" in words(plots_data.draw_lengths(lengths, 16))


def test_against_original_the_picture_of_one_example():
    """Positions, labels and mask are drawn as the original model derived them."""
    tok, config = tokenizer(), ChatGLMConfig.from_pretrained(CHECKPOINT)
    question, answer = logit_cases()["b_train"]["text"]
    example = encode_example(tok, {"instruction": question, "output": answer})
    top, bottom = plots_data.draw_example(example, tok, config).axes
    golden = tensors("b2_train_answer_only")
    length = golden["input_ids"].shape[1]
    lines = sorted({text.get_position()[1] for text in top.texts})
    cells = {
        (text.get_position()[0], lines.index(text.get_position()[1])): text.get_text().replace("\n", "")
        for text in top.texts
    }
    assert cells[13, 0] == "[gMASK]"
    assert cells[14, 0] == "<sop>"
    for line in (0, 1):
        drawn = [int(cells[place, 1 + line]) for place in range(length)]
        assert drawn == golden["position_ids"][0, line].tolist()
    labelled = [(place, 3) in cells for place in range(length)]
    assert labelled == (golden["labels"][0] != -100).tolist()
    white = matplotlib.colors.to_rgba("white")
    fills = {(round(p.get_x() + 0.5), 0): p.get_facecolor() for p in top.patches if p.get_y() == -0.5}
    kinds = ["sky"] * 13 + ["yellow"] * 2 + ["orange"] * (length - 15)
    assert [fills[place, 0] for place in range(length)] == [matplotlib.colors.to_rgba(plots.COLORS[k]) for k in kinds]
    seen = [[False] * length for _ in range(length)]
    for patch in bottom.patches:
        seen[round(patch.get_y() + 0.5)][round(patch.get_x() + 0.5)] = patch.get_facecolor() != white
    # True in the golden mask means hidden.
    assert seen == (~golden["attention_mask"][0, 0]).tolist()


@pytest.mark.parametrize("words", [5, 15, 30])
def test_the_text_of_an_example_stays_in_its_cells(words):
    tok, config = tokenizer(), ChatGLMConfig.from_pretrained(CHECKPOINT)
    example = encode_example(tok, {"instruction": "the " * words, "output": "quick brown fox"})
    figure = plots_data.draw_example(example, tok, config)
    figure.canvas.draw()
    top = figure.axes[0]
    for text in top.texts:
        left, right = top.transData.inverted().transform(text.get_window_extent().get_points())[:, 0]
        # Letters of a few pixels are rounded to whole ones.
        assert right - left < 1.2, text.get_text()


def test_a_batch_as_a_picture():
    tok, config = tokenizer(), ChatGLMConfig.from_pretrained(CHECKPOINT)
    pairs = (("a", "b"), ("What is 2+2?", "It is 4."))
    rows = [encode_example(tok, {"instruction": question, "output": answer}) for question, answer in pairs]
    axes = plots_data.draw_batch(RightPadCollator(tok)(rows), config)
    text = words(axes.figure)
    targets = sum(label != -100 for row in rows for label in row["labels"])
    assert f"2 x 16 tokens: {targets} targets" in text
    assert sum(patch.get_width() for patch in axes.patches) == 2 * 16


def test_the_pictures_can_be_read_at_700_pixels_and_have_words(tmp_path):
    tok, config = tokenizer(), ChatGLMConfig.from_pretrained(CHECKPOINT)
    example = encode_example(tok, {"instruction": "What is 2+3?", "output": "2+3=5."})
    report = convert_alpaca([{"instruction": "a", "output": "b"}, {"instruction": "a"}], tmp_path / "out.jsonl")
    figures = [
        plots_data.draw_report(report).figure,
        plots_data.draw_lengths(Counter({10: 5, 20: 3, 40: 1}), 32),
        plots_data.draw_example(example, tok, config),
        plots_data.draw_batch(RightPadCollator(tok)([example]), config).figure,
    ]
    for figure in figures:
        figure.set_dpi(700 / figure.get_figwidth())
        figure.canvas.draw()
        texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text() and text.get_visible()]
        assert min(text.get_fontsize() for text in texts) * figure.get_dpi() / 72 >= 9.5
        assert len(figure.alternative_text) > 80
