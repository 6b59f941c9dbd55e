"""A host made slow on purpose is seen by the measurement, changes the plan, and the plan is the best of those timed.

The machine is made up: two T4s whose work is queued by a real `run_step` of a tiny model on the CPU. Its clock moves
when the host waits before a block, and each GPU does one thing at a time, behind what it needs.
"""

from dataclasses import replace

import pytest

from benchmarks.slow_host import slow_host, wait_busy
from glmhelpers.cost_model import block_seconds
from glmhelpers.cost_model.gpus import CATALOGUE
from glmhelpers.cost_model.step_time import head_seconds
from glmhelpers.devicemap import plan_device_map
from glmhelpers.devicemap.activation_checkpointing import checkpoint_only
from glmhelpers.training import calibration
from glmhelpers.training.measure import prepare, random_batch
from glmhelpers.training.pipeline import run_step
from glmhelpers.utils.timing import Laps
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration

LAYERS, ROWS, LENGTH = 6, 4, 512
LARGE = ChatGLMConfig(num_layers=LAYERS)
SPECIAL = {"bos_token_id": 4, "eos_token_id": 5, "mask_token_id": 0, "gmask_token_id": 1}
TINY = ChatGLMConfig(
    num_layers=LAYERS, hidden_size=32, inner_hidden_size=64, num_attention_heads=4, vocab_size=100, **SPECIAL
)


class MadeUp:
    """A host and two GPUs: `seconds` of a step under a plan."""

    def __init__(self):
        self.host = 0.0

    def only_host(self, block, kind, seconds):
        self.host += seconds

    def step(self, plan, launch):
        self.host, self.free, self.ready, self.back = 0.0, [0.0] * len(plan.gpus), 0.0, False
        model = prepare(ChatGLMForConditionalGeneration(TINY), plan.checkpointed_layers)
        layers = [block.attention for block in model.get_base_model().transformer.layers]
        homes = {layer: gpu for gpu, blocks in enumerate(plan.blocks) for layer in blocks}
        forward, again, backward = block_seconds(plan.shape, plan.setting, plan.gpus[0])
        head = head_seconds(plan.shape, plan.setting, plan.gpus[0])

        def wait(block, kind, seconds):
            self.host += seconds
            layer = layers.index(block)
            gpu, first = homes[layer], layer == (LAYERS - 1 if kind == "backward" else 0)
            length = backward if kind == "backward" else again if self.back else forward
            if kind == "forward" and not self.back and layer == LAYERS - 1:
                length += head
            if first and not (self.back and kind == "forward"):
                self.ready = 0.0  # a micro-batch begins
            self.free[gpu] = self.ready = max(self.host, self.free[gpu], self.ready) + length

        def turn(loss):
            self.back = True
            self.free = [max(self.free)] * len(self.free)
            loss.backward()

        with slow_host(launch, wait):
            run_step(model, random_batch(TINY, ROWS, 8), plan.micro_batches, backward=turn)
        return max(self.host, *self.free)


def measured(launch, monkeypatch):
    """A T4 of a machine whose host was measured by the made-up clock."""
    machine = MadeUp()
    with monkeypatch.context() as patch, slow_host(launch, machine.only_host):
        patch.setattr(calibration, "STEPS", 0.0)
        patch.setattr(calibration.time, "perf_counter", lambda: machine.host)
        rates = calibration.host_launches(["cpu"], TINY, Laps())
    assert rates == pytest.approx(
        {
            "launch_forward": launch * LAYERS / (LAYERS + 1),  # nothing is waited for in front of the head
            "launch_again": launch,
            "launch_backward": launch,
            "launch_step": 0.0,
        },
    )
    return replace(CATALOGUE["T4"], **rates)


def test_a_host_that_is_disturbed_most_of_the_time_is_measured_as_if_it_were_not(monkeypatch):
    """In bursts that are longer than a step: of 20 steps and their first, 13 take three times as long."""
    machine, launch, steps = MadeUp(), 1e-3, []

    def wait(block, kind, seconds):
        machine.host += seconds * (3 if len(steps) % 10 < 6 else 1)

    def counted(*arguments, **keywords):
        steps.append(run_step(*arguments, **keywords))

    blocks = calibration.HOST_BLOCKS * calibration.PARTS
    monkeypatch.setattr(calibration, "STEPS", 10 * 2 * 5 * blocks * launch)
    monkeypatch.setattr(calibration, "run_step", counted)
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: machine.host)
    with slow_host(launch, wait):
        rates = calibration.host_launches(["cpu"], TINY, Laps())
    assert 20 <= len(steps) <= 30
    assert [rates[f"launch_{name}"] for name in ("again", "backward")] == pytest.approx([launch, launch])


def test_a_slower_host_changes_the_plan_and_the_plan_is_the_best_of_those_timed(monkeypatch):
    chosen = []
    for launch in (1e-5, 0.3):
        card = measured(launch, monkeypatch)
        plan = plan_device_map(LARGE, [card] * 2, ROWS, LENGTH)
        times = {
            (count, parts): MadeUp().step(
                plan_device_map(LARGE, [card] * count, ROWS, LENGTH, micro_batches=parts), launch
            )
            for count in (1, 2)
            for parts in (1, 2, 4)
        }
        assert MadeUp().step(plan, launch) <= 1.02 * min(times.values()), times
        chosen.append(plan.micro_batches)
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] > chosen[-1] == 1


@pytest.mark.parametrize("checkpointed", [[], range(LAYERS)])
def test_every_block_waits_in_every_pass_and_afterwards_none(checkpointed):
    model = prepare(ChatGLMForConditionalGeneration(TINY), [])
    checkpoint_only(model, checkpointed)
    batch, waits = random_batch(TINY, 2, 8), []
    with slow_host(1.0, lambda block, kind, seconds: waits.append(kind)):
        run_step(model, batch, 2)
    runs = 2 if checkpointed else 1
    assert (waits.count("forward"), waits.count("backward")) == (2 * LAYERS * runs, 2 * LAYERS)
    run_step(model, batch, 2)
    assert len(waits) == 2 * LAYERS * (runs + 1)


def test_a_busy_wait_lasts_as_long_as_it_is_told(monkeypatch):
    looks = iter([0.0, 0.5, 0.9, 1.1])
    monkeypatch.setattr("benchmarks.slow_host.time.perf_counter", lambda: next(looks))
    wait_busy(1.0)
    assert next(looks, None) is None
