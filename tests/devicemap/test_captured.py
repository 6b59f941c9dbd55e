"""Stages as recordings against the same step without them: on the CPU with a stand-in for CUDA graphs, and on GPUs."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig

from glmhelpers.cost_model.sizes import padded_length
from glmhelpers.devicemap.activation_checkpointing import checkpoint_only
from glmhelpers.devicemap.captured import SHAPES, Captured
from glmhelpers.training.pipeline import pad_part, run_step, split_batch
from tests.helpers.graph_home import Home, Never
from tests.helpers.reference import fresh_model
from tests.helpers.tiny_models import lora, right_padded, the_batch, training_rows


def padded_batch():
    """A batch whose length is one of those that are recorded: dropout draws as many numbers as without recordings."""
    (part,) = split_batch(the_batch(), 1)
    padded = pad_part(part, padded_length(part["labels"].shape[1]))
    padded.pop("target_rows")
    return padded


def steps(captured, parts, layers, dropout, place=None, count=2, batch=None):
    model = lora(fresh_model(**(place or {})), dropout).train()
    checkpoint_only(model, layers)
    torch.manual_seed(5)
    found, recorder = [], captured and captured(model)
    for _ in range(count):
        model.zero_grad()
        loss = run_step(model, batch or padded_batch(), parts, captured=recorder)
        found.append(
            (loss.item(), {name: p.grad.cpu().clone() for name, p in model.named_parameters() if p.requires_grad})
        )
    return found, recorder


def assert_same(found, want, exact=True):
    for (loss, gradients), (other_loss, others) in zip(found, want, strict=True):
        assert loss == other_loss if exact else loss == pytest.approx(other_loss, rel=1e-5)
        for name, gradient in others.items():
            assert gradient.abs().max() > 0
            if exact:
                assert torch.equal(gradients[name], gradient), name
            else:
                torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("layers", [(), range(4), (1, 2), (3,)])
def test_a_recorded_step_is_the_step(parts, layers):
    found, recorder = steps(lambda model: Captured(model, Home), parts, layers, 0.3)
    assert_same(found, steps(None, parts, layers, 0.3)[0])
    assert found[0][0] != found[1][0], "dropout was drawn once for all steps"
    segments = 1 + sum(layer in layers for layer in range(4)) + (layers == (1, 2)) - (len(layers) == 4)
    (home,) = recorder.homes.values()
    assert home.count == 2 * segments * parts, "each is recorded once"


def test_padding_changes_no_loss_and_no_gradient():
    assert padded_length(the_batch()["labels"].shape[1]) > the_batch()["labels"].shape[1]
    found, _ = steps(lambda model: Captured(model, Home), 2, (), 0.0, batch=the_batch())
    assert_same(found, steps(None, 2, (), 0.0, batch=the_batch())[0], exact=False)


def test_lengths_are_few_and_long_enough():
    lengths = [padded_length(length) for length in range(1, 2049)]
    assert all(padded >= length and padded % 16 == 0 for length, padded in enumerate(lengths, 1))
    assert max(padded / length for length, padded in enumerate(lengths, 1) if length > 64) < 1.35
    assert len(set(lengths)) <= SHAPES


def test_gradients_add_up_over_two_steps():
    model = lora(fresh_model()).train()
    recorder = Captured(model, Home)
    run_step(model, padded_batch(), 2, captured=recorder)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    run_step(model, padded_batch(), 2, captured=recorder)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, 2 * once[name])


def test_what_cannot_be_recorded_runs_without_and_says_so_once(capsys):
    model = lora(fresh_model()).train()
    block = model.get_base_model().transformer.layers[1]
    block.mlp.register_forward_hook(lambda *_: None)
    recorder = Captured(model, Home)
    for _ in range(2):
        run_step(model, padded_batch(), captured=recorder)
    assert capsys.readouterr().out == "[NOTE] steps run without CUDA graphs: a hook on mlp\n"
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_moved_weights_are_recorded_anew():
    model = lora(fresh_model()).train()
    recorder = Captured(model, Home)
    first = run_step(model, padded_batch(), captured=recorder)
    for p in model.parameters():
        p.data = p.data.clone()
    with torch.no_grad():
        model.get_base_model().transformer.layers[0].mlp.dense_h_to_4h.bias.add_(0.5)
    again = run_step(model, padded_batch(), captured=recorder)
    assert again != first
    assert again == run_step(model, padded_batch())


def lengths():
    """Batches of some lengths that take turns."""
    ids, mask, labels = right_padded(training_rows() * 2)
    more = [0, 40, 17, 40, 0, 17, 40]
    wide = {"input_ids": (ids, 3), "attention_mask": (mask, 0), "labels": (labels, -100)}
    return [{name: F.pad(x, (0, n), value=fill) for name, (x, fill) in wide.items()} for n in more]


def trained_on(model, batches, captured, between=lambda number: None, backward=torch.Tensor.backward):
    """Loss and gradients of each step, from the same seed."""
    torch.manual_seed(5)
    found = []
    for number, batch in enumerate(batches):
        between(number)
        model.zero_grad()
        loss = run_step(model, batch, 2, captured=captured, backward=backward)
        found.append((loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}))
    return found


@pytest.mark.parametrize("layers", [(), range(4), (1, 2)])
def test_lengths_take_turns_over_one_memory(layers):
    found = []
    for kind in (Never, lambda model: Captured(model, Home)):
        model = lora(fresh_model(), 0.2).train()
        checkpoint_only(model, layers)
        captured = kind(model)
        found.append(trained_on(model, lengths(), captured))
    assert len(captured.known) == 3
    assert_same(found[1], found[0])


def test_what_is_let_go_is_really_let_go():
    """The stand-in can fail: whoever reads what was let go gets NaN."""
    home = Home(torch.device("cpu"))
    kept = torch.ones(2)
    first = home.record(lambda: kept * 2)
    home.borrow(kept)
    second = home.record(lambda: torch.zeros(1))
    first.run()
    assert not kept.isnan().any()
    second.run()
    assert kept.isnan().all()


def test_where_one_length_cannot_be_recorded_the_others_still_are(monkeypatch, capsys):
    def record(shapes):
        tried.append(shapes)
        if len(set(tried)) == 2 and shapes != tried[0]:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return recorded(shapes)

    model, tried = lora(fresh_model(), 0.2).train(), []
    want = trained_on(model, lengths(), Never(model))
    captured = Captured(model, Home)
    recorded = captured.record
    monkeypatch.setattr(captured, "record", record)
    assert_same(trained_on(model, lengths(), captured), want)
    first, failed, third = tried[:3]
    assert tried == [first, failed, third, first]
    assert {shapes for shapes, layers in captured.known.items() if layers is None} == {failed}
    said = "[NOTE] steps run without CUDA graphs: CUDA error: operation not permitted when stream is capturing\n"
    assert capsys.readouterr().out == said


def recording_fails(model, fault, monkeypatch):
    """A recorder whose recordings end in this error, and then in another, as one does that cannot be ended."""

    def record(self, make, fixed=tuple):
        try:
            raise fault
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(Home, "record", record)
    return Captured(model, Home)


def test_ctrl_c_while_recording_stops_the_step(monkeypatch):
    model = lora(fresh_model()).train()
    captured = recording_fails(model, KeyboardInterrupt(), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run_step(model, padded_batch(), captured=captured)
    assert not captured.said


@pytest.mark.parametrize(
    ("fault", "said"),
    [(ValueError("the first one\nat length"), "the first one"), (NotImplementedError(), "NotImplementedError()")],
)
def test_the_first_error_is_told_whatever_followed(fault, said, monkeypatch, capsys):
    model = lora(fresh_model()).train()
    captured = recording_fails(model, fault, monkeypatch)
    try:
        raise torch.OutOfMemoryError("of somebody who is mending it now")
    except torch.OutOfMemoryError:
        run_step(model, padded_batch(), captured=captured)
    assert capsys.readouterr().out == f"[NOTE] steps run without CUDA graphs: {said}\n"
    assert list(captured.known.values()) == [None]


@pytest.mark.parametrize(("room", "masked"), [(0, False), (1, True), (3, False), (7, True), (20, False)])
def test_no_room_while_recording_frees_all_and_says_so_once(room, masked, monkeypatch, capsys):
    model = lora(fresh_model(), 0.2).train()
    checkpoint_only(model, (1, 2))
    want = trained_on(model, lengths(), Never(model))
    monkeypatch.setattr(Home, "room", room)
    monkeypatch.setattr(Home, "masked", masked)
    captured = Captured(model, Home)
    assert_same(trained_on(model, lengths(), captured), want)
    assert not captured.known
    assert not captured.homes
    assert capsys.readouterr().out == "[NOTE] steps run without CUDA graphs: no room for them\n"


def test_no_room_for_the_first_thing_of_a_gpu_is_said_once_and_not_tried_again(capsys):
    def home(device):
        tried.append(device)
        raise torch.OutOfMemoryError("CUDA out of memory")

    tried, model = [], lora(fresh_model(), 0.2).train()
    want = trained_on(model, lengths(), Never(model))
    assert_same(trained_on(model, lengths(), Captured(model, home)), want)
    assert len(tried) == 1
    assert capsys.readouterr().out == "[NOTE] steps run without CUDA graphs: no room for them\n"


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_step_that_runs_out_of_memory_is_done_again_without(when, capsys):
    model = lora(fresh_model(), 0.2).train()
    want = trained_on(model, lengths(), Never(model))
    captured, calls = Captured(model, Home), []

    def fail(number):
        if calls.append(number) or len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def backward(loss):
        loss.backward()
        if when == "backward":
            fail(0)

    def before(module, given):
        if when == "forward" and len(given) and torch.is_grad_enabled():
            fail(0)

    norm = model.get_base_model().transformer.final_layernorm
    handle = norm.register_forward_pre_hook(before)
    assert_same(trained_on(model, lengths(), captured, backward=backward), want)
    handle.remove()
    assert not captured.known
    assert "no room" in capsys.readouterr().out


def test_running_out_without_recordings_is_the_callers_affair():
    model = lora(fresh_model()).train()

    def backward(loss):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        run_step(model, padded_batch(), captured=Never(model), backward=backward)


def test_accumulated_gradients_survive_a_step_that_is_done_again():
    model = lora(fresh_model()).train()
    first, second = lengths()[:2]
    for batch in (first, second):
        run_step(model, batch, captured=Never(model))
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    captured, failed = Captured(model, Home), []
    run_step(model, first, captured=captured)

    def backward(loss):
        loss.backward()
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")

    run_step(model, second, captured=captured, backward=backward)
    for name, p in model.named_parameters():
        assert not p.requires_grad or torch.equal(p.grad, want[name]), name


def changes(model):
    """What people do to a model between two steps."""

    def switch(number):
        if number == 2:
            model.add_adapter("other", LoraConfig(r=4, lora_alpha=8, target_modules=["query_key_value"]))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if ".other." in name:
                        parameter.fill_(0.01)
        if number in (2, 4):
            model.set_adapter("other" if number == 2 else "default")

    def dropout(number):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1 * (number % 3)

    def filled(number):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.1)

    def evaluated(number):
        model.eval()
        with torch.no_grad():
            model(**padded_batch())
        model.train()

    def merged(number):
        if number == 3:
            model.merge_adapter()
            model.unmerge_adapter()

    def checkpoints(number):
        checkpoint_only(model, range(number % 3))

    return [switch, dropout, filled, evaluated, merged, checkpoints]


@pytest.mark.parametrize("which", range(6))
def test_what_is_done_between_two_steps_is_seen(which):
    found = []
    for kind in (Never, lambda model: Captured(model, Home)):
        model = lora(fresh_model(), 0.2).train()
        found.append(trained_on(model, [padded_batch()] * 6, kind(model), changes(model)[which]))
    assert_same(found[1], found[0])


def test_long_micro_batches_are_neither_recorded_nor_padded(monkeypatch):
    monkeypatch.setattr("glmhelpers.devicemap.captured.GRAPH_TOKENS", 6 * 16 - 1)
    model = lora(fresh_model(), 0.2).train()
    captured = Captured(model, Home)
    torch.manual_seed(3)
    loss = run_step(model, the_batch(), captured=captured)
    torch.manual_seed(3)
    assert loss == run_step(model, the_batch())
    assert not captured.known


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.mark.gpu
@on_gpu
def test_graphs_of_all_lengths_share_their_memory():
    model = lora(fresh_model(device_map="cuda:0")).train()
    recorder, held = Captured(model), []
    for length in (512, 384, 256, 128, 512):
        ids = torch.randint(10, 1000, (4, length))
        ids[:, 3:5] = torch.tensor([model.config.gmask_token_id, model.config.bos_token_id])
        model.zero_grad()
        run_step(model, {"input_ids": ids, "labels": ids}, captured=recorder)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())
    assert len(recorder.known) == 4
    assert max(held) < 1.3 * held[0]


PARTS = ["transformer.word_embeddings", *(f"transformer.layers.{n}" for n in range(4)), "transformer.final_layernorm"]
HALVES = {name: "cuda:0" if number < 3 else "cuda:1" for number, name in enumerate([*PARTS, "lm_head"])}


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("layers", [(), range(4), (1, 2)])
@pytest.mark.parametrize("gpus", [1, 2])
def test_graphs_on_gpus_are_the_step(parts, layers, gpus):
    if gpus > torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    place = {"device_map": HALVES if gpus == 2 else "cuda:0"}
    found, recorder = steps(Captured, parts, layers, 0.3, place, count=3)
    assert recorder.known
    assert not recorder.said
    assert_same(found, steps(None, parts, layers, 0.3, place, count=3)[0])
