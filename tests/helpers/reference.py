"""Reading the golden data of the original implementation (tests/reference, described in its README)."""

import json
from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from thuglm import ChatGLMForConditionalGeneration, ChatGLMTokenizer

ROOT = Path(__file__).resolve().parents[1] / "reference"
CHECKPOINT = ROOT / "checkpoint"


@cache
def tokenizer() -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(ROOT / "tokenizer")


@cache
def tokenizer_cases() -> dict:
    return json.loads((ROOT / "tokenizer" / "cases.json").read_text(encoding="utf-8"))


@cache
def generation_cases() -> dict:
    return json.loads((ROOT / "generation" / "cases.json").read_text(encoding="utf-8"))


@cache
def logit_cases() -> dict[str, dict]:
    return {case["name"]: case for case in json.loads((ROOT / "logits" / "index.json").read_text())["cases"]}


@cache
def tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(ROOT / "logits" / f"{name}.safetensors")


def fresh_model(dtype=torch.float32, **kwargs) -> ChatGLMForConditionalGeneration:
    return ChatGLMForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=dtype, **kwargs).eval()


@cache
def model(dtype=torch.float32) -> ChatGLMForConditionalGeneration:
    """Shared and frozen: a test that trains or moves a model takes `fresh_model`."""
    return fresh_model(dtype).requires_grad_(False)


def adapted_model() -> PeftModel:
    """A fresh model with an adapter that changes its answers."""
    torch.manual_seed(0)
    net = get_peft_model(fresh_model(), LoraConfig(r=4, target_modules=["query_key_value"])).eval()
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return net
