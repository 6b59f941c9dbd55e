"""A stage of the model as CUDA graphs: its kernels are recorded once, and started with one call from then on.

    eager       Python: kernel kernel kernel ... some 40 calls a block and pass, about 1 ms for the host
    captured    Python: copy the input in, replay ................ a few calls a *stage* and pass

    one stage, two micro-batches       record    forward 0, forward 1, backward 1, backward 0      (once)
                                       replay    the same order in every step

A graph reads and writes the same memory each time. So what comes from outside is copied into fixed tensors, each
micro-batch in flight has graphs of its own, and a segment reads its neighbour's output where that was written. All of a
GPU's graphs share one pool: when a shape is recorded its tensors are let go (`OnDevice.borrow`), so that the next shape
is recorded over the same memory, and all shapes together need what the largest needs. That is why the order of
recording and of replaying must be the same; it is checked. Batches are padded to a few lengths (`pad_part`), each
recorded when first met; those of more than GRAPH_TOKENS tokens run without, since there the GPU is the slower one.

Blocks that are not checkpointed and follow each other on one GPU are one pair of graphs. A checkpointed block is a
pair by itself: its forward graph keeps nothing, its backward graph runs the block again, from the random state of the
forward one. Dropout is the same to the bit as without graphs: random numbers continue where the generator stands, and
recording leaves it as it was, or a run that goes on after a kill would draw others.
"""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from glmhelpers.cost_model.sizes import GRAPH_TOKENS
from glmhelpers.devicemap.devices import OnDevice, parameters_of, walk
from glmhelpers.utils.errors import cleared_chain
from glmhelpers.utils.types import Model

SHAPES = 32
"""Shapes that are recorded at most; further ones run without graphs."""

ON_CPU = "a block is on the CPU"

Shape = tuple[int, int]


@dataclass
class Passes:
    """One segment for one micro-batch: its tensors, the two recordings, and where its random numbers began."""

    forward: Any
    hidden: Tensor
    others: tuple[Tensor, ...]
    output: Tensor
    copied: bool
    """Its input comes from elsewhere than from the segment before it, which is on the same GPU."""
    backward: Any = None
    slope: Any = None
    to_input: Any = None
    flat: Any = None
    began: Any = 0


class Segment(nn.Module):
    """Blocks on one GPU that are recorded together; stands in `transformer.layers` in their place."""

    def __init__(self, blocks: Sequence[nn.Module], home: Any, first: bool):
        super().__init__()
        self.blocks, self.home, self.first = tuple(blocks), home, first  # a tuple: no parameter gets a second name
        self.again = bool(getattr(blocks[0], "gradient_checkpointing", False))
        self.trained = [p for block in blocks for p in block.parameters() if p.requires_grad]
        self.passes: list[Passes] = []
        self.number = 0

    @property
    def input_layernorm(self) -> nn.Module:
        """The model asks it where the segment is."""
        return cast(nn.Module, self.blocks[0].input_layernorm)

    def eager(self, hidden: Tensor, others: Sequence[Tensor], blocks: int | None = None) -> Tensor:
        """The blocks one by one, without graphs."""
        for block in self.blocks[:blocks]:
            hidden, _ = cast(Any, block).forward(hidden, *others)
        return hidden

    def inputs(self, shape: Shape, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """New tensors for a micro-batch [B, L]: hidden states, and bias, cos and sin of the shapes in `like`."""
        norm = cast(Tensor, self.input_layernorm.weight)
        hidden = torch.empty(*shape, norm.shape[0], dtype=norm.dtype, device=norm.device)
        return hidden, *(torch.empty_like(x, device=norm.device) for x in like)

    def rehearse(self, shape: Shape, like: Sequence[Tensor]) -> None:
        """Run one block forward and backward as it will be recorded."""

        def make() -> None:
            hidden, *others = (x.zero_() for x in self.inputs(shape, like))
            with torch.enable_grad():
                output = self.eager(hidden.requires_grad_(), others, 1)
            trained = [p for p in self.blocks[0].parameters() if p.requires_grad]
            torch.autograd.grad(output, [hidden, *trained], output)

        self.home.rehearse(make)

    def record_forward(self, shape: Shape, like: Sequence[Tensor], before: "Segment | None") -> None:
        """Record the forward pass; for a checkpointed block without what autograd would keep."""
        behind = before.passes[-1] if before is not None and before.home is self.home else None

        def fixed() -> tuple[Tensor, ...]:
            return (behind.output.detach(), *behind.others) if behind else self.inputs(shape, like)

        def make(hidden: Tensor, *others: Tensor) -> Tensor:
            with torch.set_grad_enabled(not self.again):
                return self.eager(hidden.requires_grad_(not self.first), others)

        done = self.home.record(make, fixed)
        hidden, *others = done.fixed
        self.passes.append(Passes(done, hidden, tuple(others), done.result.detach(), behind is None))
        done.fixed = ()

    def record_backward(self, number: int, behind: "Segment | None") -> None:
        """Record the backward pass, which for a checkpointed block begins with the forward one."""
        passes, home = self.passes[number], self.home
        hidden, others = passes.hidden, passes.others
        after = behind.passes[number] if behind is not None and behind.home is home else None
        inputs = [*([] if self.first else [hidden]), *self.trained]

        def fixed() -> tuple[Tensor]:
            return (after.to_input if after else torch.empty_like(passes.output),)

        def make(slope: Tensor) -> tuple[Tensor | None, Tensor]:
            with torch.enable_grad():
                output = self.eager(hidden, others) if self.again else passes.forward.result
            found = list(torch.autograd.grad(output, inputs, slope))
            to_input = None if self.first else found.pop(0)
            return to_input, torch.cat([grad.reshape(-1) for grad in found])

        if self.again:
            passes.forward.result = None
        passes.backward = done = home.record(make, fixed)
        passes.forward.result = None  # its graph of gradients is used up
        (passes.to_input, passes.flat), passes.slope = done.result, done.fixed[0]
        done.result = done.fixed = None
        # From here on the memory may be another's, as it would be without graphs.
        passes.flat, passes.output = home.borrow(passes.flat), home.borrow(passes.output)
        passes.hidden, passes.slope = home.borrow(passes.hidden), home.borrow(passes.slope)
        if after:
            after.to_input = passes.slope

    def let_go(self) -> None:
        """Everything is recorded: leave the rest of the memory to the next shape."""
        for passes in self.passes:
            passes.others = tuple(map(self.home.borrow, passes.others))
            passes.to_input = None if self.first else self.home.borrow(passes.to_input)

    def forward(self, hidden_states: Tensor, *others: Tensor, past_key_values: Any = None) -> tuple[Tensor, None]:
        """As a block: [B, L, H] -> [B, L, H] and no weights. Each call is the next micro-batch of the step."""
        passes, self.number = self.passes[self.number], self.number + 1
        return _Replay.apply(self, passes, hidden_states, others, *self.trained), None


class _Replay(torch.autograd.Function):
    """A segment's two graphs as one step of autograd."""

    @staticmethod
    def forward(ctx, segment: Segment, passes: Passes, hidden: Tensor, others: tuple[Tensor, ...], *trained: Tensor):
        ctx.segment, ctx.passes = segment, passes
        if passes.copied:
            for fixed, given in zip((passes.hidden, *passes.others), (hidden, *others), strict=True):
                fixed.copy_(given)
        passes.began = segment.home.generator.get_offset()
        passes.forward.run()
        return passes.output.detach()

    @staticmethod
    def backward(ctx, slope: Tensor):
        segment, passes = ctx.segment, ctx.passes
        segment.number -= 1
        if segment.passes[segment.number] is not passes:
            raise RuntimeError(
                f"micro-batch {segment.number} was to go backward through its CUDA graphs now, and another came: call "
                "backward once, on the sum of the losses (see run_step)"
            )
        if slope.data_ptr() != passes.slope.data_ptr():
            passes.slope.copy_(slope)
        generator = segment.home.generator
        now = generator.get_offset()
        if segment.again:
            generator.set_offset(passes.began)
        passes.backward.run()
        generator.set_offset(now)
        # A copy, as others write to that memory.
        parts = passes.flat.clone().split([p.numel() for p in segment.trained])
        grads = [part.view_as(p) for part, p in zip(parts, segment.trained, strict=True)]
        return None, None, passes.to_input, None, *grads


_OF_AN_ADAPTER = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


def _name_in(block: nn.Module, module: nn.Module) -> str:
    return next(name for name, found in block.named_modules() if found is module)


class Captured:
    """The recordings of a model's stages, made when a shape is first met.

    Args:
        model: a ChatGLM with an adapter, at its places, in training mode.
        home: makes the shared things of one device; tests on a CPU give their own.
    """

    def __init__(self, model: Model, home: Callable[[torch.device], Any] = OnDevice):
        self.model, self.make_home = model, home
        self.transformer = cast(Any, next(m for m in model.modules() if hasattr(m, "word_embeddings")))
        self.known: dict[tuple[Shape, ...], nn.ModuleList | None] = {}
        self.homes: dict[torch.device, Any] = {}
        self.state: tuple = ()
        self.said: set[str] = set()
        self.trained: list[Tensor] = []
        self.no_room = False

    def look(self) -> tuple[str, tuple]:
        """Why the blocks cannot be recorded as they are now ("" if they can), and what recordings of them depend on; in
        one walk over their modules, since it is done before each step."""
        if getattr(self.transformer.config, "pre_seq_len", None) or getattr(self.model, "prompt_encoder", None):
            return "a learnt prefix", ()
        if self.transformer.config._attn_implementation != "sdpa":
            return "attention is not sdpa", ()
        self.trained, trained = [], list[Tensor]()
        state: list[Any] = [torch.is_autocast_enabled("cuda")]
        for block in self.transformer.layers:
            before = len(trained)
            state.append(bool(block.gradient_checkpointing))
            for module in walk(block):
                kept = vars(module)
                if kept["_forward_hooks"] or kept["_forward_pre_hooks"] or "_hf_hook" in kept:
                    return f"a hook on {_name_in(block, module) or 'a block'}", ()
                if "quant_state" in kept or type(module).__module__.startswith("bitsandbytes"):
                    return f"{_name_in(block, module)} is a layer of bitsandbytes", ()
                state.append(kept["training"])
                if "p" in kept:
                    state.append(kept["p"])  # of a dropout
                if "_active_adapter" in kept:
                    state.append(str([kept.get(name) for name in _OF_AN_ADAPTER]))
                for weight in kept["_parameters"].values():
                    if weight is None:
                        continue
                    if self.make_home is OnDevice and not weight.is_cuda:
                        return ON_CPU, ()
                    state.append(weight.data_ptr())
                    if weight.requires_grad:
                        trained.append(weight)
                        state.append(id(weight))
            if len(trained) == before:
                return "a block without anything to train", ()
        self.trained = trained
        return "", tuple(state)

    @contextmanager
    def step(self, shapes: Sequence[Shape]) -> Iterator[Callable[[], None]]:
        """For the length of one step over micro-batches of these shapes [B, L], the blocks are graphs; why not is said
        once. Yields what takes back a step that ran out of memory half way."""
        layers = self.layers_for(tuple(shapes))
        if layers is None:
            yield self.remember()
            return
        for segment in cast(Any, layers):
            segment.number = 0
        before, self.transformer.layers = self.transformer.layers, layers
        try:
            yield self.remember()
        finally:
            self.transformer.layers = before

    def layers_for(self, shapes: tuple[Shape, ...]) -> nn.ModuleList | None:
        """What stands for the blocks in a step of these micro-batches; None: the blocks themselves."""
        if self.no_room or not fits_graphs(shapes):
            return None
        reason, state = self.look()
        if reason:
            self.say_without(reason)
            return None
        if state != self.state:  # weights were moved, merged or loaded anew: the graphs read the old memory
            self.forget()
            self.state = state
        if shapes not in self.known and len(self.known) == SHAPES:
            self.say_without(f"more than {SHAPES} shapes of batches")
        elif shapes not in self.known:
            outer = sys.exception()
            try:
                self.known[shapes] = self.record(shapes)
            except RuntimeError as error:
                chain = cleared_chain(error, outer)  # frames held what has been recorded so far
                failed = [other for other, found in self.known.items() if found is None]
                self.forget()  # the others are recorded anew, or there would be two pools for good
                if not isinstance(first := chain[-1], Exception):
                    raise first from None  # Ctrl-C
                self.no_room = any(isinstance(each, torch.OutOfMemoryError) for each in chain)
                self.known = {} if self.no_room else dict.fromkeys([*failed, shapes])
                self.say_without("no room for them" if self.no_room else (f"{first}" or repr(first)).splitlines()[0])
        return self.known.get(shapes)

    def say_without(self, reason: str) -> None:
        """Say once why a step runs without graphs."""
        if reason not in self.said:
            self.said.add(reason)
            print(f"[NOTE] steps run without CUDA graphs: {reason}")

    def forget(self) -> None:
        """Drop all recordings, and give their memory back."""
        self.known.clear()
        homes, self.homes = list(self.homes.values()), {}
        if homes:
            gc.collect()
        for home in homes:
            home.close()

    def give_up(self) -> bool:
        """The memory ran out: no graphs from now on. False if there was nothing to free."""
        if self.no_room or not self.homes:
            return False
        self.no_room = True
        self.forget()
        self.say_without("no room for them")
        return True

    def remember(self) -> Callable[[], None]:
        """What brings back random states and gradients as they are now."""
        ends = (self.transformer.word_embeddings, self.transformer.final_layernorm, self.model.get_output_embeddings())
        rest = ends if self.trained else [self.model]
        weights = self.trained + [p for part in rest for p in parameters_of(part) if p.requires_grad]
        kept = [None if p.grad is None else p.grad.clone() for p in weights]
        places = {p.device.index for p in weights if p.is_cuda}
        offsets = [(g, g.get_offset()) for g in (torch.cuda.default_generators[index] for index in places)]
        random = torch.get_rng_state()

        def take_back() -> None:
            for weight, grad in zip(weights, kept, strict=True):
                weight.grad = grad
            for generator, offset in offsets:
                generator.set_offset(offset)
            torch.set_rng_state(random)

        return take_back

    def segments(self) -> list[Segment]:
        """The blocks, cut where the GPU changes and around each checkpointed one."""
        runs: list[list[Any]] = []
        places: list[torch.device] = []
        for block in self.transformer.layers:
            place, last = block.input_layernorm.weight.device, runs[-1][-1] if runs else None
            alone = block.gradient_checkpointing or getattr(last, "gradient_checkpointing", False)
            if last is None or alone or places[-1] != place:
                if place in places and places[-1] != place:
                    raise RuntimeError(f"{place} has two stages")  # which need not take turns as they did
                runs.append([])
                places.append(place)
            runs[-1].append(block)
        made: list[Segment] = []
        for place, blocks in zip(places, runs, strict=True):
            if place not in self.homes:
                self.homes[place] = self.make_home(place)
            made.append(Segment(blocks, self.homes[place], first=not made))
        return made

    def record(self, shapes: tuple[Shape, ...]) -> nn.ModuleList:
        """Record all segments for all micro-batches, in the order in which a step runs them."""
        segments = self.segments()
        ahead = list(zip(segments, [None, *segments], strict=False))
        back = list(zip(reversed(segments), [None, *reversed(segments)], strict=False))
        offsets = {home: home.generator.get_offset() for home in self.homes.values()}
        try:
            for shape in dict.fromkeys(shapes):
                for segment in {segment.home: segment for segment in segments}.values():
                    segment.rehearse(shape, self.beside(shape))
            for shape in shapes:
                like = self.beside(shape)
                for segment, before in ahead:
                    segment.record_forward(shape, like, before)
            for number in reversed(range(len(shapes))):
                for segment, behind in back:
                    segment.record_backward(number, behind)
            for segment in segments:
                segment.let_go()
        finally:
            for home, offset in offsets.items():
                home.settle()
                home.generator.set_offset(offset)
        return nn.ModuleList(segments)

    def beside(self, shape: Shape) -> list[Tensor]:
        """Bias, cos and sin of a micro-batch, as tensors of the right shapes that take no memory."""
        rows, length = shape
        dtype = self.transformer.layers[0].input_layernorm.weight.dtype
        angles = (rows, length, 1, 1, 2, self.transformer.config.head_dim // 4)
        sizes = (rows, 1, length, length), angles, angles
        return [torch.empty(size, dtype=dtype, device="meta") for size in sizes]


def fits_graphs(shapes: Sequence[Shape]) -> bool:
    """Are all micro-batches of these shapes [B, L] small enough for graphs to be worth it?"""
    return all(rows * length <= GRAPH_TOKENS for rows, length in shapes)
