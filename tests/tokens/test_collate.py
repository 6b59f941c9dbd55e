"""Batches: the padding changes nothing, and the Trainer makes them of similar length."""

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

from glmhelpers.tokens.collate import SAMPLING, RightPadCollator
from glmhelpers.tokens.encode import encode_example
from glmhelpers.tokens.lengths import padding_share
from tests.helpers.reference import CHECKPOINT, logit_cases, tensors, tokenizer
from thuglm import ChatGLMForConditionalGeneration
from thuglm.chunked_loss import IGNORE_INDEX

TEXTS = [("你好", "你好！我是助手。"), ("What is 2+2?", "4"), ("介绍一下清华大学", "它在北京。" * 6), ("a", "b")]


def examples() -> list[dict]:
    return [encode_example(tokenizer(), {"instruction": a, "output": b}) for a, b in TEXTS]


@pytest.fixture(scope="module")
def model():
    return ChatGLMForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def test_shapes_and_padding():
    batch = RightPadCollator(tokenizer())(examples())
    longest = max(len(example["input_ids"]) for example in examples())
    assert 56 < longest <= 64
    for name, pad in (("input_ids", 3), ("attention_mask", 0), ("labels", IGNORE_INDEX)):
        assert batch[name].shape == (4, 64)
        assert batch[name].dtype == torch.long
        for row, example in zip(batch[name], examples(), strict=True):
            length = len(example["input_ids"])
            assert row[:length].tolist() == example.get(name, [1] * length)
            assert set(row[length:].tolist()) <= {pad}


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 16))
def test_width_is_the_next_multiple(lengths, multiple):
    rows = [{"input_ids": [7] * length} for length in lengths]
    batch = RightPadCollator(tokenizer(), multiple)(rows)
    width = batch["input_ids"].shape[1]
    assert width % multiple == 0
    assert 0 <= width - max(lengths) < multiple
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert "labels" not in batch


def test_wrong_rows_are_named():
    with pytest.raises(ValueError, match="row 1 of the batch has 2 ids but 1 labels"):
        RightPadCollator(tokenizer())([{"input_ids": [1], "labels": [1]}, {"input_ids": [1, 2], "labels": [1]}])
    with pytest.raises(ValueError, match="at least one row"):
        RightPadCollator(tokenizer())([])
    with pytest.raises(ValueError, match="pad_token_id"):
        RightPadCollator(type("NoPad", (), {"pad_token_id": None})())


def test_against_original_right_padded_batch(model):
    """From texts to the loss: what the original gave for three rows that were padded on the right."""
    pairs, golden = logit_cases()["f_right_padded_train"]["text"], tensors("f_right_padded_train")
    rows = [encode_example(tokenizer(), {"instruction": a, "output": b}, train_sop=True) for a, b in pairs]
    batch = RightPadCollator(tokenizer(), multiple_of=2)(rows)
    for name in ("input_ids", "labels"):
        assert batch[name].tolist() == golden[name].tolist()
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(golden["loss"].item(), abs=1e-4)


def test_the_loss_of_a_padded_batch_is_that_of_its_rows(model):
    collate, rows = RightPadCollator(tokenizer()), examples()
    with torch.no_grad():
        together = model(**collate(rows)).loss
        alone = [model(**{name: torch.tensor([row[name]]) for name in row}).loss for row in rows]
    targets = torch.tensor([sum(label != IGNORE_INDEX for label in row["labels"]) for row in rows])
    expected = (torch.stack(alone) * targets).sum() / targets.sum()
    assert together.item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_gradient_of_a_padded_batch_is_that_of_its_rows(model):
    collate, rows = RightPadCollator(tokenizer(), multiple_of=16), examples()
    weight = model.transformer.layers[1].attention.query_key_value.weight
    targets = [sum(label != IGNORE_INDEX for label in row["labels"]) for row in rows]
    together = torch.autograd.grad(model(**collate(rows)).loss, weight)[0]
    alone = sum(
        torch.autograd.grad(model(**{name: torch.tensor([row[name]]) for name in row}).loss, weight)[0] * count
        for row, count in zip(rows, targets, strict=True)
    ) / sum(targets)
    assert (together - alone).abs().max() < 1e-4 * alone.abs().max()


def test_the_trainer_makes_batches_of_similar_length(model, tmp_path):
    dice = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 200, (256,), generator=dice).tolist()
    rows = {
        "input_ids": [[5] * (n - 3) + [2657, 2660, 2661] for n in lengths],
        "labels": [[IGNORE_INDEX] * (n - 1) + [2661] for n in lengths],
        "length": lengths,
        "split_key": [0.5] * len(lengths),
    }
    dataset = datasets.Dataset.from_dict(rows)
    share = {}
    for name, sampling in (("random", {"remove_unused_columns": False}), ("similar", SAMPLING)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=8, report_to=[], use_cpu=True, **sampling
        )
        trainer = Trainer(model, arguments, data_collator=RightPadCollator(tokenizer()), train_dataset=dataset)
        masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
        assert sum(int(mask.sum()) for mask in masks) == sum(lengths)
        share[name] = 1 - sum(lengths) / sum(mask.numel() for mask in masks)
    assert share["random"] > 0.3
    assert share["similar"] < share["random"] / 2


def test_the_sampler_takes_the_lengths_from_their_column(model, tmp_path):
    """Else it would read every row of the data set before the first step."""
    dataset = datasets.Dataset.from_dict({"input_ids": [[5, 2657, 2660]] * 64, "length": list(range(64))})
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, **SAMPLING)
    trainer = Trainer(model, arguments, data_collator=RightPadCollator(tokenizer()), train_dataset=dataset)
    sampler = trainer.get_train_dataloader().batch_sampler.sampler
    assert list(sampler.lengths) == list(range(64))


def test_padding_share_is_what_the_collator_makes():
    lengths = [3, 17, 40, 8, 9, 100, 1]
    held = 0
    for start in range(0, 7, 3):
        rows = [{"input_ids": [5] * length} for length in lengths[start : start + 3]]
        held += RightPadCollator(tokenizer())(rows)["input_ids"].numel()
    assert padding_share(lengths, 3) == pytest.approx(1 - sum(lengths) / held)
