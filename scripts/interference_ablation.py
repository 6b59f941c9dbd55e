"""What does a new name cost, and what helps? Trainings of the tiny model that differ in one setting each.

    before: 100 steps, full rate, no general rows, rank 8 ─┬─ fewer steps
                                                           ├─ a lower rate            each with several seeds:
                                                           ├─ general rows mixed in   is the name learnt? how many
                                                           ├─ a smaller rank          general answers are still whole?
                                                           └─ the settings of notebook 04 now

`python scripts/interference_ablation.py` writes data/interference_ablation.json again: a quarter of an hour on one
core. Other versions and processors round differently, so single answers may differ, and the picture should not.
"""

import argparse
import importlib.metadata
import json
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

import datasets
import torch

from glmhelpers.data import convert_alpaca, general_rows
from glmhelpers.inference import answers, kept, share_right
from glmhelpers.inference.batch import Comparison
from glmhelpers.lora import attach_lora
from glmhelpers.tokens import RightPadCollator, encode_file, split_by_prompt
from glmhelpers.training import Watch, train, training_arguments
from glmhelpers.utils.files import whole_file
from thuglm import ChatGLMForConditionalGeneration, ChatGLMTokenizer

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "data" / "interference_ablation.json"
TINY = ROOT / "data" / "tiny-chatglm"
NAME = "小星"
SEEDS = (0, 1)
BATCH, WARMUP, HOLD_OUT = 16, 20, 0.1
TOKENS = 24  # of an answer; the longest reference has 20
FORMER_RATE, RATE = 2e-4 * (4096 / 128) ** (2 / 3), 1.2e-4 * (4096 / 128) ** 0.65


@dataclass(frozen=True)
class Case:
    """The settings of one training.

    Attributes:
        factor: which of them differs from the former ones.
    """

    factor: str = "before"
    steps: int = 100
    rate: float = FORMER_RATE
    general_rows: int = 0
    rank: int = 8
    alpha: int = 32


BEFORE = Case()
NOW = Case("now", steps=150, rate=RATE, general_rows=600)
"""The settings of notebook 04."""


def cases() -> Iterator[Case]:
    """The former settings, one change at a time, and the settings of now."""
    yield BEFORE
    for steps in (50, 25):
        yield replace(BEFORE, factor="fewer steps", steps=steps)
    for part in (2, 4):
        yield replace(BEFORE, factor="lower rate", rate=FORMER_RATE / part)
    for count in (300, 600, 1200):
        yield replace(BEFORE, factor="general rows", general_rows=count)
    # With alpha kept, alpha / rank grows as the rank shrinks, and with it each step: so both ways.
    for rank in (2, 1):
        yield replace(BEFORE, factor="smaller rank", rank=rank)
    for rank in (2, 1):
        yield replace(BEFORE, factor="smaller rank and alpha", rank=rank, alpha=4 * rank)
    yield NOW


def read(name: str) -> list[dict[str, str]]:
    """The rows of a file in data/."""
    return json.loads((ROOT / "data" / f"{name}.json").read_text("utf-8"))


def questions() -> tuple[list[str], list[dict[str, str]]]:
    """(40 questions for the name, 100 rows on other things), as notebook 04 asks them."""
    held_out = read("held_out")
    who = [row["question"] for row in held_out if row["topic"] == "identity"]
    return who, read("general") + [row for row in held_out if row["topic"] == "arithmetic"]


def training_rows(count: int) -> list[dict[str, str]]:
    """The rows of identity.json with the new name, and `count` general ones."""
    named = [{**row, "output": row["output"].replace("{name}", NAME)} for row in read("identity")]
    return named + general_rows(read("alpaca_tiny"), named, questions()[1], count)


def base() -> ChatGLMForConditionalGeneration:
    """The tiny model, as it came."""
    return ChatGLMForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()


def measure(case: Case, seed: int, before: list[str]) -> dict:
    """Train once and ask.

    Args:
        seed: of the adapter's start, the order of the rows and the dropout.
        before: the base's answers to the general questions.
    """
    tokenizer = ChatGLMTokenizer.from_pretrained(TINY)
    who, rows = questions()
    with tempfile.TemporaryDirectory() as folder:
        report = convert_alpaca(training_rows(case.general_rows), Path(folder, "rows.jsonl"))
        examples, _ = split_by_prompt(encode_file(report.output, tokenizer), HOLD_OUT)
        torch.manual_seed(seed)
        model = attach_lora(base(), r=case.rank, alpha=case.alpha, dropout=0.1, targets=("query_key_value",))
        arguments = training_arguments(
            folder,
            on_gpu=False,
            max_steps=case.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=case.rate,
            warmup_steps=WARMUP,
            logging_steps=case.steps,
            save_strategy="no",
            seed=seed,
        )
        train(model, examples, RightPadCollator(tokenizer), arguments, watch=Watch(live=False))
    names = answers(model.eval(), tokenizer, who, max_new_tokens=TOKENS)
    after = answers(model, tokenizer, [row["question"] for row in rows], max_new_tokens=TOKENS)
    return {
        **asdict(case),
        "seed": seed,
        "name": round(share_right(names, [NAME] * len(names)), 4),
        **counted(rows, before, after),
    }


def counted(rows: list[dict[str, str]], before: list[str], after: list[str]) -> dict:
    """Shares of right and of whole answers after the training, and the answers that were lost."""
    pairs = [Comparison(row["question"], *both) for row, *both in zip(rows, before, after, strict=True)]
    whole = kept(rows, pairs)
    return {
        "right": round(kept(rows, pairs, whole=False).shares[1], 4),
        "whole": round(whole.shares[1], 4),
        "forgotten": len(whole.forgotten),
        "garbled": [[pair.question, pair.base, pair.tuned] for pair in whole.garbled],
    }


def main() -> None:
    """Train all cases and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--only", help="train the cases of this factor, print them, and write nothing")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    tokenizer = ChatGLMTokenizer.from_pretrained(TINY)
    rows = questions()[1]
    before = answers(base(), tokenizer, [row["question"] for row in rows], max_new_tokens=TOKENS)
    runs = []
    for case in cases():
        if options.only in (None, case.factor):
            for seed in options.seeds:
                runs.append(measure(case, seed, before))
                print(json.dumps(runs[-1], ensure_ascii=False), flush=True)
    if options.only:
        return
    found = {
        "made_by": "python scripts/interference_ablation.py",
        "date": date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        "machine": f"{platform.machine()}, one thread",
        "questions": len(rows),
        "base": counted(rows, before, before),
        "runs": runs,
    }
    with whole_file(TARGET) as unfinished:
        unfinished.write_text(as_text(found), "utf-8")


def as_text(found: dict) -> str:
    """JSON with one run a line, so that a change can be read."""
    head = json.dumps({**found, "runs": []}, ensure_ascii=False, indent=1)
    lines = ",\n".join("  " + json.dumps(run, ensure_ascii=False) for run in found["runs"])
    return head.replace('"runs": []', f'"runs": [\n{lines}\n ]') + "\n"


if __name__ == "__main__":
    main()
