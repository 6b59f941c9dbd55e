"""The picture in the README: what two T4s will hold while ChatGLM-6B is trained, predicted from its config alone.

No weights and no GPU are needed. `python scripts/make_readme_figure.py` writes docs/memory_two_t4.png.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt

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
    _, rows = plt.subplots(2, 1, figsize=(9, 5), sharex=True, layout="constrained")
    for axes, batch in zip(rows, (4, largest), strict=True):
        plan = plan_device_map(config, gpus, batch, LENGTH, objective="memory")
        print(plan)
        draw_plan(plan, axes)
        axes.set_title(f"LoRA training of ChatGLM-6B, {batch} rows of {LENGTH} tokens a step", loc="left")
    rows[0].set_xlabel("")
    target.parent.mkdir(exist_ok=True)
    rows[0].figure.savefig(target, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    sys.exit(main())
