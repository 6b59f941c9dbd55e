"""Tokens per second of training on rows as long as real ones, against the same rows padded to 1024.

    python benchmarks/rows.py              the whole model on one GPU, full size
    python benchmarks/rows.py --graphs     only "alike", through the Trainer: with CUDA graphs and without, in turns
    python benchmarks/rows.py --tiny       a small model on the CPU

    padded    p p p a a . . . . . . . . . . . .     what the 2023 script did: every row costs 1024 tokens
              p a a a . . . . . . . . . . . . .
    alike     p p p a a .                           rows of similar length together, padded to the longest of the batch
              p a a a a a

The lengths are drawn from the distribution of alpaca_chinese_dataset: 50, 90, 99 and 100 % of its rows have at most 59,
143, 290 and 1133 tokens; longer than 1024 is cut off. Four tenths of a row are prompt, the rest is answer and labelled.
One JSON line for each way: `tokens_per_s` counts real tokens (prompt and answer), never padding, and `labels_per_s`
those that are learnt. Batches are drawn by the sampler and padded by the collator that the course trains with. With
`--graphs` all is the Trainer's, and the steps in which a length is recorded, once in a training, are not counted.
"""

import argparse
import json
import random
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from split_machine import random_net
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_step import ANY, Case, make_step, marked_blocks  # puts the project on the path
from transformers import TrainerCallback

from glmhelpers.devicemap.captured import Captured
from glmhelpers.devicemap.check import part_names
from glmhelpers.tokens.collate import RightPadCollator
from glmhelpers.training.finetune import training_arguments
from glmhelpers.training.measure import prepare
from glmhelpers.training.trainer import GLMTrainer, SameOrderSampler
from thuglm import ChatGLMConfig, ChatGLMTokenizer

TINY = Path(__file__).resolve().parents[1] / "data" / "tiny-chatglm"
POINTS = ((0.0, 10), (0.5, 59), (0.9, 143), (0.99, 290), (1.0, 1133))
PROMPT_SHARE = 0.4
WARM_UP = 3


def draw_lengths(count: int, longest: int, seed: int = 6) -> list[int]:
    """`count` lengths in tokens from the distribution through `POINTS`, none over `longest`."""
    dice = random.Random(seed)
    lengths = []
    for _ in range(count):
        at = dice.random()
        (low, shorter), (high, longer) = next(pair for pair in pairwise(POINTS) if at <= pair[1][0])
        lengths.append(min(longest, round(shorter + (longer - shorter) * (at - low) / (high - low))))
    return lengths


def make_row(config: ChatGLMConfig, length: int) -> dict[str, list[int]]:
    """A row of random ids: prompt, [gMASK] <sop>, answer; the answer is labelled."""
    ids = torch.randint(10, min(1000, config.vocab_size), (length,)).tolist()
    start = max(2, round(length * PROMPT_SHARE))
    ids[start - 2 : start] = [config.gmask_token_id, config.bos_token_id]
    return {"input_ids": ids, "labels": [-100] * start + ids[start:]}


def pad_to(batch: dict[str, torch.Tensor], length: int, pad: int) -> dict[str, torch.Tensor]:
    """The same batch, as wide as `length`."""
    fill = {"input_ids": pad, "attention_mask": 0, "labels": -100}
    more = length - batch["input_ids"].shape[1]
    return {key: torch.nn.functional.pad(value, (0, more), value=fill[key]) for key, value in batch.items()}


def make_batches(config: ChatGLMConfig, rows: list[dict], size: int, length: int, alike: bool) -> list[dict]:
    """All batches of one pass over the rows, in the order in which the course trains on them."""
    collate = RightPadCollator(ChatGLMTokenizer.from_pretrained(TINY))  # with the same <pad>, and of another size:
    collate.known = config.vocab_size
    order = list(SameOrderSampler(size, lengths=[len(row["input_ids"]) for row in rows])) if alike else range(len(rows))
    groups = [[rows[index] for index in order[start : start + size]] for start in range(0, len(rows), size)]
    batches = [collate(group) for group in groups]
    return batches if alike else [pad_to(batch, length, config.pad_token_id) for batch in batches]


def run(step, batches: list[dict], device: str, seconds: float) -> dict:
    """Train on the batches until they or the seconds are used up; the longest ones come first, as a warm-up."""

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    for batch in sorted(batches, key=lambda batch: -batch["input_ids"].numel())[:WARM_UP]:
        step(batch)
    wait()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    random.Random(0).shuffle(batches)
    begin, done = time.perf_counter(), []
    for batch in batches:
        step(batch)
        done.append(batch)
        if len(done) % 10 == 0:
            wait()
            if time.perf_counter() - begin > seconds:
                break
    wait()
    took = time.perf_counter() - begin
    real = sum(int(batch["attention_mask"].sum()) for batch in done)
    labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in done)
    places = sum(batch["input_ids"].numel() for batch in done)
    return {
        "steps": len(done),
        "rows": sum(len(batch["labels"]) for batch in done),
        "seconds": round(took, 2),
        "ms": round(took / len(done) * 1e3, 1),
        "padding_share": round(1 - real / places, 3),
        "tokens_per_s": round(real / took),
        "labels_per_s": round(labels / took),
        "peak_bytes": torch.cuda.max_memory_allocated() if device != "cpu" else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if device != "cpu" else None,
    }


class Clock(TrainerCallback):
    """Seconds and real tokens of the Trainer's steps in which nothing is recorded; ends the training after so many of
    these seconds, or three times as many in all."""

    def __init__(self, captured: Captured | None, seconds: float):
        self.captured, self.last, self.seconds = captured, time.perf_counter(), seconds
        self.end, self.took, self.tokens, self.steps, self.recorded = self.last + 3 * seconds, 0.0, 0, 0, 0

    def on_step_begin(self, args, state, control, **kwargs):
        """A step begins where the last one ended."""
        self.known = len(self.captured.known) if self.captured else 0
        self.before = state.num_input_tokens_seen

    def on_step_end(self, args, state, control, **kwargs):
        """Count it."""
        now = time.perf_counter()
        recorded = bool(self.captured) and len(self.captured.known) > self.known
        if state.global_step > WARM_UP and not recorded:
            self.took, self.steps = self.took + now - self.last, self.steps + 1
            self.tokens += state.num_input_tokens_seen - self.before
        self.last, self.recorded = now, self.recorded + recorded
        control.should_training_stop = self.took > self.seconds or now > self.end


def through_trainer(model: Any, rows: list[dict], size: int, graphs: bool, seconds: float, device: str) -> dict:
    """Train on the rows with the Trainer for these seconds."""
    collate = RightPadCollator(ChatGLMTokenizer.from_pretrained(TINY))
    collate.known = model.config.vocab_size
    captured = Captured(model) if graphs else None
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(
            folder,
            device != "cpu",
            per_device_train_batch_size=size,
            max_steps=100_000,
            learning_rate=1e-5,
            save_strategy="no",
            logging_strategy="no",
        )
        clock = Clock(captured, seconds)
        how: dict[str, Any] = {"train_dataset": rows, "data_collator": collate, "callbacks": [clock]}
        begin = time.perf_counter()
        GLMTrainer(model, args, captured=captured, **how).train()
    free, total = torch.cuda.mem_get_info() if device != "cpu" else (0, 0)
    figures = {
        "outside_bytes": total - free - (torch.cuda.memory_reserved() if device != "cpu" else 0),
        "steps": clock.steps,
        "recorded": clock.recorded,
        "ms": round(clock.took / max(clock.steps, 1) * 1e3, 1),
        "tokens_per_s": round(clock.tokens / max(clock.took, 1e-9)),
        "seconds": round(time.perf_counter() - begin, 1),
        "said": sorted(captured.said) if captured else [],
        "peak_bytes": torch.cuda.max_memory_allocated() if device != "cpu" else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if device != "cpu" else None,
    }
    if captured:
        captured.forget()
    return figures


def main() -> None:
    """Read the command line, measure both ways, print a JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--length", type=int, default=1024, help="the longest row, and the width of the padded way")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16], help="rows in a step")
    parser.add_argument("--seconds", type=float, default=20, help="time for each way")
    parser.add_argument("--checkpointed", default="all", help="blocks that are run again: all, none, half or a number")
    parser.add_argument("--attention", choices=["efficient", "any"], default="efficient")
    parser.add_argument("--graphs", action="store_true", help="the Trainer with CUDA graphs against without")
    parser.add_argument("--tiny", action="store_true", help="the tiny model's shape on the CPU")
    options = parser.parse_args()
    config, device = ChatGLMConfig(), "cuda"
    if options.tiny:
        config = ChatGLMConfig.from_pretrained(TINY)
        device = "cpu"
    elif not torch.cuda.is_available():
        raise SystemExit("no CUDA device: use --tiny for a small model on the CPU")
    torch.manual_seed(0)
    rows = [make_row(config, length) for length in draw_lengths(options.rows, options.length)]
    kernels = list(ANY) if options.tiny or options.attention == "any" else [SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(kernels):
        case = Case(checkpointed=options.checkpointed)
        if options.graphs:
            place = "cpu" if options.tiny else "cuda:0"
            places = dict.fromkeys(part_names(config.num_layers), place)
            net = random_net(config, places, torch.float32 if options.tiny else torch.float16, place).place(places)
            marks = marked_blocks(config, case)
            model, ways = prepare(net, [block for block, marked in enumerate(marks) if marked]), ["alike", "graphs"] * 2
        else:
            step, ways = make_step(config, case, device), ["padded", "alike"]
        for size in options.batches:
            speed = {}
            for way in ways:
                if options.graphs:
                    try:
                        figures = through_trainer(model, rows, size, way == "graphs", options.seconds, device)
                    except Exception as error:  # the others go on
                        print(
                            json.dumps({"bench": "rows", "way": way, "batch": size, "error": repr(error)[:600]}),
                            flush=True,
                        )
                        continue
                else:
                    batches = make_batches(config, rows, size, options.length, alike=way != "padded")
                    figures = run(step, batches, device, options.seconds)
                speed[way] = figures["tokens_per_s"]
                what = {"way": way, "batch": size, "length": options.length, "checkpointed": options.checkpointed}
                facts = {"bench": "rows", **what, **figures}
                times = round(speed[way] / speed[ways[0]], 2) if speed.get(ways[0]) else None
                print(json.dumps(facts | {"times": times}), flush=True)


if __name__ == "__main__":
    main()
