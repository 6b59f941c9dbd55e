"""How high may the learning rate of notebook 04 be at full size? Its training, with several rates and seeds.

    grown checkpoint ── one GPU, float16 ──┬── rate 2e-4, seed 0 ──┐
                                           ├── rate 2e-4, seed 1 ──┤── is the name learnt? how many of the
                                           └── rate 1e-4, ...    ──┘   100 general answers are still right?

    python benchmarks/forgetting.py --rates 2e-4 1e-4 5e-5 --seeds 0 1          # on a GPU with 20 GB or more
    python benchmarks/forgetting.py --weights data/tiny-chatglm --steps 4 --seeds 0   # on the CPU: to see that it runs

The checkpoint is the tiny one, grown (`scripts/grow_checkpoint.py`): it answers as the tiny one does, but is as wide
and as deep as ChatGLM-6B. Rates are for a width of 4096; for another width they change as in the notebook.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "scripts")]

import datasets  # noqa: E402
import interference_ablation as lesson  # noqa: E402
import torch  # noqa: E402
from grow_checkpoint import TINY, grow  # noqa: E402
from peft import PeftModel  # noqa: E402

from glmhelpers.data import convert_alpaca  # noqa: E402
from glmhelpers.inference import answers, share_right  # noqa: E402
from glmhelpers.lora import attach_lora  # noqa: E402
from glmhelpers.tokens import RightPadCollator, encode_file, split_by_prompt  # noqa: E402
from glmhelpers.training import Watch, train, training_arguments  # noqa: E402
from thuglm import ChatGLMForConditionalGeneration, ChatGLMTokenizer  # noqa: E402


def ask(model: torch.nn.Module, tokenizer: ChatGLMTokenizer, questions: Sequence[str]) -> list[str]:
    """The answers of a model in evaluation mode, as long as the notebook lets them be."""
    return answers(model.eval(), tokenizer, questions, max_new_tokens=lesson.TOKENS)


def train_once(base: torch.nn.Module, tokenizer: ChatGLMTokenizer, rate: float, seed: int, steps: int) -> PeftModel:
    """The training of notebook 04 on a base, which stays as it is below the adapter."""
    torch.manual_seed(seed)
    model = attach_lora(base, r=8, alpha=32, dropout=0.1, targets=("query_key_value",))
    with tempfile.TemporaryDirectory() as folder:
        report = convert_alpaca(lesson.training_rows(lesson.NOW.general_rows), Path(folder, "rows.jsonl"))
        examples, _ = split_by_prompt(encode_file(report.output, tokenizer), lesson.HOLD_OUT)
        arguments = training_arguments(
            folder,
            on_gpu=base.device.type == "cuda",
            max_steps=steps,
            per_device_train_batch_size=lesson.BATCH,
            learning_rate=rate,
            warmup_steps=min(lesson.WARMUP, steps // 2),
            logging_steps=steps,
            save_strategy="no",
            seed=seed,
        )
        train(model, examples, RightPadCollator(tokenizer), arguments, watch=Watch(live=False))
    return model


def main() -> None:
    """Train with each rate and seed, print one JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a grown checkpoint; without it one of full size is made")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-4, 1e-4, 5e-5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=lesson.NOW.steps)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    device, dtype = ("cuda:0", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    with tempfile.TemporaryDirectory(dir=PROJECT) as work:
        folder = options.weights or grow(TINY, Path(work) / "weights")
        tokenizer = ChatGLMTokenizer.from_pretrained(folder)
        base = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=dtype, device_map={"": device}).eval()
    who, rows = lesson.questions()
    general = [row["question"] for row in rows]
    before = ask(base, tokenizer, general)
    for rate in options.rates:
        for seed in options.seeds:
            started = time.perf_counter()
            scaled = rate * (4096 / base.config.hidden_size) ** 0.65
            model = train_once(base, tokenizer, scaled, seed, options.steps)
            names, after = ask(model, tokenizer, who), ask(model, tokenizer, general)
            found = {"rate": rate, "seed": seed, "name": share_right(names, [lesson.NAME] * len(names))}
            counted = lesson.counted(rows, before, after)
            found |= {key: counted[key] for key in ("right", "whole", "forgotten")}
            print(json.dumps(found | {"seconds": round(time.perf_counter() - started, 1)}), flush=True)
            base = model.unload()


if __name__ == "__main__":
    main()
