"""Tiny models with drawn weights, and batches for them, that several rooms test with."""

import torch
from peft import LoraConfig, get_peft_model

from tests.helpers.reference import model, tokenizer
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration

SMALL_SIZES = {
    "num_layers": 5,
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "inner_hidden_size": 4096,
    "vocab_size": 32000,
}
"""Sizes for which a plan is searched quickly; no model of them is made."""

PROMPTS = ["你好", "晚上睡不着应该怎么办", "What is the capital of France?"]


def tiny_config(**changes) -> ChatGLMConfig:
    return ChatGLMConfig(**{**model().config.to_dict(), **changes})


def random_model(**changes) -> ChatGLMForConditionalGeneration:
    torch.manual_seed(0)
    return ChatGLMForConditionalGeneration(tiny_config(**changes)).eval()


def training_rows():
    return [
        tokenizer().encode(prompt, answer)
        for prompt, answer in zip(PROMPTS, ["你好！", "早点睡。", "Paris."], strict=True)
    ]


def right_padded(rows, multiple=1):
    length = -(-max(map(len, rows)) // multiple) * multiple
    ids = torch.full((len(rows), length), 3)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    labels = ids.clone()
    for number, row in enumerate(rows):
        labels[number, : row.index(2660) + 1] = -100
    labels[mask == 0] = -100
    return ids, mask, labels


def lora(net, dropout=0.0):
    torch.manual_seed(1)
    net = get_peft_model(net, LoraConfig(r=8, lora_alpha=32, lora_dropout=dropout, target_modules=["query_key_value"]))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" in name:  # drawn on the CPU, so that a split model gets the numbers of a whole one
                parameter.copy_(torch.randn(parameter.shape) * 0.02)
    return net


def lora_gradients(net, **batch):
    net.train()
    net.zero_grad()
    torch.manual_seed(2)
    loss = net(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in net.named_parameters() if p.requires_grad}


def the_batch():
    ids, mask, labels = right_padded(training_rows() * 2)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
