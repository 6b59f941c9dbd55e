"""One model, one user at a time.

    chat window (a thread)   ─► answers, adapter off ─────────────►
    next cell of the notebook ──► compare(...)  ─► RuntimeError: the model is busy

Switching an adapter changes the model for everybody who holds it. Two answers at once, one with the adapter and one
without, would both come out wrong, and nothing would show it. So whoever lets a model answer holds it alone meanwhile.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from peft import PeftModel
from torch import nn

from glmhelpers.utils.types import Model
from thuglm.modeling_chatglm import evaluating
from thuglm.prefix_encoder import Prefix, split_prefix

_LOCKS: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()


@contextmanager
def held_alone(model: nn.Module) -> Iterator[None]:
    """Hold a model for the length of a `with` block, dropout off; afterwards every part is in the mode it was in.

    Args:
        model: a model, or a PEFT model on top of it; both are the same model here.

    Raises:
        RuntimeError: somebody else holds it.
    """
    lock = _LOCKS.setdefault(model.get_base_model() if isinstance(model, PeftModel) else model, threading.Lock())
    if not lock.acquire(blocking=False):
        raise RuntimeError(
            "another answer of this model is still being written: wait for it, stop it (`stop()` of its session, the "
            "button of its window), or `clear()` its session if nobody reads it any more"
        )
    try:
        with evaluating(model):
            yield
    finally:
        lock.release()


def peft_prefix(model: Model) -> Prefix:
    """Keys and values of peft's PREFIX_TUNING, one row for all, each on its block's device; none, or none now: [].

    peft itself makes a copy for every row of every micro-batch. Their dtype is the prefix's, float32.
    """
    if not isinstance(model, PeftModel) or model._adapters_disabled:
        return []
    if model.active_peft_config.peft_type != "PREFIX_TUNING":
        return []
    encoder: Any = model.prompt_encoder[model.active_adapter]
    net: Any = model.get_base_model()
    flat = encoder.embedding.weight
    flat = encoder.transform(flat) if hasattr(encoder, "transform") else flat
    homes = [block.input_layernorm.weight.device for block in net.transformer.layers]
    shape = (2 * len(homes), net.config.num_attention_heads, net.config.head_dim)
    parts = zip(split_prefix(flat[None], shape), homes, strict=True)
    return [(key.to(home), value.to(home)) for (key, value), home in parts]


def learnt_prefix(model: Model) -> Prefix:
    """Keys and values that a P-tuning puts in front of every prompt, one row for all; none, or none now: []."""
    if isinstance(model, PeftModel):
        return peft_prefix(model)
    if model.config.pre_seq_len is None:
        return []
    return model.transformer.prefix_encoder(1, model.transformer.final_layernorm.weight.dtype)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> LoRA layer."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def is_merged(model: nn.Module) -> bool:
    """Whether an adapter is part of the weights in memory now."""
    return any(layer.merged_adapters for layer in lora_layers(model).values())


@contextmanager
def merged_in_memory(model: Any) -> Iterator[Any]:
    """The adapter as part of the weights for the length of a `with` block: no extra work for each token.

    Needs host memory for a copy of the adapted matrices (28 times 101 MB for query_key_value of ChatGLM-6B). Afterwards
    every weight has its old bits and its old address. Inside, the adapter cannot be switched off.

    Args:
        model: a PEFT model.

    Raises:
        ValueError: it has no adapter, or is merged already.
    """
    layers = lora_layers(model)
    if not layers:
        if learnt_prefix(model):
            raise ValueError(
                "a learnt prefix is no part of the weights, so it cannot be merged: use the model as it is"
            )
        raise ValueError("the model has no adapter: load one with load_adapter(base, folder)")
    if is_merged(model):
        raise ValueError("the adapter is merged already: leave the other `with merged_in_memory(...)` first")
    kept = {name: layer.get_base_layer().weight.detach().to("cpu", copy=True) for name, layer in layers.items()}
    model.merge_adapter()
    try:
        yield model
    finally:
        model.unmerge_adapter()
        for name, layer in layers.items():
            layer.get_base_layer().weight.data.copy_(kept[name])
