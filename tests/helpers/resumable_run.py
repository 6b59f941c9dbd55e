"""A small training that can be killed: `python resumable_run.py OUTPUT` prints a line after each step.

Everything that a checkpoint must bring back is in it: dropout, rows grouped by length over several epochs, accumulated
micro-batches, evaluation, a loss that is logged every third step only, and a GradScaler whose scale grows.
"""

import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from glmhelpers.lora.attach import attach_lora
from glmhelpers.tokens.collate import RightPadCollator
from glmhelpers.tokens.encode import encode_example
from glmhelpers.training import finetune as training
from glmhelpers.training.trainer import GLMTrainer
from tests.helpers.reference import fresh_model, tokenizer

STEPS = 26


class ScaledTrainer(GLMTrainer):
    """With the GradScaler that a float16 base has on a GPU."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=4)


class PrintSteps(TrainerCallback):
    """One line after each step."""

    def on_step_end(self, args, state, control, **kwargs):
        print(f"STEP {state.global_step}", flush=True)


def rows(count=22):
    texts = [{"instruction": f"数字{i}", "output": f"答案是{i}。" * (1 + i % 4)} for i in range(count)]
    return [encode_example(tokenizer(), row) for row in texts]


def run(output, callbacks=(), watch=None, cuda_graphs=False, **changes):
    """(log, model) of the training; goes on if `output` holds a part of it."""
    torch.set_num_threads(1)
    training.GLMTrainer = ScaledTrainer
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "warmup_steps": 4,
        "logging_steps": 3,
        "save_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": 7,
        **changes,
    }
    model = attach_lora(fresh_model(), dropout=0.2)
    arguments = training.training_arguments(Path(output), False, **settings)
    examples = rows()
    try:
        log = training.train(
            model,
            examples[:18],
            RightPadCollator(tokenizer()),
            arguments,
            examples[18:],
            micro_batches=2,
            callbacks=callbacks,
            watch=watch,
            cuda_graphs=cuda_graphs,
        )
    finally:
        training.GLMTrainer = GLMTrainer
    return log, model


if __name__ == "__main__":
    run(sys.argv[1], [PrintSteps()])


class StopAt(TrainerCallback):
    """The stop button of a notebook."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt
