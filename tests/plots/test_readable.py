"""Every figure of the course at 700 pixels: no letter is too small, and every picture has words."""

import inspect
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from glmhelpers import plots
from glmhelpers.cost_model.block_memory import block_cost
from glmhelpers.cost_model.decoding_time import Speeds
from glmhelpers.data.convert import convert_alpaca
from glmhelpers.devicemap.plan import plan_device_map
from glmhelpers.devicemap.scaling import scale_out
from glmhelpers.tokens.collate import RightPadCollator
from glmhelpers.tokens.encode import encode_example
from glmhelpers.utils.units import GIB
from tests.helpers.reference import CHECKPOINT, tokenizer
from thuglm import ChatGLMConfig

PROJECT = Path(__file__).resolve().parents[2]
PAGE = 700
"""Pixels of the column in which a page shows a figure; wider ones are shrunk to it, narrower ones stay as they are."""

SMALLEST = 9
"""Pixels of the smallest letters as shown, from the top of a bracket to the foot of a g."""

REAL = ChatGLMConfig()
TOY = ChatGLMConfig.from_pretrained(CHECKPOINT)
LABELS = ["_What", "_is", "_", "3", "?", "[gMASK]", "<sop>", "_", "7", "<eop>"]
GPUS = ["T4", "T4"]


def example(words: int = 1) -> dict[str, list[int]]:
    return encode_example(tokenizer(), {"instruction": "What is " * words + "2+3?", "output": "2+3=5."})


def plan(objective: str = "memory", gpus: list[str] = GPUS, batch: int = 4) -> Any:
    return plan_device_map(REAL, gpus, batch, 1024, objective=objective)


def report(folder: Path) -> Any:
    return convert_alpaca([{"instruction": "a", "output": "b"}, {"instruction": "a"}], folder / "out.jsonl")


def states() -> list[np.ndarray]:
    return [np.linspace(-1, 1, REAL.hidden_size)] * (REAL.num_layers + 1)


def stored(name: str) -> Any:
    return json.loads((PROJECT / "data" / f"{name}.json").read_text("utf-8"))


def visible() -> np.ndarray:
    return np.array([[column < 6 or column <= row for column in range(10)] for row in range(10)])


PEAKS = [[5 * GIB, 9 * GIB], [7 * GIB, 7 * GIB], [9 * GIB, 5 * GIB]]
SPEEDS = Speeds("T4", {("fixed", "unmerged", 16, 1): 0.04, ("graphs", "unmerged", 16, 1): 0.01}, 25.0, 503, 9e-3)
LOG = [{"step": 1, "loss": 4.0, "eval_loss": 4.2}, {"step": 9, "loss": 1.0}]

FIGURES: dict[str, Callable[[Path], Any]] = {
    "draw_batch": lambda _: plots.draw_batch(RightPadCollator(tokenizer())([example(), example(3)]), TOY),
    "draw_bounds": lambda _: plots.draw_bounds(REAL, SPEEDS),
    "draw_compared": lambda _: plots.draw_compared(["GPU 0", "GPU 1"], [103 * GIB, 9], [100 * GIB, 9]),
    "draw_corpus": lambda _: plots.draw_corpus(stored("corpus_figures"), {10: 5, 20: 3}),
    "draw_cut_curve": lambda _: plots.draw_cut_curve([1, 2, 3], PEAKS, limit=14 * GIB),
    "draw_decoding": lambda _: plots.draw_decoding(),
    "draw_example": lambda _: plots.draw_example(example(), tokenizer(), TOY),
    "draw_example, 40 tokens": lambda _: plots.draw_example(example(13), tokenizer(), TOY),
    "draw_interference": lambda _: plots.draw_interference(stored("interference_ablation")),
    "draw_lengths": lambda _: plots.draw_lengths(Counter({10: 5, 20: 3, 600: 1}), 32),
    "draw_loading": lambda _: plots.draw_loading([2 * 10**9] * 8, 12 * 10**9, 10**8, 10**9),
    "draw_lora": lambda _: plots.draw_lora(4096, 3 * 4096, 8),
    "draw_map": lambda _: plots.draw_map(plan().device_map),
    "draw_map, CPU": lambda _: plots.draw_map({**plan().device_map, "transformer.word_embeddings": "cpu"}),
    "draw_mask": lambda _: plots.draw_mask(visible(), 6, LABELS),
    "draw_memory": lambda _: plots.draw_memory(plan().with_outside, limits=[14 * GIB, 5 * GIB]),
    "draw_model": lambda _: plots.draw_model(REAL, "token 'x' (id 7)", states(), {"y": 0.75, "z": 0.2}, 7.483),
    "draw_parts": lambda _: plots.draw_parts(REAL)[0],
    "draw_pieces": lambda _: plots.draw_pieces(stored("corpus_figures")["row"]),
    "draw_plan": lambda _: plots.draw_plan(plan()),
    "draw_plan, speed": lambda _: plots.draw_plan(plan("speed")),
    "draw_plan, four": lambda _: plots.draw_plan(plan("speed", ["T4", "P100", "T4", "H100"], 60)),
    "draw_positions": lambda _: plots.draw_positions(np.array([range(10), [0] * 6 + [1, 2, 3, 4]]), 6, LABELS),
    "draw_report": lambda folder: plots.draw_report(report(folder)),
    "draw_rest": lambda _: plots.draw_rest(plan()),
    "draw_scaling": lambda _: plots.draw_scaling(scale_out(REAL, batch_size=64, counts=(1, 8, 32))),
    "draw_schedule": lambda _: plots.draw_schedule(plan().schedule),
    "draw_shards": lambda _: plots.draw_shards(REAL),
    "draw_timeline": lambda _: plots.draw_timeline(block_cost(plan().shape, plan().setting).timeline),
    "plot_b_norms": lambda _: plots.plot_b_norms({str(block): 0.1 * block for block in range(28)}),
    "plot_cache": lambda _: plots.plot_cache(REAL),
    "plot_loss": lambda _: plots.plot_loss(LOG),
    "plot_progress": lambda _: plots.plot_progress([{**LOG[0], "memory": {"GPU 0": GIB}}], "step 1 of 9"),
    "plot_sampling": lambda _: plots.plot_sampling({"temperature 1": [0.5, 0.3]}, ["a\n5", "7"]),
    "plot_speeds": lambda _: plots.plot_speeds({"graph": (20, 30), "one by one": (10, 10)}, 31),
    "plot_top_p": lambda _: plots.plot_top_p({"temperature 1": [0.5, 0.3, 0.2]}, 0.7),
}
"""Name of the function (and which picture of several) -> draws it; gets an empty folder."""


@pytest.fixture(autouse=True)
def style():
    plots.use_style()
    yield
    plt.close("all")


def figure_of(drawn: Any) -> Figure:
    return drawn.figure if isinstance(drawn, Axes) else drawn


def test_no_figure_function_is_left_out():
    """What `glmhelpers.plots` offers and draws by itself is what it names draw_ or plot_."""
    offered = {name for name in plots.__all__ if name.startswith(("draw_", "plot_"))}
    assert {name.partition(",")[0] for name in FIGURES} == offered
    assert all(inspect.getdoc(getattr(plots, name)) for name in offered)


def shown_at(figure: Figure) -> float:
    """Pixels of an inch as shown: as Jupyter saves it, cropped to what is drawn, then shrunk to the page."""
    file = io.BytesIO()
    figure.savefig(file, dpi=figure.dpi, bbox_inches="tight")
    return figure.dpi * min(1, PAGE / Image.open(file).width)


@pytest.mark.parametrize("name", FIGURES)
def test_the_smallest_letters_can_be_read(name, tmp_path):
    drawn = FIGURES[name](tmp_path)
    if hasattr(drawn, "data"):  # SVG
        root = ElementTree.fromstring(drawn.data)
        scale = min(1, PAGE / float(root.get("width")))
        sizes = [scale * float(text.get("font-size")) for text in root.iter("{http://www.w3.org/2000/svg}text")]
    else:
        figure = figure_of(drawn)
        inch = shown_at(figure)
        texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text().strip()]
        sizes = [text.get_fontsize() / 72 * inch for text in texts if text.get_visible()]
    assert min(sizes) >= SMALLEST


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_words(name, tmp_path):
    drawn = FIGURES[name](tmp_path)
    if hasattr(drawn, "data"):  # SVG
        text = ElementTree.fromstring(drawn.data).findtext("{http://www.w3.org/2000/svg}title")
    else:
        text = getattr(figure_of(drawn), "alternative_text", "")
    assert len(text) > 60
    assert any(letter.isdigit() for letter in text)


NOTEBOOKS = {
    f"{path.parent.name}/{path.stem}": path
    for path in sorted((PROJECT / "notebooks").glob("**/*.ipynb"))
    if "build" not in path.parts
}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_picture_of_a_committed_notebook_has_words(name):
    cells = json.loads(NOTEBOOKS[name].read_text("utf-8"))["cells"]
    for place, cell in enumerate(cells):
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                assert output["metadata"].get("image/png", {}).get("alt"), f"cell {place + 1}: a picture without words"
            if "image/svg+xml" in data:
                assert "<title>" in "".join(data["image/svg+xml"]), f"cell {place + 1}: a drawing without a title"
