"""A card of your machine: what the course predicts for it, beside what it really does, in about two minutes.

    python benchmarks/card.py            the GPUs at hand, the full size with random weights (nothing is downloaded)
    python benchmarks/card.py --tiny     the tiny sizes, on any machine: to see that it runs

    random weights, made on the GPUs --> two training steps that the planner planned      ms and GiB, beside the plan
                                     --> 32 tokens, one after another                     tokens/s, beside the bandwidth
    a file of random bytes           --> GPU 0                                            GB/s
    GPU 0                            --> GPU 1                                            GB/s, beside the catalogue

The last line is one JSON object. benchmarks/results/community/README.md says where to send it: no T4 has been measured
by the authors, and every figure for one in the course is predicted.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

import torch  # noqa: E402
import transformers  # noqa: E402

from benchmarks.decode import random_model  # noqa: E402
from benchmarks.random_checkpoint import make_config  # noqa: E402
from glmhelpers.cost_model import GPU, bytes_for_token, find_gpus, gpus_here  # noqa: E402
from glmhelpers.devicemap import plan_device_map  # noqa: E402
from glmhelpers.inference import Decoder  # noqa: E402
from glmhelpers.training import run_step  # noqa: E402
from glmhelpers.training.measure import prepare, random_batch  # noqa: E402
from glmhelpers.utils.units import GIB, MIB  # noqa: E402
from glmhelpers.weights.reading import BlockReader  # noqa: E402
from glmhelpers.weights.shards import Entry  # noqa: E402
from thuglm import ChatGLMConfig  # noqa: E402

TINY = PROJECT / "data" / "tiny-chatglm"
STEPS = ((4, 1024), (16, 56))
"""(rows, tokens a row) of the two steps: the course's own, and rows as long as most of a Chinese instruction set."""


def wait() -> None:
    """Until every GPU has finished."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)


def facts() -> dict[str, Any]:
    """What the machine is."""
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "gpus": [{"name": card.name, "gib": round(card.total_memory / GIB, 2)} for card in cards],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def training_step(config: Any, gpus: list[GPU], rows: int, length: int, repeats: int) -> dict[str, Any]:
    """Seconds and peaks of one planned step, beside what the plan says."""
    plan = plan_device_map(config, gpus, rows, length, "speed", label_share=0.5)
    on_gpu = torch.cuda.is_available()
    model: Any = random_model(config, len(gpus) if on_gpu else 0, torch.float16 if on_gpu else torch.float32)
    # The plan's head is the embedding, as in the published weights.
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.transformer.word_embeddings.weight
    model = prepare(model, plan.checkpointed_layers)
    if on_gpu:
        plan.apply(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    batch, times = random_batch(config, rows, length), []
    for number in range(repeats + 1):
        if number == 1:
            for index in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(index)
        wait()
        begin = time.perf_counter()
        run_step(model, batch, **plan.setting.for_step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()
        times.append(time.perf_counter() - begin)
    peaks = [torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())]
    return {
        "rows": rows,
        "length": length,
        "blocks": [len(blocks) for blocks in plan.blocks],
        "checkpointed": len(plan.checkpointed_layers),
        "micro_batches": plan.micro_batches,
        "in_flight": plan.setting.flying,
        "ms": round(1e3 * statistics.median(times[1:]), 1),
        "predicted_ms": round(1e3 * plan.seconds, 1),
        "peak_gib": [round(peak / GIB, 2) for peak in peaks],
        "predicted_peak_gib": [round(peak / GIB, 2) for peak in plan.peak_bytes],
    }


def decoding(config: Any, gpus: list[GPU], tokens: int) -> dict[str, Any]:
    """Tokens a second of one answer, beside what reading the weights once a token allows."""
    count = len(gpus) if torch.cuda.is_available() else 0
    net = random_model(config, count, torch.float16 if count else torch.float32).eval()
    decoder, prompt = Decoder(net), random_batch(config, 1, 64)["input_ids"][:, :32]
    times: list[float] = []
    for _ in range(2):  # the first time records the graphs
        begins = [time.perf_counter() for _ in decoder.stream(prompt, max_new_tokens=tokens)]
        times = [after - before for before, after in pairwise(begins)]
    limit = gpus[0].bandwidth / bytes_for_token(config, 64)
    return {"tokens_per_s": round(1 / statistics.median(times), 1), "predicted_at_most": round(limit, 1)}


def loading(size: int) -> dict[str, Any]:
    """GB/s from a file, which the system has just written, to the first GPU."""
    target = torch.empty(size // 2, dtype=torch.float16, device="cuda:0" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder, BlockReader(pinned=torch.cuda.is_available()) as reader:
        path = Path(folder, "random")
        path.write_bytes(os.urandom(MIB) * (size // MIB))
        begin = time.perf_counter()
        reader.fill(path, [(Entry(torch.float16, (size // 2,), 0), target)])
        wait()
    return {"gb_per_s": round(size / (time.perf_counter() - begin) / 1e9, 2)}


def link(gpus: list[GPU]) -> dict[str, Any]:
    """GB/s of the hidden states of a micro-batch of 1024 tokens from GPU 0 to GPU 1."""
    if torch.cuda.device_count() < 2:
        return {}
    hidden = torch.zeros(1024, 4096, dtype=torch.float16, device="cuda:0")
    for repeats in (2, 50):
        wait()
        begin = time.perf_counter()
        for _ in range(repeats):
            hidden.to("cuda:1")
        wait()
    rate = 50 * hidden.nbytes / (time.perf_counter() - begin)
    return {"gb_per_s": round(rate / 1e9, 2), "predicted": round(gpus[0].link / 1e9, 2)}


def release() -> None:
    """Give what the last measurement held back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    """Measure, say each figure when it is there, print the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on any machine")
    parser.add_argument("--repeats", type=int, default=3, help="steps that are timed")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        sys.exit("this machine has no GPU that torch can use; --tiny runs anywhere")
    config = ChatGLMConfig.from_pretrained(TINY) if options.tiny else make_config("full")
    gpus = gpus_here() or find_gpus("T4")
    card: dict[str, Any] = {"card": 1, "tiny": options.tiny, **facts(), "steps": []}
    started = time.perf_counter()
    for rows, length in STEPS:
        shorter = min(length, 64) if options.tiny else length
        card["steps"].append(training_step(config, gpus, rows, shorter, options.repeats))
        print("step    ", json.dumps(card["steps"][-1]), flush=True)
        release()
    parts = {
        "decode": lambda: decoding(config, gpus, 32),
        "load": lambda: loading((64 if options.tiny else 1024) * MIB),
        "link": lambda: link(gpus),
    }
    for name, part in parts.items():
        card[name] = part()
        print(f"{name:<8}", json.dumps(card[name]), flush=True)
        release()
    card["seconds"] = round(time.perf_counter() - started)
    print("\nThe card, one line, ready to be pasted into an issue:")
    print(json.dumps(card))


if __name__ == "__main__":
    main()
