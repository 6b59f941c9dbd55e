"""Does anything grow? Hundreds of chat turns, adapter switches and resumed trainings, on the tiny model and the CPU.

    python benchmarks/soak.py [--turns 300] [--switches 200] [--cycles 50]

    turn     one conversation that fills the model's 2048 tokens, so that its front is cut off
    switch   adapter on, off; every tenth time another one from the disk, LoRA and prefix in turns, base loaded anew
    cycle    train() stopped after two steps, as by the stop button, and taken up again on a base loaded anew

After each: resident memory, Python objects, threads, open files. The first two fifths warm up; what counts is the
difference between the middle of the rest's first and last thirds. One JSON line a kind; exit status 1 if one has grown.
"""

import argparse
import contextlib
import ctypes
import gc
import io
import json
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glmhelpers.inference import ChatSession, Generation
from glmhelpers.lora import attach_lora, attach_prefix, load_adapter, save_adapter
from glmhelpers.tokens import RightPadCollator, encode_example
from glmhelpers.training import train, training_arguments
from thuglm import ChatGLMForConditionalGeneration, ChatGLMTokenizer

PROJECT = Path(__file__).resolve().parents[1]
FOLDER = PROJECT / "data" / "tiny-chatglm"
QUESTIONS = ("你是谁？", "什么是月亮？", "12+30=?", "What is ice?", "星期二的前一天是什么？")
STEPS = 2
"""Steps of a training between two stops."""

ALLOWED = {"rss_bytes": 4 * 2**20, "objects": 500, "threads": 0, "files": 0}
"""What each may have grown between the two thirds."""


def base() -> ChatGLMForConditionalGeneration:
    """The tiny model, read from the disk."""
    return ChatGLMForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()


class Stop(TrainerCallback):
    """The stop button, after so many steps."""

    def __init__(self, steps: int):
        self.left = steps

    def on_step_end(self, args, state, control, **kwargs):
        """Count down."""
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def state() -> dict[str, int]:
    """What this process holds now, after collecting what nobody holds, and giving free pages back to the system: else
    the C library keeps up to 30 MB of them, more or less from one model to the next."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    process = psutil.Process()
    return {
        "rss_bytes": process.memory_info().rss,
        "objects": len(gc.get_objects()),
        "threads": max(process.num_threads(), threading.active_count()),
        "files": process.num_fds(),
    }


def turns(count: int, folder: Path) -> Iterator[None]:
    """Questions in one conversation."""
    settings = Generation(temperature=0, max_new_tokens=24)
    session = ChatSession(base(), ChatGLMTokenizer.from_pretrained(FOLDER), settings=settings)
    for number in range(count):
        session.chat(QUESTIONS[number % len(QUESTIONS)] * (1 + number % 7))
        yield


def kinds() -> dict[str, Callable]:
    """Name -> how an adapter is attached."""
    return {"lora": attach_lora, "prefix": lambda model: attach_prefix(model, 16)}


def switches(count: int, folder: Path) -> Iterator[None]:
    """Answers with and without an adapter, and with another one."""
    tokenizer, settings = ChatGLMTokenizer.from_pretrained(FOLDER), Generation(temperature=0, max_new_tokens=8)
    for name, attach in kinds().items():
        model = attach(base())
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.01)
        save_adapter(model, folder / name)
    for number in range(count):
        if number % 10 == 0:
            name = list(kinds())[number // 10 % 2]
            session = ChatSession(load_adapter(base(), folder / name), tokenizer, settings=settings)
        session.adapter = number % 2 == 0
        session.chat(QUESTIONS[number % len(QUESTIONS)])
        yield


def cycles(count: int, folder: Path) -> Iterator[None]:
    """Trainings that are stopped and go on, LoRA and prefix in turns."""
    tokenizer = ChatGLMTokenizer.from_pretrained(FOLDER)
    texts = json.loads((PROJECT / "data" / "identity.json").read_text(encoding="utf-8"))[:32]
    rows, collate = [encode_example(tokenizer, row) for row in texts], RightPadCollator(tokenizer)
    how: dict[str, Any] = {"max_steps": STEPS * count, "per_device_train_batch_size": 4, "save_steps": 1}
    for number in range(count):
        attach = list(kinds().values())[number % 2]
        arguments = training_arguments(folder / "runs", False, learning_rate=1e-3, **how)
        with contextlib.suppress(KeyboardInterrupt):
            train(attach(base()), rows, collate, arguments, callbacks=[Stop(STEPS)])
        yield


def grown(samples: list[dict[str, int]]) -> dict[str, int]:
    """For each figure: median of the last third less median of the first, behind the warm-up."""
    rest = samples[2 * len(samples) // 5 :]
    third = max(1, len(rest) // 3)
    return {
        name: round(
            statistics.median(s[name] for s in rest[-third:]) - statistics.median(s[name] for s in rest[:third])
        )
        for name in ALLOWED
    }


def soak(name: str, work: Callable[[int, Path], Iterator[None]], count: int) -> bool:
    """Run one kind, print its line; whether nothing grew beyond what is allowed."""
    samples = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        for _ in work(count, Path(folder)):
            samples.append(state())
    growth = grown(samples)
    ok = all(growth[key] <= most for key, most in ALLOWED.items())
    print(
        json.dumps({"bench": "soak", "kind": name, "count": count, "ok": ok, "grown": growth, "last": samples[-1]}),
        flush=True,
    )
    return ok


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=300)
    parser.add_argument("--switches", type=int, default=200)
    parser.add_argument("--cycles", type=int, default=50)
    options = vars(parser.parse_args())
    work = {"turns": turns, "switches": switches, "cycles": cycles}
    results = [soak(name, work[name], count) for name, count in options.items() if count]
    sys.exit(not all(results))
