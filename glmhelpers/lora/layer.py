"""A LoRA layer that touches memory as little as it can: the same numbers as peft's, in fewer passes.

peft computes `base(x) + B(A(dropout(x.float()))) * scaling` one operation at a time. With float32 adapters on a float16
base that is a float32 copy of x, a float32 correction as large as the output (12,288 numbers a token), and two more
passes to scale and to add it: for ChatGLM-6B more memory traffic than the rest of the block's elementwise work.

    peft                                          here
    x ─► float32 ─► dropout ─► A ─► B ─► * s       x ─► dropout ─► A ─► h [T, r]
                                       │                                │
    W x ──────────────► float32 ─────► +           W x ─────────────► addmm_(h, B, alpha=s)     one pass, in place
                                       │
                                    float16

Parameters stay float32; they are rounded to the base's dtype for the product, as torch.autocast would do. What autograd
keeps is x itself (no float32 copy), the dropout mask and h, r numbers a token.
"""

from typing import cast

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


def _dropped(x: Tensor, mask: Tensor | None, keep: float) -> Tensor:
    """Dropout of `x` with a mask that was drawn before; dropout's gradient is the same function."""
    return x if mask is None else torch.ops.aten.native_dropout_backward(x, mask, 1 / keep)


class _LoraLinear(torch.autograd.Function):
    """x W^T + bias + scaling * dropout(x) A^T B^T, for frozen W and bias; x: [T, in]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, p: float):
        ctx.scaling, ctx.keep = scaling, 1.0 - p
        dropped, mask = torch.native_dropout(x, p, True) if p else (x, None)
        h = dropped @ a.to(x.dtype).T
        del dropped  # or it would still be there beside the output
        ctx.save_for_backward(x, weight, a, b, h, mask)
        return F.linear(x, weight, bias).addmm_(h, b.to(x.dtype).T, alpha=scaling)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, a, b, h, mask = ctx.saved_tensors
        grad_b = (grad.T @ h).float().mul_(ctx.scaling)
        grad_h = (grad @ b.to(x.dtype)).mul_(ctx.scaling)
        grad_a = (grad_h.T @ _dropped(x, mask, ctx.keep)).float()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _dropped(grad_h @ a.to(x.dtype), mask, ctx.keep).addmm_(grad, weight)
        return grad_x, None, None, grad_a, grad_b, None, None


class FusedLoraLinear(Linear):
    """peft's LoRA linear layer with the forward above; whatever is out of the ordinary goes peft's way."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """[..., in] -> [..., out]."""
        if args or kwargs or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or active[0] in self.lora_variant:
            return super().forward(x)
        (name,) = active
        base = cast(nn.Linear, self.base_layer)
        dropout, scaling = self.lora_dropout[name], self.scaling[name]
        a, b = cast(nn.Linear, self.lora_A[name]).weight, cast(nn.Linear, self.lora_B[name]).weight
        p = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
        flat = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled() or p:
            out = _LoraLinear.apply(flat, base.weight, base.bias, a, b, scaling, p)
        else:
            h = flat @ a.to(x.dtype).T
            out = F.linear(flat, base.weight, base.bias).addmm_(h, b.to(x.dtype).T, alpha=scaling)
        return out.view(*x.shape[:-1], out.shape[-1])


def fuse_lora(model: nn.Module) -> int:
    """Give every plain LoRA linear layer of `model` the fused forward; returns how many there are.

    Parameters, names and files do not change. Layers over an 8- or 4-bit base, or with a trainable base, keep peft's
    own forward.
    """
    count = 0
    for module in model.modules():
        if type(module) is Linear and not module.get_base_layer().weight.requires_grad:
            module.__class__ = FusedLoraLinear
            count += 1
    return count
