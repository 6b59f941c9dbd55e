"""A stage of the model as CUDA graphs: its kernels are recorded once, and started with one call from then on.

    eager       Python: kernel kernel kernel ... some 40 calls a block and pass, about 1 ms for the host
    captured    Python: copy the input in, replay ................ a few calls a *stage* and pass

    one stage, two micro-batches       record    forward 0, forward 1, backward 1, backward 0      (once)
                                       replay    the same order in every step

A graph reads and writes the same memory each time. So its inputs are copied into fixed tensors, and each micro-batch in
flight has graphs of its own, over a memory pool that all of a GPU's graphs share: what the two passes of one shape hold
is free again when the step ends, so that another shape may use it. That is why the order of recording and of replaying
must be the same; it is checked. Batches are padded to a few lengths (`pad_part`), each recorded when first met.

Blocks that are not checkpointed and follow each other on one GPU are one pair of graphs. A checkpointed block is a
pair by itself: its forward graph keeps nothing, its backward graph runs the block again, from the random state of the
forward one. Random numbers continue where the generator stands, as without graphs: dropout is the same to the bit, and
recording leaves the generator as it was, so a run that goes on after a kill draws what an unbroken one draws.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from glmhelpers.utils.types import Model

SHAPES = 24
"""Shapes that are recorded at most; further ones run without graphs."""

Shape = tuple[int, int]


class Recorded:
    """Work on a GPU that `run()` starts again; `make` must use fixed tensors only and return what is to be kept."""

    def __init__(self, make: Callable[[], Any], device: torch.device, pool: Any, stream: torch.cuda.Stream):
        self.device, self.graph = device, torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.stream(stream):
            self.graph.capture_begin(pool=pool)
            try:
                self.result = make()
            finally:
                self.graph.capture_end()

    def run(self) -> None:
        """Start it in the current stream of its GPU."""
        with torch.cuda.device(self.device):
            self.graph.replay()


class OnDevice:
    """What the graphs of one GPU share: memory pool, stream to record in, random generator."""

    def __init__(self, device: torch.device):
        self.device, self.pool = device, torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.generator = torch.cuda.default_generators[device.index]

    def record(self, make: Callable[[], Any]) -> Recorded:
        """Record what `make` starts."""
        return Recorded(make, self.device, self.pool, self.stream)

    def rehearse(self, make: Callable[[], Any]) -> None:
        """Run it once without recording: libraries set themselves up at a first call."""
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            make()


@dataclass
class Passes:
    """One segment for one micro-batch: fixed tensors, the two recordings, and where its random numbers began."""

    hidden: Tensor
    others: tuple[Tensor, ...]
    forward: Any = None
    backward: Any = None
    output: Tensor = field(init=False)
    slope: Tensor = field(init=False)
    began: int = 0


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

    def prepare(self, shape: Shape, like: Sequence[Tensor]) -> Passes:
        """Fixed tensors for a micro-batch of this shape [B, L]; `like`: bias, cos and sin to copy shapes from."""
        norm = cast(Tensor, self.input_layernorm.weight)
        hidden = torch.zeros(*shape, norm.shape[0], dtype=norm.dtype, device=norm.device)
        return Passes(hidden.requires_grad_(not self.first), tuple(x.to(norm.device).clone() for x in like))

    def slopes(self, passes: Passes, output: Tensor, slope: Tensor) -> tuple[Tensor | None, Tensor]:
        """Gradients of the segment's input (None for the first), and of what is trained, in one flat tensor."""
        inputs = [*([] if self.first else [passes.hidden]), *self.trained]
        found = list(torch.autograd.grad(output, inputs, slope))
        to_input = None if self.first else found.pop(0)
        return to_input, torch.cat([grad.reshape(-1) for grad in found])

    def record_forward(self, passes: Passes) -> None:
        """Record the forward pass; for a checkpointed block without what autograd would keep."""

        def rehearsal() -> None:
            with torch.enable_grad():
                output = self.eager(passes.hidden, passes.others, 1)
                torch.autograd.grad(output, [p for p in self.blocks[0].parameters() if p.requires_grad], output)

        def make() -> Tensor:
            with torch.set_grad_enabled(not self.again):
                return self.eager(passes.hidden, passes.others)

        self.home.rehearse(rehearsal)
        passes.forward = self.home.record(make)
        passes.output = passes.forward.result.detach()

    def record_backward(self, passes: Passes) -> None:
        """Record the backward pass, which for a checkpointed block begins with the forward one."""
        passes.slope = torch.zeros_like(passes.output)

        def make() -> tuple[Tensor | None, Tensor]:
            with torch.enable_grad():
                output = self.eager(passes.hidden, passes.others) if self.again else passes.forward.result
            return self.slopes(passes, output, passes.slope)

        passes.backward = self.home.record(make)
        passes.forward.result = None  # its graph of gradients is used up; the memory goes back to the pool

    def forward(self, hidden_states: Tensor, *others: Tensor, past_key_values: Any = None) -> tuple[Tensor, None]:
        """As a block: [B, L, H] -> [B, L, H] and no weights. Each call is the next micro-batch of the step."""
        passes, self.number = self.passes[self.number], self.number + 1
        return _Replay.apply(self, passes, hidden_states, others, *self.trained), None


class _Replay(torch.autograd.Function):
    """A segment's two graphs as one step of autograd."""

    @staticmethod
    def forward(ctx, segment: Segment, passes: Passes, hidden: Tensor, others: tuple[Tensor, ...], *trained: Tensor):
        ctx.segment, ctx.passes = segment, passes
        for fixed, given in zip((passes.hidden, *passes.others), (hidden, *others), strict=True):
            fixed.detach().copy_(given)
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
        passes.slope.copy_(slope)
        generator = segment.home.generator
        now = generator.get_offset()
        if segment.again:
            generator.set_offset(passes.began)
        passes.backward.run()
        generator.set_offset(now)
        to_input, flat = passes.backward.result
        # A copy: `.grad` would else be the graph's own memory, which the next step writes to.
        parts = flat.clone().split([p.numel() for p in segment.trained])
        grads = [part.view_as(p) for part, p in zip(parts, segment.trained, strict=True)]
        return None, None, to_input, None, *grads


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
        self.known: dict[tuple[Shape, ...], nn.ModuleList] = {}
        self.homes: dict[torch.device, Any] = {}
        self.state: tuple = ()
        self.said: set[str] = set()

    def look(self) -> tuple[str, tuple]:
        """Why the blocks cannot be recorded as they are now ("" if they can), and what recordings of them depend on.

        Before each step, so in one walk over their modules.
        """
        if getattr(self.transformer.config, "pre_seq_len", None) or getattr(self.model, "prompt_encoder", None):
            return "a learnt prefix", ()
        if self.transformer.config._attn_implementation != "sdpa":
            return "attention is not sdpa", ()
        state: list[Any] = [self.transformer.training]
        for block in self.transformer.layers:
            trained = False
            state.append(bool(block.gradient_checkpointing))
            for module in block.modules():
                kept = vars(module)
                if kept["_forward_hooks"] or kept["_forward_pre_hooks"] or "_hf_hook" in kept:
                    return f"a hook on {_name_in(block, module) or 'a block'}", ()
                if "quant_state" in kept or type(module).__module__.startswith("bitsandbytes"):
                    return f"{_name_in(block, module)} is a layer of bitsandbytes", ()
                for weight in kept["_parameters"].values():
                    if weight is None:
                        continue
                    if self.make_home is OnDevice and not weight.is_cuda:
                        return "a block is on the CPU", ()
                    trained |= weight.requires_grad
                    state.append(weight.data_ptr())
            if not trained:
                return "a block without anything to train", ()
        return "", tuple(state)

    @contextmanager
    def step(self, shapes: Sequence[Shape]) -> Iterator[bool]:
        """For the length of one step over micro-batches of these shapes [B, L], the blocks are graphs. Yields whether
        they are; why not is said once."""
        layers = self.layers_for(tuple(shapes))
        if layers is None:
            yield False
            return
        for segment in cast(Any, layers):
            segment.number = 0
        before, self.transformer.layers = self.transformer.layers, layers
        try:
            yield True
        finally:
            self.transformer.layers = before

    def layers_for(self, shapes: tuple[Shape, ...]) -> nn.ModuleList | None:
        """What stands for the blocks in a step of these micro-batches."""
        reason, state = self.look()
        if reason:
            self.say_without(reason)
            return None
        if state != self.state:  # weights were moved, merged or loaded anew: the graphs read the old memory
            self.known, self.state = {}, state
        if shapes not in self.known:
            if len(self.known) == SHAPES:
                self.say_without(f"more than {SHAPES} shapes of batches")
                return None
            try:
                self.known[shapes] = self.record(shapes)
            except (RuntimeError, NotImplementedError) as error:
                self.say_without(str(error).splitlines()[0])
                return None
        return self.known[shapes]

    def say_without(self, reason: str) -> None:
        """Say once why a step runs without graphs."""
        if reason not in self.said:
            self.said.add(reason)
            print(f"[NOTE] steps run without CUDA graphs: {reason}")

    def segments(self) -> list[Segment]:
        """The blocks, cut where the GPU changes and around each checkpointed one."""
        runs: list[list[Any]] = []
        for block in self.transformer.layers:
            place, last = block.input_layernorm.weight.device, runs[-1][-1] if runs else None
            alone = block.gradient_checkpointing or getattr(last, "gradient_checkpointing", False)
            if last is None or alone or last.input_layernorm.weight.device != place:
                runs.append([])
            runs[-1].append(block)
        made: list[Segment] = []
        for blocks in runs:
            place = blocks[0].input_layernorm.weight.device
            self.homes.setdefault(place, self.make_home(place))
            made.append(Segment(blocks, self.homes[place], first=not made))
        return made

    def record(self, shapes: tuple[Shape, ...]) -> nn.ModuleList:
        """Record all segments for all micro-batches, in the order in which a step runs them."""
        segments = self.segments()
        offsets = {home.device: home.generator.get_offset() for home in self.homes.values()}
        self.synchronize()
        try:
            for shape in shapes:
                like = self.beside(shape)
                for segment in segments:
                    segment.passes.append(segment.prepare(shape, like))
                    segment.record_forward(segment.passes[-1])
            for number in reversed(range(len(shapes))):
                for segment in reversed(segments):
                    segment.record_backward(segment.passes[number])
        finally:
            self.synchronize()
            for home in self.homes.values():
                home.generator.set_offset(offsets[home.device])
        return nn.ModuleList(segments)

    def beside(self, shape: Shape) -> list[Tensor]:
        """Bias, cos and sin of a micro-batch, as tensors of the right shapes."""
        norm = self.transformer.layers[0].input_layernorm.weight
        rows, length = shape
        positions = torch.zeros(rows, 2, length, dtype=torch.int64, device=norm.device)
        bias = torch.zeros(rows, 1, length, length, dtype=norm.dtype, device=norm.device)
        return [bias, *self.transformer.rotary_emb.to(norm.device)(positions, norm.dtype)]

    def synchronize(self) -> None:
        """Wait for all GPUs: recording must not overlap with other work on their memory."""
        for home in self.homes.values():
            if home.device.type == "cuda":
                torch.cuda.synchronize(home.device)
