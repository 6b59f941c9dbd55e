"""The picture in the README: what two T4s will hold while ChatGLM-6B is trained, predicted from its config alone.

No weights and no GPU are needed. `python scripts/make_readme_figure.py` writes docs/memory_two_t4.png, and where a font
has Chinese glyphs, the same picture for README.zh-CN.md.
"""

import sys
from pathlib import Path

import chinese_edition
import matplotlib.pyplot as plt
from chinese_figures import chinese_picture, every_text, message_of, words

from glmhelpers.devicemap.plan import largest_batch, plan_device_map
from glmhelpers.plots import style as plots
from glmhelpers.plots.memory_figure import draw_plan
from thuglm import ChatGLMConfig

TARGET = Path(__file__).resolve().parents[1] / "docs" / "memory_two_t4.png"
LENGTH = 1024


def main(target: Path = TARGET) -> None:
    """Draw the roomiest plan for a batch of 4 and the plan for the largest batch, one above the other."""
    config, gpus = ChatGLMConfig(), ["T4", "T4"]
    largest = largest_batch(config, gpus, LENGTH)
    plots.use_style()
    plans = {batch: plan_device_map(config, gpus, batch, LENGTH, objective="memory") for batch in (4, largest)}
    figure, rows = plt.subplots(2, 1, figsize=(7.5, 4.8), sharex=True)
    # The second time all labels are there, and the words of the bars find their places between them.
    for _ in range(2):
        for axes, (batch, plan) in zip(rows, plans.items(), strict=True):
            axes.clear()
            axes.set_title(f"LoRA training of ChatGLM-6B, {batch} rows of {LENGTH} tokens a step")
            draw_plan(plan, axes)
    rows[0].set_xlabel("")
    print(*plans.values(), figure.alternative_text, sep="\n")
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=150, metadata={"Software": None})
    if target == TARGET:
        # (the alternative text stands in the README's own catalogue)
        shown = (message_of(text)[0] for text in every_text(figure) if text != figure.alternative_text)
        chinese_edition.meet({"README": filter(None, shown)})
        if font := plots.cjk_font():
            there = chinese_edition.twin(target)
            chinese_picture(
                figure, lambda shown: shown.savefig(there, dpi=150, metadata={"Software": None}), font, words()
            )


if __name__ == "__main__":
    sys.exit(main())
