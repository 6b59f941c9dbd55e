"""What is measured on a machine is kept, believed on that machine only, and changes its plans."""

import json
from dataclasses import replace

import pytest
import torch

from glmhelpers.cost_model import kept_rates as kept
from glmhelpers.cost_model.gpus import CATALOGUE, find_gpus, gpus_here, known_gpu, one_host
from glmhelpers.cost_model.sizes import Setting, Shape
from glmhelpers.cost_model.step_time import block_seconds
from glmhelpers.devicemap import plan_device_map
from glmhelpers.lora.attach import attach_lora
from glmhelpers.training import calibration, measure_machine
from glmhelpers.utils.timing import Laps
from tests.helpers.reference import CHECKPOINT
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration

T4 = CATALOGUE["T4"]
RATES = {"matrix_share": 0.5, "launch_forward": 2e-3, "context": 200 * 2**20}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_measured_rates_come_before_the_catalogue():
    assert known_gpu("Tesla T4", T4.memory) == T4
    kept.keep_rates({"Tesla T4": RATES})
    assert known_gpu("Tesla T4", T4.memory) == replace(T4, **RATES)
    assert known_gpu("NVIDIA L4", CATALOGUE["L4"].memory) == CATALOGUE["L4"]
    kept.keep_rates({})
    assert known_gpu("Tesla T4", T4.memory) == T4


def test_rates_of_another_machine_are_not_believed_and_stay(monkeypatch):
    kept.keep_rates({"Tesla T4": RATES})
    with monkeypatch.context() as other:
        other.setattr(kept, "machine_key", lambda: "another")
        assert kept.kept_rates() == {}
        kept.keep_rates({"Tesla T4": {"link": 1e9}})
        assert kept.kept_rates() == {"Tesla T4": {"link": 1e9}}
    assert kept.kept_rates() == {"Tesla T4": RATES}


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        '{"x": 1',
        {"Tesla T4": {"matrix_share": -1}},
        {"Tesla T4": {"memory_share": 1e6}},
        {"Tesla T4": {"memory": 5}},
        {"Tesla T4": {"link": "a"}},
        7,
    ],
)
def test_a_damaged_file_counts_as_none(damage):
    path = kept.kept_file()
    path.parent.mkdir(parents=True)
    path.write_text(damage if isinstance(damage, str) else json.dumps({kept.machine_key(): damage}))
    assert kept.kept_rates() == {}
    kept.keep_rates({"Tesla T4": RATES})
    assert kept.kept_rates() == {"Tesla T4": RATES}


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    kept.keep_rates({"Tesla T4": RATES})
    assert kept.kept_rates() == {}


def test_a_slow_host_makes_fewer_parts_and_then_one_gpu():
    """Where the host needs longer to start a block than the GPU to compute it, pieces cost more than they save."""
    config, counts = ChatGLMConfig(), []
    for launch in (1e-5, 5e-4, 5e-2):
        slow = replace(T4, launch_forward=launch, launch_again=launch, launch_backward=launch)
        plan = plan_device_map(config, [slow] * 2, 16, 56)
        counts.append(plan.micro_batches)
        best = min(
            plan_device_map(config, [slow] * count, 16, 56, micro_batches=parts).seconds
            for count in (1, 2)
            for parts in (1, 2, 4, 8, 16)
        )
        assert plan.seconds <= best * (1 + 1e-9)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] == 1


def test_what_a_step_needs_once_is_added_once_and_changes_no_plan():
    config, plans = ChatGLMConfig(num_layers=4), []
    for once in (0.0, 0.01):
        plans.append(plan_device_map(config, [replace(T4, launch_step=once)] * 2, 4, 256))
    free, added = plans
    assert (added.device_map, added.micro_batches) == (free.device_map, free.micro_batches)
    assert added.seconds == pytest.approx(free.seconds + 0.01)
    assert max(task.end for task in added.schedule) == pytest.approx(added.seconds)


def test_one_host_serves_all_cards():
    fast, slow = T4, replace(CATALOGUE["L4"], launch_backward=1e-3)
    assert {card.launch_backward for card in one_host([fast, slow])} == {1e-3}
    assert one_host([fast, fast]) == [fast, fast]


def test_the_host_is_measured_by_a_real_step(monkeypatch):
    monkeypatch.setattr(calibration, "STEPS", 0.0)
    laps = Laps()
    found = calibration.host_launches(["cpu"], ChatGLMConfig.from_pretrained(CHECKPOINT), laps)
    assert set(found) == {"launch_forward", "launch_again", "launch_backward", "launch_step"}
    assert all(0 < seconds < 1 for seconds in found.values())
    assert list(laps.parts) == ["model for the host", "first steps", "steps"]


@pytest.mark.parametrize("layers", [8, 28])
def test_clipping_goes_through_the_adapters_of_the_whole_model(layers, monkeypatch):
    config = ChatGLMConfig.from_pretrained(CHECKPOINT, num_layers=layers)
    monkeypatch.setattr(calibration, "STEPS", 0.0)
    clip, seen = torch.nn.utils.clip_grad_norm_, []

    def counted(parameters, norm):
        seen.append([parameter.grad.shape for parameter in parameters])
        return clip(parameters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", counted)
    calibration.host_launches(["cpu"], config, Laps())
    whole = attach_lora(ChatGLMForConditionalGeneration(config))
    shapes = sorted(parameter.shape for parameter in whole.parameters() if parameter.requires_grad)
    assert len(seen) >= 2
    assert all(sorted(step) == shapes for step in seen)


def test_every_block_runs_and_those_of_a_device_share_their_weights():
    model = calibration.random_blocks(["cpu"], ChatGLMConfig.from_pretrained(CHECKPOINT), 5)
    ran = []
    for layer, block in enumerate(model.get_base_model().transformer.layers):
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    calibration.run_step(model, calibration.random_batch(model.config, 2, 16), 2)
    assert ran == 2 * [0, 1, 2, 3, 4]
    frozen = {p.data_ptr() for name, p in model.named_parameters() if "dense_h_to_4h.weight" in name}
    trained = {p.data_ptr() for name, p in model.named_parameters() if p.requires_grad}
    assert (len(frozen), len(trained)) == (1, 2 * 5)


@pytest.mark.parametrize(("attention", "memory"), [(0.1, 0.6), (0.25, 1.05), (0.03, 0.3)])
def test_two_passes_tell_two_shares(attention, memory):
    """What the time model gives for known shares leads back to them."""
    card = replace(T4, matrix_share=0.5, attention_share=attention, memory_share=memory)
    setting = Setting(batch_size=calibration.ROWS, seq_length=calibration.LENGTH)
    forward, _, backward = block_seconds(Shape.of(ChatGLMConfig()), setting, card)
    found = calibration.shares_of(forward, backward, replace(T4, matrix_share=0.5), ChatGLMConfig())
    assert found == pytest.approx({"attention_share": attention, "memory_share": memory})


def test_passes_that_contradict_each_other_keep_their_sum():
    config, setting = ChatGLMConfig(), Setting(batch_size=calibration.ROWS, seq_length=calibration.LENGTH)
    forward, _, backward = block_seconds(Shape.of(config), setting, T4)
    found = calibration.shares_of(2 * forward, 0.9 * backward, T4, config)
    ahead, _, back = block_seconds(Shape.of(config), setting, replace(T4, **found))
    assert ahead + back == pytest.approx(2 * forward + 0.9 * backward)
    assert min(found.values()) > 0


def test_passes_faster_than_their_products_are_not_believed():
    found = calibration.shares_of(1e-5, 1e-5, T4, ChatGLMConfig())
    assert found == pytest.approx({"attention_share": T4.attention_share, "memory_share": T4.memory_share})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_measured_and_here_says_so():
    found = measure_machine()
    assert found.gpus == gpus_here() == []
    assert str(found) == "no GPU: nothing to measure"
    assert not kept.kept_file().exists()
    with pytest.raises(ValueError, match='gpus="here"'):
        find_gpus("here")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_measured_once_and_plans_count_with_it():
    first = measure_machine(refresh=True)
    assert set(kept.kept_rates()) == {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    again = measure_machine()
    assert again.gpus == first.gpus
    for gpu in first.gpus:
        assert 0.02 < gpu.matrix_share < 1.1
        assert 0.2 < gpu.memory_share < 1.2
        assert 1e-5 < gpu.launch_forward < 1e-2
    assert first.notes == ()
    assert sum(first.parts.values()) == pytest.approx(first.seconds, abs=0.1)
    assert again.parts == {}
    assert list(plan_device_map(ChatGLMConfig(), "here", 1, 64).gpus) == one_host(first.gpus)
