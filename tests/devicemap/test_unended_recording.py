"""A recording that fails half way: the GPU's memory and random numbers go on as if it had not been tried."""

import pytest
import torch

from glmhelpers.devicemap.devices import OnDevice


def draws_elsewhere(device):
    """In a stream that is not recorded, as what was made in another stream does."""
    with torch.cuda.stream(torch.cuda.Stream(device)):
        torch.rand(1, device=device)


def never_comes_back(device):
    """Work in a stream that was let in and does not meet the recorded one again."""
    other = torch.cuda.Stream(device)
    other.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(other):
        torch.rand(1, device=device)


def waits(device):
    """The host asks the GPU for a number."""
    torch.zeros(1, device=device).item()


def breaks(device):
    """Something else."""
    torch.rand(1, device=device)
    raise ValueError("its own")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("fault", [draws_elsewhere, never_comes_back, waits, breaks])
def test_a_recording_that_fails_leaves_a_gpu_that_draws_and_records(fault):
    device = torch.device("cuda", 0)
    home = OnDevice(device)
    with pytest.raises((RuntimeError, ValueError)):
        home.record(lambda: fault(device))
    torch.cuda.synchronize()
    assert torch.rand(4, device=device).unique().numel() == 4
    recorded = home.record(lambda: torch.rand(1000, device=device))
    recorded.run()
    first = recorded.result.clone()
    recorded.run()
    assert not torch.equal(first, recorded.result)
    assert torch.rand(4, device=device).unique().numel() == 4
    del recorded
    home.close()
