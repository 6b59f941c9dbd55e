"""The runs of `process_cases`, made by the Trainer in one process."""

import torch

from glmhelpers.lora.attach import adapter_weights, attach_lora
from glmhelpers.tokens.collate import RightPadCollator
from glmhelpers.tokens.encode import encode_file
from glmhelpers.training.finetune import train, training_arguments
from tests.helpers.process_cases import JOB, SCHEDULE, TINY
from thuglm import ChatGLMForConditionalGeneration, ChatGLMTokenizer


def one_run(folder, name, callbacks=()):
    """(log, model) of the job in one process; goes on if `folder`/`name` holds a part of it."""
    tokenizer = ChatGLMTokenizer.from_pretrained(TINY)
    model = attach_lora(ChatGLMForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32), dropout=0.0)
    settings = {key: value for key, value in SCHEDULE.items() if key != "rows_per_step"}
    size, rate = SCHEDULE["rows_per_step"], JOB["learning_rate"]
    arguments = training_arguments(
        folder / name, False, per_device_train_batch_size=size, learning_rate=rate, **settings
    )
    dataset = encode_file(folder / "rows.jsonl", tokenizer, max_length=JOB["max_length"])
    collator = RightPadCollator(tokenizer)
    log = train(model, dataset, collator, arguments, micro_batches=2, callbacks=callbacks)
    return log, model


def matrices(model):
    """Name -> matrix of the adapter."""
    return {name: weight.detach() for name, weight in adapter_weights(model).items()}
