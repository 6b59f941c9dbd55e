"""Where tensors have to be for a model that is split: the first device, the head's device, a stream and graphs on each.

labels, ids (CPU) --place_part()--> first device ... head's device        copies that make nobody wait
default stream    --own_streams()-> one side stream a GPU, or several     so that other people's work holds up nothing
the same kernels  --record()-----> a CUDA graph                           over memory that all graphs of a GPU share
"""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


def walk(module: nn.Module) -> Iterator[nn.Module]:
    """Every module in it once, as `modules()` in a fraction of the time: each step does it. Their order is another."""
    found, known = [module], {module}
    for each in found:
        for child in each._modules.values():
            if child is not None and child not in known:
                known.add(child)
                found.append(child)
    return iter(found)


def parameters_of(module: nn.Module) -> Iterator[nn.Parameter]:
    """The same for `parameters()`; each once here, too, for gradients are summed up and scaled by it."""
    found = (weight for each in walk(module) for weight in each._parameters.values() if weight is not None)
    return iter(dict.fromkeys(found))


@cache
def _stream(device: torch.device, lane: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def side_stream(device: torch.device, lane: int = 0) -> torch.cuda.Stream:
    """One stream beside the default one for each GPU and lane; each new one costs a workspace of cuBLAS, some 8 MiB."""
    return _stream(device, lane)


class Lanes:
    """Streams on each GPU of a split model, one for each lane; there are none on fewer than two GPUs."""

    def __init__(self, model: nn.Module, count: int):
        found = sorted({p.device for p in parameters_of(model) if p.is_cuda}, key=lambda device: device.index)
        self.devices = found if len(found) > 1 else []
        self.streams = [[side_stream(device, lane) for device in self.devices] for lane in range(count)]
        if count > 1 and self.devices:
            # Gradients of all lanes add up in the streams of one; newer versions of torch warn of it.
            warn = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
            if warn:
                warn(False)

    def enter(self, lane: int) -> None:
        """Queue work in the streams of this lane from now on."""
        self.put(self.streams[lane])

    def put(self, streams: list[torch.cuda.Stream]) -> None:
        """Make these the current streams of all devices."""
        for stream in streams:
            torch.cuda.set_stream(stream)
        if self.devices:
            torch.cuda.set_device(self.devices[0])

    def wait_for(self, streams: list[torch.cuda.Stream]) -> None:
        """All lanes wait for what is queued in these streams now, on each device."""
        for lane in self.streams:
            for mine, other in zip(lane, streams, strict=True):
                mine.wait_stream(other)


@contextmanager
def own_streams(model: nn.Module, lanes: int = 1) -> Iterator[Lanes]:
    """On a model that is split over several GPUs, queue work in streams of its own on each, first in those of lane 0;
    before and behind it, the default streams wait as usual. See the module for why."""
    own = Lanes(model, lanes)
    before = [torch.cuda.current_stream(device) for device in own.devices]
    own.wait_for(before)
    own.enter(0)
    try:
        yield own
    finally:
        for lane in own.streams:
            for default, stream in zip(before, lane, strict=True):
                default.wait_stream(stream)
        own.put(before)


def first_device(model: nn.Module) -> torch.device:
    """Device of the first block, where masks and positions are made."""
    return next(parameter.device for name, parameter in model.named_parameters() if ".layers.0." in name)


def head_device(model: nn.Module) -> torch.device | None:
    """Device of `lm_head`, where the loss is made; None for a model without one."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    return None if head is None else head.weight.device


def place_part(model: nn.Module, part: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A micro-batch for the model's forward: labels where the head is, everything else on `device`."""
    homes = dict.fromkeys(("labels", "target_rows"), head_device(model) or device)
    return {key: to_device(value, homes.get(key, device)) for key, value in part.items()}


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy without waiting, if the device is a GPU: from pinned memory, since other memory is staged by the driver."""
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


UNENDED: list[torch.cuda.CUDAGraph] = []
"""Recordings that could not be ended. Torch's allocator of pinned memory asks them for ever whether they last."""


class Recorded:
    """Work on a GPU that `run()` starts again; `make(*fixed())` must use fixed tensors only and return what is kept."""

    def __init__(self, home: "OnDevice", make: Callable[..., Any], fixed: Callable[[], tuple[Tensor, ...]] = tuple):
        self.device, self.graph = home.device, torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.stream(home.stream):
            # Not "global", where another thread that pins memory for the next batch would end the recording.
            self.graph.capture_begin(pool=home.pool, capture_error_mode="thread_local")
            try:
                self.fixed = fixed()
                self.result = make(*self.fixed)
            finally:
                try:
                    self.graph.capture_end()
                except RuntimeError:
                    UNENDED.append(self.graph)
                    raise

    def run(self) -> None:
        """Start it in the current stream of its GPU."""
        with torch.cuda.device(self.device):
            self.graph.replay()


class OnDevice:
    """What the graphs of one GPU share: memory pool, stream to record in, random generator."""

    def __init__(self, device: torch.device):
        self.device, self.pool, self.stream = device, torch.cuda.graph_pool_handle(), side_stream(device)
        self.generator = torch.cuda.default_generators[device.index]
        self.rehearse(self.nothing)
        self.open_pool()

    def open_pool(self) -> None:
        """A pool that lost its last graph cannot be recorded into again: one graph of nothing stays."""
        self.keeper: Recorded | None = Recorded(self, self.nothing)

    def nothing(self) -> None:
        """Some work."""
        torch.zeros(1, device=self.device)

    def record(self, make: Callable[..., Any], fixed: Callable[[], tuple[Tensor, ...]] = tuple) -> Recorded:
        """Record what `make` starts; `fixed` makes tensors in the pool for what will come from outside."""
        collecting = gc.isenabled()
        gc.disable()  # what it finds may be a graph, and none may go while another is recorded
        try:
            return Recorded(self, make, fixed)
        except BaseException:
            self.mend()
            raise
        finally:
            if collecting:
                gc.enable()

    def mend(self) -> None:
        """Where a recording could not be ended, torch goes on as if it lasted: its allocator would never again give
        memory back, record no more into that pool, and (up to 2.11) its generator refuse to draw. End what can be
        ended, and leave the pool to what lies in it; another recording, in a new one, sets the generator right.
        """
        with suppress(RuntimeError):  # it was ended
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
            torch._C._cuda_releasePool(self.device.index, self.pool)
            self.pool = torch.cuda.graph_pool_handle()
        self.open_pool()

    def close(self) -> None:
        """Give the pool's memory back, once all its graphs are gone."""
        self.keeper = None
        self.settle()

    def rehearse(self, make: Callable[[], Any]) -> None:
        """Run it once without recording: libraries set themselves up at a first call."""
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            make()
        self.settle()

    def settle(self) -> None:
        """Wait for the GPU and give back what no tensor holds: recording must not overlap with other work."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def borrow(self, tensor: Tensor) -> Tensor:
        """The same memory as a tensor that does not own it: the pool may give it to what is recorded from now on."""
        where = {"data": (tensor.data_ptr(), False), "shape": (tensor.nbytes,), "typestr": "|u1", "version": 3}
        flat = torch.as_tensor(SimpleNamespace(__cuda_array_interface__=where), device=self.device)
        return flat.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
