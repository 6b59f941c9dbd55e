"""An optional chapter: the frozen base in 8 or 4 bits, by bitsandbytes; adapter and arithmetic as before.

    matrix in float16   w w w w ...                    2 bytes a weight     blocks of ChatGLM-6B: 11.3 GB
    8 bits              q q q q ... one scale a row    1 byte                                      5.6 GB
    4 bits (NF4)        qq qq ...   one scale for 64   half a byte                                 3.2 GB

                  x (float16) ──► unpack one matrix ──► W x ──┐
                                                              + ──► y      training keeps 16-bit activations, so it is
                  x ──► A ──► B (float32, trained) ───────────┘            the weights alone that shrink

Embedding and head stay as they are: they are tied, and a head in 4 bits would cost answers. The planner knows both
(`plan_device_map(..., base_bits=4)`). An adapter trained on a packed base belongs to that base:
its fingerprint differs.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glmhelpers.utils.folders import expanded

BITS = (8, 4)


def why_not() -> str | None:
    """Why this machine cannot do it, in words, or None if it can."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed (pip install --no-deps bitsandbytes)"
    return None


def load_quantized(
    folder: str | Path, bits: int, device_map: dict[str, Any] | None = None, dtype: torch.dtype = torch.float16
) -> nn.Module:
    """ChatGLM with its blocks' matrices packed, ready for `attach_lora`.

    Args:
        folder: a checkpoint folder.
        bits: 8 or 4.
        device_map: part name -> device; None: all on the CPU.
        dtype: what it computes in, and of everything that is not packed.

    Raises:
        ValueError: another number of bits.
        ModuleNotFoundError: see `why_not`.
    """
    if bits not in BITS:
        raise ValueError(f"bits is {bits!r}; bitsandbytes packs weights into 8 or 4")
    if reason := why_not():
        raise ModuleNotFoundError(reason)
    from bitsandbytes.nn import Linear8bitLt
    from transformers import BitsAndBytesConfig

    from thuglm import ChatGLMForConditionalGeneration

    how = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = BitsAndBytesConfig(**how, bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["lm_head"])
    places = {"": "cpu"} if device_map is None else device_map
    model = ChatGLMForConditionalGeneration.from_pretrained(
        expanded(folder), dtype=dtype, quantization_config=config, device_map=places
    )
    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.register_forward_hook(forget_input)
        # On CPUs that have bfloat16, bitsandbytes 0.50 rearranges the packed weights at the first answer: the base's
        # checksum is another one then, and the next training step fails.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def forget_input(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    """Forward hook of an 8-bit layer: its node in the graph lets go of the layer's input.

    bitsandbytes ties the input to the node itself, for the gradient of the weights: as `tensors` on a GPU, as `A` in
    training on a CPU. The weights are frozen, and checkpointing, which replaces what autograd saves, does not see it:
    each block would keep 7 times its hidden states, 6.6 GB for ChatGLM-6B at 4 x 1024 (benchmarks/packed.py).
    """
    node: Any = output.grad_fn
    if hasattr(node, "tensors"):
        node.tensors = (None, None, None)
    if hasattr(node, "A"):
        node.A = None


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all frozen weights as they are stored, scales included; what is shared counts once."""
    frozen = {name: parameter for name, parameter in model.named_parameters() if "lora_" not in name}
    stored: list[Any] = list(frozen.values())
    for name, parameter in frozen.items():
        # bitsandbytes keeps the scales beside the parameter, for 8 bits only up to the first answer: then in the layer.
        layer = model.get_submodule(name.rpartition(".")[0])
        stored += [getattr(parameter, "SCB", None), getattr(getattr(layer, "state", None), "SCB", None)]
        stored.append(getattr(getattr(parameter, "quant_state", None), "absmax", None))
    different = {id(tensor): tensor for tensor in stored if tensor is not None}
    return sum(tensor.numel() * tensor.element_size() for tensor in different.values())
