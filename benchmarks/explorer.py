"""Milliseconds from a change of the explorer's control to its new picture, and to the best plan's outline.

    python benchmarks/explorer.py [--moves N] [--gpu NAME]

    control.value = ...  ->  picture (drawn once the state is known)  ->  outline (when the planner has answered)

Random moves of all controls, one JSON line a control; what the browser needs to draw the text is not in it.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glmhelpers.widgets import Explorer
from thuglm import ChatGLMConfig


def another(control: Any, chance: random.Random) -> Any:
    """A value that the control can take and does not have."""
    if hasattr(control, "min"):
        values = range(control.min, control.max + 1, control.step)
    else:
        values = [value for _, value in control._options_full]
    if isinstance(control.value, tuple):
        return tuple(chance.sample(values, chance.randint(1, len(values))))
    return chance.choice([value for value in values if value != control.value] or list(values))


def measure(moves: int, gpu: str) -> None:
    """Print the lines."""
    chance, explorer = random.Random(0), Explorer(ChatGLMConfig(), gpu)
    controls = {**explorer.controls, "cut": explorer.cuts[0], "best for": explorer.objective}
    times: dict[str, list[tuple[float, float, int]]] = {name: [] for name in controls}
    for move in range(moves * len(controls)):
        name = list(controls)[move % len(controls)]
        value = another(controls[name], chance)
        start = time.perf_counter()
        controls[name].value = value
        drawn = time.perf_counter()
        explorer.picture()  # waits for the planner
        times[name].append((drawn - start, time.perf_counter() - start, len(explorer.drawing.value)))
    for name, found in times.items():
        pictures, outlines, sizes = zip(*found, strict=True)
        figures = {"median_ms": statistics.median(pictures), "worst_ms": max(pictures), "outline_ms": max(outlines)}
        rounded = {key: round(1e3 * seconds, 1) for key, seconds in figures.items()}
        print(json.dumps({"bench": "explorer", "control": name, "moves": moves, **rounded, "characters": max(sizes)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moves", type=int, default=20)
    parser.add_argument("--gpu", default="T4")
    options = parser.parse_args()
    measure(options.moves, options.gpu)
