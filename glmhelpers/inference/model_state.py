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
from thuglm.prefix_encoder import Prefix, taken_from

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


def learnt_prefix(model: Model, batch: int) -> Prefix:
    """Keys and values that a P-tuning puts in front of every prompt, for `batch` rows; none, or none now: []."""
    if isinstance(model, PeftModel):
        if model.active_peft_config.peft_type == "PREFIX_TUNING" and not model._adapters_disabled:
            cache: Any = model.get_prompt(batch)
            return taken_from(cache) or []
        model = model.get_base_model()
    if model.config.pre_seq_len is None:
        return []
    return model.transformer.prefix_encoder(batch, model.transformer.final_layernorm.weight.dtype)


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
