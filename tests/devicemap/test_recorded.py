"""A recording that fails leaves torch as it was: with a made-up CUDA that breaks off as the real one does."""

import gc
from contextlib import nullcontext

import pytest
import torch

from glmhelpers.devicemap import devices


class Torch:
    """What torch keeps of recordings: which one is under way, how many hold the pool, whether the generator is in it."""

    def __init__(self):
        self.under_way, self.holders, self.capturing, self.broken = False, 0, False, False
        self.modes = []

    def end(self, device, pool):
        if not self.under_way:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.under_way = False

    def release(self, device, pool):
        self.holders -= 1


class Graph:
    """As ATen/cuda/CUDAGraph.cpp: what is behind a failing end is not reached."""

    torch: Torch

    def __init__(self):
        self.ended = False

    def capture_begin(self, pool=None, capture_error_mode="global"):
        state = self.torch
        assert not state.under_way, "beginAllocateToPool: already recording to mempool_id"
        assert not gc.isenabled() or not state.modes
        state.under_way, state.capturing, state.holders = True, True, state.holders + 1
        state.modes.append(capture_error_mode)

    def capture_end(self):
        state = self.torch
        if state.broken:
            state.broken = False
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        state.under_way = state.capturing = False
        self.ended = True

    def __del__(self):
        self.torch.holders -= self.ended


@pytest.fixture
def home(monkeypatch):
    state = Torch()
    kind = type("Graph", (Graph,), {"torch": state})
    for name, value in {
        "CUDAGraph": kind,
        "graph_pool_handle": lambda: (0, 1),
        "default_generators": ["the generator"],
        "device": lambda device: nullcontext(),
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", state.end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", state.release, raising=False)
    monkeypatch.setattr(devices, "side_stream", lambda device: "a stream")
    monkeypatch.setattr(devices.OnDevice, "nothing", lambda self: None)
    made = devices.OnDevice(torch.device("cuda", 0))
    made.state = state
    return made


@pytest.mark.parametrize("breaks", [True, False], ids=["its end fails too", "its end goes well"])
def test_a_failed_recording_is_over_and_the_next_one_goes_well(home, breaks):
    def fail():
        home.state.broken = breaks
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RuntimeError) as error:
        home.record(fail)
    assert isinstance(error.value if not breaks else error.value.__context__, torch.OutOfMemoryError)
    del error
    gc.collect()
    assert not home.state.under_way
    assert not home.state.capturing
    assert home.state.holders == 1, "the pool is held by the graph that keeps it open, and by no other"
    assert gc.isenabled()
    good = home.record(lambda x: x + 1, lambda: (torch.ones(1),))
    assert good.result == 2
    assert home.state.holders == 2


def test_a_pool_is_held_from_the_start_and_let_go_at_the_end(home):
    assert home.state.holders == 1
    home.close()
    assert home.state.holders == 0
    assert set(home.state.modes) == {"thread_local"}
