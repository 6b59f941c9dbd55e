"""Cross entropy over a vocabulary of 130,528 without ever holding all logits.

                 rows that carry a label          one chunk at a time
    hidden ─────► (labels != -100) ─────► [c, H] ─► logits [c, V] ─► loss, and at once the gradient
    [B, L, H]          [N, H]                ▲                         d loss / d hidden = (softmax - onehot) @ W
                                             │                              │
                                             └────── only [N, H] is kept ◄──┘

`lm_head` is frozen while LoRA trains, so the gradient of the hidden rows is known as soon as the chunk's softmax is:
nothing of size V is kept for the backward pass. One copy of all logits would be 1.07 GB in float16 at batch 4 x 1024,
and the usual loss keeps several.

A head that is more than its matrix (an adapter, a copy to be trained, 8 bits, a hook) is called, chunk by chunk, and
again in the backward pass: twice the work, and no more memory.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thuglm.constants import IGNORE_INDEX

DEFAULT_CHUNK = 512


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropies of `hidden @ weight.T` against `labels`; `weight` is a constant."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], chunk):
            rows, targets = hidden[start : start + chunk], labels[start : start + chunk]
            keep = targets != IGNORE_INDEX
            targets = targets.clamp_min(0).unsqueeze(1)
            log_probs = F.log_softmax(F.linear(rows, weight), dim=-1, dtype=torch.float32)
            at_target = log_probs.gather(1, targets)
            total -= (at_target.squeeze(1) * keep).sum()
            if grad is not None:
                probs = torch.exp(log_probs, out=torch.empty_like(log_probs, dtype=weight.dtype))
                # p - 1 from the float32 number: where the model is sure, float16 cannot tell p from 1.
                probs.scatter_(1, targets, torch.expm1(at_target).to(probs.dtype))
                # Left as the gradient of the *sum*: divided by the number of labels it could underflow in float16.
                torch.mm(probs, weight, out=grad[start : start + chunk])
                grad[start : start + chunk].mul_(keep.unsqueeze(1))
                del probs
            # Freed here, or the next chunk's logits would be allocated while these are alive.
            del log_probs
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        (grad,) = ctx.saved_tensors
        return None if grad is None else grad * grad_output.to(grad.dtype), None, None, None


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = DEFAULT_CHUNK) -> Tensor:
    """Sum over the labelled rows of -log softmax(hidden @ weight.T)[label].

    Args:
        hidden: [N, H], the final hidden states, any floating dtype.
        weight: [V, H], `lm_head.weight`, of the same dtype and device.
        labels: [N] int64; -100 marks a row without a label (it costs time, but counts as 0).
        chunk: rows per chunk; at most this many rows of logits are alive at once.

    Returns:
        float32 scalar on the device of `hidden`.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        return called_cross_entropy(hidden, partial(F.linear, weight=weight), labels, chunk)
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk)


def is_matrix(head: nn.Module) -> bool:
    """Whether calling a head is nothing but `hidden @ weight.T`."""
    hooked = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
    return type(head) is nn.Linear and head.bias is None and not hooked and "forward" not in vars(head)


def called_cross_entropy(
    hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, chunk: int = DEFAULT_CHUNK
) -> Tensor:
    """`chunked_cross_entropy` for a head, [N, H] -> [N, V], that must be called."""
    total = hidden.new_zeros((), dtype=torch.float32)
    for rows, targets in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        total = total + checkpoint(_sum_of_losses, head, rows, targets, use_reentrant=False)
    return total


def _sum_of_losses(head: Callable[[Tensor], Tensor], rows: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(rows).float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
