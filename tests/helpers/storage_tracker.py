"""Counts the bytes of all tensors alive, operation by operation, on tensors without data.

The formulas in glmhelpers.cost_model.step_memory are checked against the real model run under this tracker on the `meta` device: full
size, forward and backward, in seconds and without a GPU. Three operations are routed to the versions that a GPU takes.
"""

import contextlib
from unittest import mock

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class GradientFromNowhere(torch.autograd.Function):
    """Ends a graph; its backward makes the gradient that a following stage would send."""

    @staticmethod
    def forward(ctx, x):
        ctx.like = (x.shape, x.dtype, x.device)
        return torch.empty((), device=x.device)

    @staticmethod
    def backward(ctx, _):
        shape, dtype, device = ctx.like
        return torch.empty(shape, dtype=dtype, device=device)


class StorageTracker(TorchDispatchMode):
    """Sum of the sizes of storages made inside it and still referred to; `.peak` is the largest sum seen."""

    def __init__(self, keep_history: bool = False):
        super().__init__()
        self.alive: dict[StorageWeakRef, int] = {}
        self.ignored: set[StorageWeakRef] = set()
        self.peak = 0
        self.peak_op = ""
        self.history: list[tuple[str, int]] | None = [] if keep_history else None

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Do not count these tensors' storages (weights, inputs)."""
        self.ignored.update(StorageWeakRef(x.untyped_storage()) for x in tensors)

    @property
    def now(self) -> int:
        """Bytes alive at this moment."""
        for reference in [reference for reference in self.alive if reference.expired()]:
            del self.alive[reference]
        return sum(self.alive.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference not in self.ignored:
                    self.alive[reference] = storage.nbytes()
        now = self.now
        if self.history is not None:
            self.history.append((str(func), now))
        if now > self.peak:
            self.peak, self.peak_op = now, str(func)
        return result


def _gpu_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    if attn_mask is not None:
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, query.requires_grad or key.requires_grad, dropout_p, is_causal, scale=scale
    )[0]


def _gpu_dropout(x, p=0.5, training=True, inplace=False):
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def _gpu_log_softmax(x, dim=None, _stacklevel=3, dtype=None):
    return torch.ops.aten._log_softmax(x, dim, x.dtype == torch.float16 and dtype == torch.float32)


@contextlib.contextmanager
def as_on_a_gpu():
    """Take the kernels of a GPU for attention, dropout and log_softmax, which make other tensors than those of the CPU."""
    with (
        mock.patch.object(F, "scaled_dot_product_attention", _gpu_attention),
        mock.patch.object(F, "dropout", _gpu_dropout),
        mock.patch.object(F, "log_softmax", _gpu_log_softmax),
    ):
        yield
