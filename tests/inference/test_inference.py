"""Answers to many questions: padded batches, both sides of an adapter, whatever is asked."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from glmhelpers.inference.batch import answer, answers, compare
from glmhelpers.inference.model_state import merged_in_memory
from tests.helpers.reference import fresh_model, model, tokenizer

QUESTIONS = ["你好", "晚上睡不着应该怎么办", "What is the capital of France?", "", "<sop>", "\ud800", "长" * 300]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_batches_give_the_answers_of_single_questions(batch_size):
    together = answers(model(), tokenizer(), QUESTIONS, max_new_tokens=8, batch_size=batch_size)
    assert together == [answer(model(), tokenizer(), question, max_new_tokens=8) for question in QUESTIONS]


def test_ids_without_text_are_never_written():
    net = fresh_model()
    with torch.no_grad():  # a padding row of the embedding becomes the likeliest token
        net.lm_head.weight[3039] = net.lm_head.weight.abs().sum(0) * 100
        net.transformer.final_layernorm.bias.fill_(10)
    assert answers(net, tokenizer(), ["你好"], max_new_tokens=3)
    assert answers(net, tokenizer(), ["你好"], max_new_tokens=3, do_sample=True, temperature=2.0)


def test_a_merged_adapter_cannot_be_compared_with_its_base():
    net = get_peft_model(fresh_model(), LoraConfig(r=2, target_modules=["query_key_value"]))
    with merged_in_memory(net), pytest.raises(ValueError, match="is merged into the weights"):
        compare(net, tokenizer(), ["你好"])
    (row,) = compare(net, tokenizer(), ["你好"], max_new_tokens=4)
    assert row.base == row.tuned, "an adapter that learnt nothing changes nothing"


@pytest.mark.parametrize("batch_size", [0, -1])
def test_no_batch_is_refused_and_loses_no_question(batch_size):
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}"):
        answers(model(), tokenizer(), QUESTIONS, batch_size=batch_size)
