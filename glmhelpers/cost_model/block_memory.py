"""Activation memory of one block: what it keeps, and what it needs while it is recomputed and differentiated.

Under activation checkpointing a block keeps only its input. When its turn comes in the backward pass, it runs forward
again, this time keeping what autograd needs; then its gradients are computed, last layer first. Memory climbs, then
falls:

    bytes
      |       LoRA in float32
      |           /\\             gradient of GELU
      |          /  \\            /\\
      |         /    \\      ____/  \\___           LoRA again
      |    ____/      \\____/           \\_______/\\
      |   /                                      \\____
      +------------------------------------------------> time
       LayerNorm  QKV  attention  MLP | MLP  attention  QKV
               run again              |     backward

The code below keeps a ledger: `make` when a tensor comes into being, `drop` when nothing refers to it any more, in the
order of `thuglm.modeling_chatglm` and of the LoRA layer. The highest total is the working set.
tests/cost_model/test_memory_formula.py runs the real model on tensors without data and finds the same bytes.

Block 0 of the model needs a little less: its input, the embeddings, needs no gradient. So autograd keeps nothing up to
its first adapter, and its backward pass ends there. A learnt prefix comes in at the attention, where its keys and those
of the row are put into one tensor.

Unit of the comments: U = hidden states of one micro-batch = rows * length * hidden * bytes of an element.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from glmhelpers.cost_model.allocations import Ledger
from glmhelpers.cost_model.sizes import LORA_TARGETS, Setting, Shape


@dataclass(frozen=True)
class BlockCost:
    """Bytes that one block needs besides its parameters and its input, for one micro-batch.

    Attributes:
        saved: what autograd keeps after the forward pass when the block is not checkpointed.
        again: highest total while the block is run again and differentiated, gradient of its output included.
        undo: the same for a block that was not checkpointed, beyond `saved`.
        keeping: highest total while a block that is not checkpointed runs forward.
        forward: highest total while the block runs forward and keeps nothing (checkpointed, or generating).
        timeline: (step, highest total in it) of running again and undoing, for drawing.
    """

    saved: int
    again: int
    undo: int
    keeping: int
    forward: int
    timeline: tuple[tuple[str, int], ...]


@lru_cache(maxsize=4096)
def block_cost(shape: Shape, setting: Setting, first: bool = False) -> BlockCost:
    """Cost of one block under a setting; see BlockCost. `first`: of block 0, whose input needs no gradient."""
    passing = _Block(shape, setting, keep=False)
    passing.forward()
    if not setting.training:
        return BlockCost(0, 0, 0, 0, passing.book.peak, ())

    kept = _Block(shape, setting, keep=True, first=first)
    kept.forward()
    kept.book.drop("output")
    saved, keeping = kept.book.total, kept.book.peak
    kept.book.peak = saved
    kept.book.make("grad", kept.unit)
    kept.backward()

    again = _Block(shape, setting, keep=True, first=first, checkpointed=True)
    again.book.make("grad", again.unit)
    again.backward()
    undo, history = kept.book.peak - saved, tuple(again.book.history)
    return BlockCost(saved, again.book.peak, undo, keeping, passing.book.peak, history)


class _Block:
    """The ledger of one block; `keep` says whether autograd keeps what it needs here.

    `end`: the adapter behind which no gradient is needed; None for all blocks but the first.
    """

    def __init__(self, shape: Shape, setting: Setting, *, keep: bool, first: bool = False, checkpointed: bool = False):
        self.to_run_again = checkpointed
        self.book, self.shape, self.setting, self.keep = Ledger(), shape, setting, keep
        self.first = first
        self.keys = 2 * setting.rows * setting.keys * shape.hidden * setting.element if setting.prefix_length else 0
        self.end = next((name for name in LORA_TARGETS if first and name in setting.adapters), None)
        self.keeps = keep
        self.tokens = setting.tokens
        self.half = setting.element == 2
        self.unit = self.tokens * shape.hidden * setting.element
        self.dropout = setting.training and setting.lora_dropout > 0

    def forward(self, stop_early: bool = False) -> None:
        """One block forward. `stop_early`: a recomputation ends as soon as the last tensor it is for exists."""
        book, unit, inner = self.book, self.unit, self.unit * self.shape.inner // self.shape.hidden
        statistics = 2 * 4 * self.tokens

        prefix = self.setting.prefix_length
        self.keep = self.keeps and not self.end and not (prefix and self.first)
        book.make("normed", unit)
        if self.keep:
            book.make("statistics", statistics)
        book.step("LayerNorm")
        self.linear("query_key_value", "normed")
        book.make("rotation", unit)
        book.drop("rotation")
        # Query, key and value are views of one tensor: all of it lives as long as attention needs any of them.
        book.make("keys", self.keys)
        self.keep = self.keep or (self.keeps and prefix > 0)
        book.make("context", unit)
        if self.keep:
            # float32, one for each row and head, the length rounded up to 32 by the kernel
            book.make("logsumexp", 4 * self.setting.rows * self.shape.heads * ceil(self.setting.seq_length / 32) * 32)
            book.share("context")
        book.step("attention")
        attention_kept = self.keep
        self.linear("dense", "context")
        book.drop("context")
        if not attention_kept:
            book.drop("query_key_value", "keys")
        book.make("residual", unit)
        book.make("normed2", unit)
        book.drop("normed")
        if self.keep:
            book.make("statistics2", statistics)
        else:
            book.drop("residual")
        book.step("LayerNorm")
        self.linear("dense_h_to_4h", "normed2")
        book.make("gelu", inner)
        if not self.keep:
            book.drop("dense_h_to_4h")
        if stop_early and "dense_4h_to_h" not in self.setting.adapters:
            book.drop("gelu", "normed2", "dense")
            book.step("MLP")
            return
        self.linear("dense_4h_to_h", "gelu", stop_early=stop_early)
        book.drop("gelu")
        if not stop_early:
            book.make("output", unit)
        # `attended` (here "dense") stays in its variable until the block returns.
        book.drop("dense_4h_to_h", "normed2", "dense")
        book.step("MLP")

    def backward(self) -> None:
        """From the gradient of the output, named "grad", to the gradient of the input."""
        book, unit, inner = self.book, self.unit, self.unit * self.shape.inner // self.shape.hidden
        to_normed, to_normed2 = self.end is None, self.end in (None, "query_key_value", "dense")
        book.make("grad_normed2", unit * to_normed2)
        if self.undo_linear("dense_4h_to_h", "grad", "grad_gelu", accumulate=False):
            return
        book.make("grad_inner", inner)
        book.drop("grad_gelu", "dense_h_to_4h")
        if self.undo_linear("dense_h_to_4h", "grad_inner", "grad_normed2", accumulate=True):
            return
        book.step("MLP back")
        book.make("grad_attended", unit)
        book.drop("grad_normed2", "residual", "statistics2")
        book.make("grad_normed", unit * to_normed)
        if self.undo_linear("dense", "grad_attended", "grad_context", accumulate=False):
            return
        book.make("grad_qkv", unit + self.keys if self.keys else 3 * unit)
        # The kernel sums the gradient of the queries in float32 in a buffer of its own.
        book.make("kernel", 4 * self.tokens * self.shape.hidden if self.half else 0)
        book.drop("kernel", "query_key_value", "keys", "context", "logsumexp", "grad_context")
        book.step("attention back")
        if self.keys:
            length, hidden = self.setting.prefix_length, self.shape.hidden
            if self.half:
                book.make("grad summed", 2 * length * hidden * self.setting.element)
            book.make("grad prefix", 4 * 2 * length * hidden)
            book.drop(*["grad summed"] * self.half)
            if self.first:
                return
        book.make("grad_mixed", 3 * unit)
        book.drop("grad_qkv")
        if self.undo_linear("query_key_value", "grad_mixed", "grad_normed", accumulate=True):
            return
        book.make("grad_input", unit)
        book.drop("grad_normed", "statistics")
        book.step("QKV back")

    def need_saved(self) -> None:
        """The first look at a saved tensor makes a checkpointed block run again."""
        if self.to_run_again:
            self.to_run_again = False
            self.forward(stop_early=True)

    def linear(self, name: str, source: str, stop_early: bool = False) -> None:
        """A linear layer and peft's adapter on it: `result + lora_B(lora_A(dropout(x.float()))) * scaling`.

        The adapter is float32, so the sum is too, until it is cast back: with float16 activations the widest moment
        holds the result (half) and twice its float32 form.
        """
        book, tokens = self.book, self.tokens
        inputs, outputs = self.shape.linear(name)
        size, wide = tokens * outputs * self.setting.element, tokens * outputs * 4
        if name in self.setting.adapters and self.setting.fused:
            self.keep = self.keeps
            self.fused_linear(name, source)
            return
        book.make(name, size)
        if name not in self.setting.adapters:
            return
        cast = f"{name} cast"
        if self.half:
            book.make(cast, tokens * inputs * 4)
            source = cast
        if self.dropout:
            book.make(f"{name} dropped", tokens * inputs * 4)
            book.make(f"{name} dropout mask", tokens * inputs)
            if not self.keep:
                book.drop(f"{name} dropout mask")
        elif self.keeps:
            book.share(source)
        self.keep = self.keeps
        book.make(f"{name} low", tokens * self.setting.lora_rank * 4)
        if self.dropout and not self.keep:
            book.drop(f"{name} dropped")
        if stop_early:
            book.drop(*[cast] * self.half)
            return
        book.make("up", wide)
        if not self.keep:
            book.drop(f"{name} low")
        book.make("scaled", wide)
        book.drop("up")
        book.make("sum", wide)
        book.drop("scaled", name)
        if self.half:
            book.make(name, size)
            book.drop("sum", cast)
        else:
            book.alive[name] = book.alive.pop("sum")
        book.step(f"{name} + LoRA" if name != "query_key_value" else "QKV + LoRA")

    def undo_linear(self, name: str, grad: str, target: str, *, accumulate: bool) -> bool:
        """From the gradient of a linear layer's result to that of its input, added to `target` if it exists already.

        Adding makes a new tensor and frees the two old ones. The frozen matrix keeps nothing; the adapter keeps its
        input after dropout, the dropout mask, and its `rank` numbers a token.

        Returns:
            whether the backward pass ends here.
        """
        book, tokens, rank = self.book, self.tokens, self.setting.lora_rank
        inputs, outputs = self.shape.linear(name)
        narrow, wide = tokens * inputs * self.setting.element, tokens * outputs * 4
        if name in self.setting.adapters and self.setting.fused:
            self.undo_fused_linear(name, grad, target, accumulate)
            return name == self.end
        if name in self.setting.adapters:
            if self.half:
                book.make("grad wide", wide)
                book.drop(grad)
                # The base layer's part; none is needed where the backward pass ends.
                book.make(grad, tokens * outputs * self.setting.element * (name != self.end))
                book.make("grad scaled", wide)
                book.drop("grad wide")
            else:
                book.make("grad scaled", wide)
                book.drop(*[grad] * (name == self.end))
            self.need_saved()
            book.make(f"{name} grad B", 4 * rank * outputs)
            book.make("grad low", tokens * rank * 4)
            book.drop("grad scaled", f"{name} low")
            book.make(f"{name} grad A", 4 * rank * inputs)
            if name == self.end:
                return True
            book.make("grad dropped", tokens * inputs * 4)
            book.drop("grad low")
            if self.dropout:
                book.drop(f"{name} dropped")
                book.make("grad cast", tokens * inputs * 4)
                book.drop("grad dropped", f"{name} dropout mask")
            else:
                book.drop(f"{name} cast" if self.half else _SOURCE[name])
                book.alive["grad cast"] = book.alive.pop("grad dropped")
            if self.half:
                book.make("grad new", narrow)
                book.drop("grad cast")
            else:
                book.alive["grad new"] = book.alive.pop("grad cast")
            self._add(target, narrow, accumulate)
            accumulate = True
        self.need_saved()
        book.make("grad new", narrow)
        book.drop(grad)
        self._add(target, narrow, accumulate)
        return False

    def fused_linear(self, name: str, source: str) -> None:
        """A linear layer with its adapter in one function, `glmhelpers.lora.layer`: nothing but the output is wide."""
        book, tokens, rank, element = self.book, self.tokens, self.setting.lora_rank, self.setting.element
        inputs, outputs = self.shape.linear(name)
        dropped, mask = f"{name} dropped", f"{name} dropout mask"
        if self.dropout:
            book.make(dropped, tokens * inputs * element)
            book.make(mask, tokens * inputs)
        self._cast(rank * inputs)
        book.make(f"{name} low", tokens * rank * element)
        book.drop("cast")
        if self.dropout:
            book.drop(dropped)
        book.make(name, tokens * outputs * element)
        self._cast(rank * outputs)
        book.drop("cast")
        if self.keep:
            book.share(source)
        else:
            book.drop(f"{name} low", *[mask] * self.dropout)
        book.step(f"{name} + LoRA" if name != "query_key_value" else "QKV + LoRA")

    def undo_fused_linear(self, name: str, grad: str, target: str, accumulate: bool) -> None:
        """Its backward; what it has been given and what it keeps in variables lives until it returns."""
        book, tokens, rank, element = self.book, self.tokens, self.setting.lora_rank, self.setting.element
        inputs, outputs = self.shape.linear(name)
        narrow = tokens * inputs * element
        self.need_saved()
        self._gradient(f"{name} grad B", rank * outputs)
        self._cast(rank * outputs)
        book.make("grad low", tokens * rank * element)
        book.drop("cast")
        if self.dropout:
            book.make("dropped again", narrow)
        self._gradient(f"{name} grad A", rank * inputs, last=["dropped again"] * self.dropout)
        if name == self.end:
            return
        self._cast(rank * inputs)
        book.make("correction", narrow)
        book.drop("cast")
        if self.dropout:
            book.make("grad new", narrow)
            book.drop("correction")
        else:
            book.alive["grad new"] = book.alive.pop("correction")
        book.drop("grad low", grad, f"{name} low", *[f"{name} dropout mask"] * self.dropout)
        book.drop(_SOURCE[name])
        self._add(target, narrow, accumulate)

    def _cast(self, numbers: int) -> None:
        """A float32 adapter matrix rounded to the base's dtype for one product; nothing to do if that is float32."""
        self.book.make("cast", numbers * self.setting.element if self.half else 0)

    def _gradient(self, name: str, numbers: int, last: Sequence[str] = ()) -> None:
        """The gradient of an adapter matrix: computed in the dtype of the base, kept in float32."""
        if self.half:
            self.book.make("rounded", numbers * self.setting.element)
            self.book.drop(*last)
            self.book.make(name, 4 * numbers)
            self.book.drop("rounded")
        else:
            self.book.make(name, 4 * numbers)
            self.book.drop(*last)

    def _add(self, target: str, size: int, accumulate: bool) -> None:
        book = self.book
        if accumulate:
            book.make("grad sum", size)
            book.drop(target, "grad new")
            book.alive[target] = book.alive.pop("grad sum")
        else:
            book.alive[target] = book.alive.pop("grad new")


_SOURCE = {
    "query_key_value": "normed",
    "dense": "context",
    "dense_h_to_4h": "normed2",
    "dense_4h_to_h": "gelu",
}
