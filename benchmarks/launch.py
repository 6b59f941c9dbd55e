"""Seconds that the CPU needs to start the work of one block: what is left of a step when the tensors are tiny.

    python benchmarks/launch.py

    step = blocks x micro-batches x (forward, backward, and forward once more where a block is checkpointed)

`glmhelpers.cost_model.step_time` takes its LAUNCH from here. One thread, 28 blocks of width 64, 8
micro-batches of 16 tokens, LoRA; the arithmetic that is left (a third or so) stands for the launches of a real GPU.
"""

import json
import platform
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glmhelpers.training.measure import prepare, random_batch
from glmhelpers.training.pipeline import run_step
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration

BLOCKS, PARTS, TOKENS, STEPS = 28, 8, 16, 10


def passes(checkpointed: bool) -> tuple[float, float]:
    """Fastest of some steps: seconds of the forward and of the backward pass."""
    tiny = {"hidden_size": 64, "inner_hidden_size": 128, "num_attention_heads": 4, "vocab_size": 1000}
    ids = {"bos_token_id": 4, "eos_token_id": 5, "mask_token_id": 0, "gmask_token_id": 1}
    config = ChatGLMConfig(num_layers=BLOCKS, **tiny, **ids)
    model = prepare(ChatGLMForConditionalGeneration(config), range(BLOCKS) if checkpointed else [])
    batch = random_batch(config, PARTS, TOKENS)
    times = []
    for _ in range(STEPS):
        marks = [time.perf_counter()]

        def backward(loss: torch.Tensor, marks: list[float] = marks) -> None:
            marks.append(time.perf_counter())
            loss.backward()
            marks.append(time.perf_counter())

        run_step(model, batch, PARTS, backward=backward)
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    return min(ahead for ahead, _ in times), min(back for _, back in times)


def main() -> None:
    """Measure, print one line."""
    torch.set_num_threads(1)
    each = 1e6 / (BLOCKS * PARTS)
    kept_forward, kept_backward = passes(checkpointed=False)
    forward, backward = passes(checkpointed=True)
    line = {
        "bench": "launch",
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "forward_us": round(kept_forward * each),
        "backward_us": round(kept_backward * each),
        "checkpointed_forward_us": round(forward * each),
        "checkpointed_backward_us": round(backward * each),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
