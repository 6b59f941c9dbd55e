"""Activation checkpointing of one block, as `torch.utils.checkpoint(use_reentrant=False)` does it, in less Python.

    forward     run the block; in place of each tensor that autograd would keep, keep its number: 0, 1, 2, ...
    backward    the first number that is asked for makes the block run again, from its input and the same random state;
                now the tensors are collected in order, and the run is cut off as soon as the last one is there, before
                the last matrix product, which nobody needs
                every number is answered once, and its tensor let go

torch's own serves nested checkpoints, autocast, any device and compilers. This one serves a block of this model: one
input with a gradient, everything on one device, no autocast. It matters where a GPU is much faster than the CPU that
feeds it: each block is checkpointed for each micro-batch, and both GPUs' backward threads share Python's one lock.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from glmhelpers.utils.types import Model


class _AllThere(Exception):
    """Raised inside the second run when the last tensor has been collected."""


class _Run:
    """One block of one micro-batch, from its forward pass to its backward pass."""

    def __init__(self, function: Callable, hidden: Tensor, others: tuple):
        self.inputs: tuple[Callable, Tensor, tuple] | None = (function, hidden, others)
        self.count = 0
        self.kept: list[Tensor | None] | None = None
        self.device = hidden.device
        self.random = self._random_state()

    def _random_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()

    def _set_random_state(self, state: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)

    def number(self, tensor: Tensor) -> int:
        """Instead of keeping a tensor: its number."""
        self.count += 1
        return self.count - 1

    def tensor(self, number: int) -> Tensor:
        """The tensor of a number, which is then forgotten."""
        kept = self.run_again() if self.kept is None else self.kept
        tensor, kept[number] = kept[number], None
        if tensor is None:
            raise RuntimeError(
                "backward ran twice through a checkpointed block: call it once, on the sum of the losses (see run_step)"
            )
        return tensor

    def run_again(self) -> list[Tensor | None]:
        """Run the block a second time and collect all tensors."""
        assert self.inputs is not None
        (function, first, others), now = self.inputs, self._random_state()
        kept: list[Tensor | None] = []

        def collect(tensor: Tensor) -> Tensor:
            kept.append(tensor.detach())
            if len(kept) == self.count:
                raise _AllThere
            return tensor.detach()

        self._set_random_state(self.random)
        hidden = first.detach().requires_grad_(first.requires_grad)
        try:
            with torch.enable_grad(), saved_tensors_hooks(collect, lambda tensor: tensor):
                function(hidden, *others)
        except _AllThere:
            pass
        finally:
            self._set_random_state(now)
        if len(kept) != self.count:
            raise RuntimeError(
                f"a checkpointed block kept {self.count} tensors when it ran first and {len(kept)} when it ran "
                "again: something in it depends on more than its inputs and the random state"
            )
        self.kept, self.inputs = kept, None
        return kept


def recompute(function: Callable, hidden: Tensor, *others):
    """`function(hidden, *others)`, remembering its inputs alone; for transformers' `_gradient_checkpointing_func`.

    Args:
        function: a block; the same result whenever it is called with the same random state.
        hidden: [B, L, H].
        others: what else the block reads, on its device: mask and tables, perhaps keys of a learnt prefix, whose
            gradients come from the first run as the input's does.
    """
    run = _Run(function, hidden, others)
    with saved_tensors_hooks(run.number, run.tensor):
        return function(hidden, *others)


def checkpoint_only(model: Model, layers: Iterable[int]) -> None:
    """Checkpoint these blocks and no others: `plan.checkpointed_layers` applied.

    Args:
        model: a ChatGLM, with an adapter or without.
        layers: indices of the blocks that are run again in the backward pass.
    """
    wanted = set(layers)
    lists: Iterable[Any] = (getattr(module, "layers", None) for module in model.modules())
    blocks = next(layers for layers in lists if isinstance(layers, nn.ModuleList))
    if wrong := sorted(wanted - set(range(len(blocks)))):
        raise ValueError(f"cannot checkpoint block {wrong[0]}: the model has blocks 0 to {len(blocks) - 1}")
    # transformers and peft let the embeddings require a gradient for the sake of reentrant checkpointing. Here it would
    # keep every micro-batch's embeddings, and compute and send a gradient that nobody wants.
    for module in model.modules():
        stop: Any = getattr(module, "disable_input_require_grads", None)
        if stop:
            stop()
    block: Any
    for index, block in enumerate(blocks):
        block.gradient_checkpointing = index in wanted
        block._gradient_checkpointing_func = recompute
