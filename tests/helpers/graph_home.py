"""A stand-in for CUDA graphs on the CPU: a recording runs Python again, and writes where the first run wrote.

What a pool would give to later recordings is filled with NaN whenever one of those runs: whoever reads memory that was
let go too early gets NaN, as on a GPU he would get another tensor's numbers.
"""

import torch

from glmhelpers.devicemap.captured import Captured


class Never(Captured):
    """Pads as with graphs, and records nothing: what a step with graphs is compared with."""

    def __init__(self, model):
        super().__init__(model, Home)

    def layers_for(self, shapes):
        return None


class Generator:
    """The CPU's generator, with states in the place of offsets."""

    def get_offset(self):
        return torch.get_rng_state()

    def set_offset(self, state):
        torch.set_rng_state(state)


class Again:
    """A recording on a CPU."""

    def __init__(self, make, fixed, free):
        self.make, self.fixed, self.free = make, fixed(), free
        self.inputs = self.fixed
        self.result = make(*self.inputs)
        self.places = [x.detach() for x in self.tensors()]

    def tensors(self):
        whole = self.result if isinstance(self.result, tuple) else (self.result,)
        return [x for x in whole if x is not None]

    def run(self):
        for tensor in self.free:
            tensor.fill_(float("nan"))
        self.result = self.make(*self.inputs)
        for place, tensor in zip(self.places, self.tensors(), strict=True):
            place.copy_(tensor.detach())


class Home:
    """`room`: recordings until the memory runs out; `masked`: another error follows, as where a recording has to end."""

    room: int | None = None
    masked = False

    def __init__(self, device):
        self.device, self.generator, self.count, self.free = device, Generator(), 0, []

    def record(self, make, fixed=tuple):
        if self.room is not None and self.count >= self.room:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:
                if self.masked:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.count += 1
        return Again(make, fixed, list(self.free))

    def rehearse(self, make):
        make()

    def borrow(self, tensor):
        self.free.append(tensor.detach())
        return tensor.detach()

    def settle(self):
        pass

    def close(self):
        pass
