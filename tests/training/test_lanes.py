"""Which stream waits for which in a step with lanes: two GPUs of which there is nothing but a log."""

from types import SimpleNamespace

import pytest
import torch

from glmhelpers.devicemap import devices
from glmhelpers.devicemap.devices import own_streams, side_stream
from glmhelpers.training.pipeline import run_step
from tests.helpers.reference import fresh_model
from tests.helpers.tiny_models import lora, the_batch


@pytest.fixture
def log(monkeypatch):
    """What was asked of the streams, in order; a stream is named by its GPU and lane, "d" for the default one."""
    said, current = [], {}

    class Stream(str):
        def wait_stream(self, other):
            said.append(f"{self} waits for {other}")

    def set_stream(stream):
        current[stream[0]] = stream

    gpus = [SimpleNamespace(is_cuda=True, device=torch.device("cuda", index)) for index in (1, 0, 1)]
    for where, name, value in (
        (devices, "parameters_of", lambda model: gpus),
        (devices, "side_stream", lambda device, lane=0: Stream(f"{device.index}{lane}")),
        (torch.cuda, "current_stream", lambda device: current.get(str(device.index), Stream(f"{device.index}d"))),
        (torch.cuda, "set_stream", set_stream),
        (torch.cuda, "set_device", lambda device: None),
    ):
        monkeypatch.setattr(where, name, value)
    return SimpleNamespace(said=said, current=current)


def test_lanes_begin_behind_the_default_streams_and_end_before_them(log):
    with own_streams(None, 2) as own:
        assert log.said == [f"{gpu}{lane} waits for {gpu}d" for lane in range(2) for gpu in range(2)]
        assert log.current == {"0": "00", "1": "10"}
        own.enter(1)
        assert log.current == {"0": "01", "1": "11"}
        log.said.clear()
    assert log.said == [f"{gpu}d waits for {gpu}{lane}" for lane in range(2) for gpu in range(2)]
    assert log.current == {"0": "0d", "1": "1d"}


def test_a_failure_brings_the_default_streams_back(log):
    with pytest.raises(KeyError), own_streams(None, 3):
        raise KeyError
    assert log.current == {"0": "0d", "1": "1d"}


@pytest.mark.parametrize("lanes", [2, 3])
def test_a_micro_batch_goes_back_in_its_own_lane(log, lanes):
    """And what the first backward call made, such as the scale of a GradScaler, is there for all."""
    model, order = lora(fresh_model()).train(), []

    def backward(loss):
        order.append(("B", log.current["0"], log.current["1"]))
        loss.backward()

    block = model.base_model.model.transformer.layers[0]
    with block.register_forward_hook(lambda *_: order.append(("F", log.current["0"], log.current["1"]))):
        run_step(model, the_batch(), 6, in_flight=lanes, backward=backward, device="cpu")
    forward = [("F", f"0{part % lanes}", f"1{part % lanes}") for part in range(6)]
    undone = [("B", *streams) for _, *streams in forward]
    turns = [piece for part in range(lanes, 6) for piece in (undone[part - lanes], forward[part])]
    assert order == [*forward[:lanes], *turns, *undone[-lanes:]]
    between = [text for text in log.said if "d" not in text]
    assert between == [f"{gpu}{lane} waits for {gpu}0" for lane in range(lanes) for gpu in range(2)]


def test_the_first_lane_is_the_one_stream_of_other_steps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    gpu = torch.device("cuda", 77)
    assert side_stream(gpu) is side_stream(gpu, 0)
    assert side_stream(gpu) is not side_stream(gpu, 1)
