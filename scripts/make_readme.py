"""The blocks of the README that are made and not written: the map of all files, what is predicted, what was measured.

    docstrings of the modules          --+
    the planner, for two T4s           --+-->  <!-- block: NAME --> ... <!-- end of block -->
    benchmarks/results/*_h100.jsonl    --+

`--write` renews them, `--check` (a test runs it) names the blocks that are out of date. What stands between them is
written by people, and no test looks at it.
"""

import argparse
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

from glmhelpers.devicemap import largest_batch, plan_device_map
from glmhelpers.training import predict_case
from glmhelpers.utils.units import GIB
from thuglm import ChatGLMConfig

PROJECT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- block: (\w+) -->\n).*?(<!-- end of block -->)", re.DOTALL)

ROOMS = {
    "thuglm": (
        "configuration_chatglm",
        "prefix_mask",
        "modeling_chatglm",
        "chunked_loss",
        "prompt",
        "tokenization_chatglm",
    ),
    "glmhelpers": ("first_cell", "runtime", "attached", "memory", "adgen"),
    **{
        f"glmhelpers/{room}": ()
        for room in (
            *("weights", "data", "tokens", "cost_model", "devicemap", "training", "lora", "inference"),
            *("distributed", "plots", "widgets", "utils"),
        )
    },
}
"""Folders in the order in which one should read them; where files are named, they come first."""


def first_line(path: Path) -> str:
    """The first line of a module's docstring, or of the comment a shell script begins with."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    return next((line.removeprefix("# ") for line in text.splitlines()[1:] if line.startswith("# ")), "")


def order(folder: Path, first: tuple[str, ...]) -> list[Path]:
    """The modules of a folder in reading order: as named, then as the docstring of its `__init__` names them."""
    paths = {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"}
    named = re.findall(r"(\w+)\.py", ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or "")
    stems = dict.fromkeys(stem for stem in (*first, *named, *paths) if stem in paths)
    return [paths[stem] for stem in stems]


def files_map() -> str:
    """Every file of the package with one line, folder by folder, in reading order."""
    lines = []
    for name, first in ROOMS.items():
        folder = PROJECT / name
        about = first_line(folder / "__init__.py")
        lines += ["", f"**`{name}/`** {about}", "", "| file | what it is about |", "|---|---|"]
        lines += [f"| [{path.name}]({name}/{path.name}) | {first_line(path)} |" for path in order(folder, first)]
    for name in ("scripts", "benchmarks"):
        listed = subprocess.run(["git", "ls-files", name], cwd=PROJECT, capture_output=True, text=True, check=True)
        paths = [PROJECT / line for line in listed.stdout.split() if line.endswith((".py", ".sh"))]
        lines += ["", f"**`{name}/`**", "", "| file | what it is about |", "|---|---|"]
        here = [(path.relative_to(PROJECT / name).as_posix(), path) for path in paths if path.exists()]
        lines += [f"| [{inside}]({name}/{inside}) | {first_line(path)} |" for inside, path in here]
    return "\n".join(lines[1:])


def predicted() -> str:
    """What the planner says about two T4s and about one."""
    config = ChatGLMConfig()
    two = plan_device_map(config, ["T4", "T4"], 4, 1024, objective="memory")
    one = plan_device_map(config, ["T4"], 4, 1024, objective="memory")
    most = [largest_batch(config, cards, 1024) for cards in (["T4"], ["T4", "T4"])]
    first, second = (f"{total / GIB:.2f}" for total in two.total_bytes)
    return (
        f"Predicted from the model's configuration alone: four rows of 1024 tokens a step need {first} and {second} "
        f"GiB on two T4s, {one.total_bytes[0] / GIB:.2f} GiB on one; {most[1]} rows fit on two, {most[0]} on one."
    )


def measured() -> str:
    """The table of figures from the result files, each with its program."""
    found, newer = _results("h100"), _results("h200")
    placed = {line["batch"]: line["peak_bytes"] for line in found["two_gpus"] if line["figure"] == "placement"}
    memory, config = found["train_step_memory"], ChatGLMConfig()
    worst = max(abs(predict_case(config, line) / line["peak_bytes"] - 1) for line in memory)
    stages = [line["ms"] for line in found["train_step_planned"]]
    (even,) = (line for line in found["two_gpus"] if line.get("cut") == [14, 14] and line.get("speedup", 1) > 1.6)
    (alike,) = (
        line for line in found["rows"] if (line["way"], line["batch"], line["checkpointed"]) == ("alike", 16, "all")
    )
    packed = [line["peak_bytes"] for line in found["packed"][1:3]]
    tokens = [line["tokens_per_s"] for line in found["decode"] if line.get("way") == "graphs" and line["gpus"] == 1]
    rows = [
        ("peaks of two GPUs, 4 x 1024 tokens", f"{_gb(placed[4])} GB", "two_gpus.py"),
        ("rows of 1024 tokens that fit on both", f"{max(placed)}", "two_gpus.py"),
        (
            f"predicted peak against the measured one, {len(memory)} cases",
            f"within {100 * worst:.2f} %",
            "train_step.py --suite memory",
        ),
        *_steps(found["side_by_side"]),
        (
            "the two stages planned for two 15 GiB GPUs, each alone, 4 x 1024 tokens",
            f"{' and '.join(f'{ms:.0f}' for ms in stages)} ms",
            "train_step.py --suite planned",
        ),
        (
            f"two GPUs, 14 blocks each, {even['micro_batches']} micro-batches against 1",
            f"{even['speedup']} times as fast",
            "two_gpus.py",
        ),
        (
            "4 x 1024 tokens on two GPUs, planned by the catalogue and by the calibrated machine; on one of them",
            _planned(found["calibrate"]),
            "calibrate.py",
        ),
        (
            "24 x 1024 tokens on two GPUs: one process in one part and in 8; one process for each GPU",
            _roads(found["processes"]),
            "processes.py",
        ),
        (
            "24 x 1024 tokens on two H200s held to 14.75 GiB: in one part; all parts in memory; two, as planned",
            _lanes(newer["flight"]),
            "calibrate.py --cap 14.75 --parts flight",
        ),
        (
            "16 x 56 tokens on two H200s: one process; one for each GPU with the whole model; the same as CUDA graphs",
            _copies(newer["processes"]),
            "processes.py --sizes 16x56",
        ),
        ("4 x 1024 tokens on two GPUs in 4 parts: eager; as CUDA graphs", _graphs(found["two_gpus"]), "two_gpus.py"),
        (
            "rows of real lengths, 16 a step: tokens a second against the same rows padded to 1024",
            f"{alike['times']} times as many",
            "rows.py",
        ),
        ("the base in 8 and in 4 bits, peak on one GPU, 4 x 1024 tokens", f"{_gb(packed)} GB", "packed.py"),
        ("tokens a second of one answer", f"{min(tokens):.0f} to {max(tokens):.0f}", "decode.py"),
    ]
    lines = ["| one or two H100s, full size, random weights | figure | its program in `benchmarks/` |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {what} | {figure} | `{program}` |" for what, figure, program in rows)])


def _results(card: str) -> dict[str, list[dict]]:
    """What each program printed on such cards."""
    return {
        path.stem.removesuffix(f"_{card}"): [json.loads(line) for line in path.read_text().splitlines()]
        for path in (PROJECT / "benchmarks" / "results").glob(f"*_{card}.jsonl")
    }


def _lanes(lines: list[dict]) -> str:
    """A step of 24 x 1024 in each of three ways, the mean of its turns in the last call."""
    ways = {line["way"]: line["ms"] for line in lines if (line["what"], line.get("rows")) == ("flight", 24)}
    return "; ".join(f"{sum(ways[way]) / len(ways[way]):.0f}" for way in ("one", "all", "few")) + " ms"


def _copies(lines: list[dict]) -> str:
    """A step of 16 x 56 in one process, and with the whole model on each GPU, eager and replayed, in the last call."""
    last = max(number for number, line in enumerate(lines) if "machine" in line)
    timed = [line for line in lines[last:] if line.get("length") == 56 and line.get("figure") != "compare"]
    one = next(x["ms"] for x in timed if x["schedule"] == "one process")
    two = {x["cuda_graphs"]: x["ms"] for x in timed if x["pipelines"] == 2}
    return f"{one:.0f}; {two[False]:.0f}; {two[True]:.0f} ms"


def _planned(lines: list[dict]) -> str:
    """A step of 4 x 1024 as the catalogue plans it (in 4 parts), as the calibrated planner does, and on one GPU."""
    (choice,) = (x for x in lines if x["what"] == "choice" and x["length"] == 1024 and x["blocks"] == [14, 14])
    others = choice["others_ms"]
    return f"{others['2 GPUs, 4 parts']:.0f} and {choice['ms']:.0f} ms; {others['1 GPUs, 1 parts']:.0f} ms"


def _roads(lines: list[dict]) -> str:
    """A step of 24 x 1024 in one process, all micro-batches in flight: in one part and as planned then; and the fastest
    in one process for each GPU."""
    long = [line for line in lines if line.get("length") == 1024]
    alone = [line for line in long if line["schedule"] == "one process"]
    whole, planned = (next(x["ms"] for x in alone if x["parts"] == 1), next(x["ms"] for x in alone if x["planned"]))
    return f"{whole:.0f} and {planned:.0f} ms; {min(x['ms'] for x in long if x not in alone):.0f} ms"


def _graphs(lines: list[dict]) -> str:
    """Every turn without graphs, then every turn with."""
    turns = [line for line in lines if line["figure"] == "graphs"]
    eager, graphs = ([f"{x['ms']:.0f}" for x in turns if x["way"] == way] for way in ("eager", "graphs"))
    return f"{' and '.join(eager)} ms; {' and '.join(graphs)} ms"


def _steps(lines: list[dict]) -> list[tuple[str, str, str]]:
    """A step of ours beside the code of 2023, measured in one call on one GPU."""
    times = {line["what"]: " and ".join(f"{ms}" for ms in line["ms"]) for line in lines}
    names = {
        "2023": "a step of 4 x 1024 tokens on one GPU, the code of 2023",
        "all": "the same in the same call, ours, every block checkpointed",
        "none": "the same in the same call, ours, none checkpointed",
    }
    return [(names[what], f"{times[what]} ms", "train_step.py") for what in names]


def _gb(sizes: list[int]) -> str:
    return " and ".join(f"{size / 1e9:.2f}" for size in sizes)


BLOCKS = {"map": files_map, "predicted": predicted, "measured": measured}


def renewed(text: str) -> str:
    """The README with every block as it should be now."""
    return BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[3]}", text)


def main(argv: list[str] | None = None) -> int:
    """Renew or check the README; 1 if a block is out of date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true")
    what.add_argument("--write", action="store_true")
    args = parser.parse_args(argv)
    path = PROJECT / "README.md"
    text = path.read_text(encoding="utf-8")
    new = renewed(text)
    if args.write:
        path.write_text(new, encoding="utf-8")
    elif text != new:
        old_blocks = dict(zip(BLOCKS, (match[0] for match in BLOCK.finditer(text)), strict=False))
        print(f"README.md: a block is out of date ({', '.join(old_blocks)}): python scripts/make_readme.py --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
