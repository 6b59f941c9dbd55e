"""A planned map applied to a model: everything at its place, nothing moved twice, the same numbers as unsplit."""

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from glmhelpers.cost_model.step_memory import predict
from glmhelpers.devicemap.activation_checkpointing import checkpoint_only
from glmhelpers.devicemap.plan import plan_device_map
from glmhelpers.training.measure import parameter_bytes, prepare, random_batch
from glmhelpers.weights.loading import load_model
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration

TINY = Path(__file__).parents[2] / "data" / "tiny-chatglm"


@pytest.fixture
def config():
    return ChatGLMConfig.from_pretrained(TINY)


def tiny_plan(config, embedding="tied"):
    plan = plan_device_map(config, ["256MiB", "256MiB"], 4, 64, "memory", embedding=embedding)
    assert all(plan.blocks), "the tiny plan should use both GPUs"
    return plan


class Moves(TorchDispatchMode):
    """Collects the shapes of tensors that are copied from one device to another."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            if source.device != result.device and source.dim():
                self.seen.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("embedding", ["first", "tied", "cpu"])
def test_plan_puts_every_part_on_its_virtual_gpu(config, embedding):
    plan = tiny_plan(config, embedding)
    # The GPU of the head is the CPU here: moving to "meta" and back would make new parameters and so break the tie.
    devices = {0: "meta", 1: "cpu", "cpu": "cpu"}
    model = ChatGLMForConditionalGeneration(config)
    model.place({name: devices[place] for name, place in plan.device_map.items()})
    modules = dict(model.named_modules())
    for name, place in plan.device_map.items():
        found = {parameter.device.type for parameter in modules[name].parameters()}
        assert found == {devices[place]}, name
    shared = model.lm_head.weight is model.transformer.word_embeddings.weight
    assert shared == (devices[plan.device_map["transformer.word_embeddings"]] == "cpu")


@pytest.mark.parametrize("where", ["first", "last"])
def test_no_tensor_moves_that_need_not(config, where):
    plan = tiny_plan(config, "first" if where == "first" else "tied")
    devices = {0: "cpu", 1: "meta"} if where == "first" else {0: "meta", 1: "cpu"}
    model = ChatGLMForConditionalGeneration(config).eval()
    model.place({name: devices[place] for name, place in plan.device_map.items()})
    ids = random_batch(config, 2, 16)["input_ids"]
    hidden = (2, 16, config.hidden_size)
    if where == "last":
        # Values cannot come back from the meta device: only the way in is counted.
        model.place({name: "meta" for name in plan.device_map if name != "transformer.word_embeddings"})
    with Moves() as moves:
        model(input_ids=ids)
    crossing = [shape for shape in moves.seen if shape == hidden]
    assert len(crossing) == 1, moves.seen
    assert len(moves.seen) <= 6, f"hidden states, mask, cos, sin and perhaps ids and positions: {moves.seen}"


def test_from_pretrained_takes_the_planned_map(config):
    plan = tiny_plan(config)
    places = dict.fromkeys(plan.device_map, "cpu")
    model = ChatGLMForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32, device_map=places)
    expected = predict(config, places, 4, 64, dtype="float32").breakdown[0]
    assert parameter_bytes(model) == {"cpu": expected["weights"] + expected["embedding"]}


def gradients(config, places, *, checkpointed, dropout, seed=0):
    """Loss and LoRA gradients of one step of two micro-batches on the tiny model."""
    torch.manual_seed(seed)
    model = load_model(TINY, device_map=places, dtype=torch.float32, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = prepare(model)
        if not checkpointed:
            model.base_model.model.gradient_checkpointing_disable()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        assert parameter.requires_grad == ("lora_" in name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    torch.manual_seed(seed)
    parts = [random_batch(config, 2, 24) for _ in range(2)]
    loss = sum(model(**part).loss for part in parts)
    loss.backward()
    found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), found


def same(left, right, tolerance):
    assert left[0] == pytest.approx(right[0], rel=tolerance)
    assert left[1].keys() == right[1].keys()
    assert left[1]
    for name, gradient in left[1].items():
        error = (gradient - right[1][name]).abs().max()
        assert error <= tolerance * right[1][name].abs().max(), name


def half_and_half(config, device):
    names = tiny_plan(config).device_map
    return {name: device if place == 0 else "cpu" for name, place in names.items()}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_split_and_checkpointed_equals_unsplit(config, device):
    if device != "cpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here: the split over cuda:0 and the CPU needs one")
    whole = gradients(config, dict.fromkeys(half_and_half(config, "cpu"), "cpu"), checkpointed=False, dropout=0.0)
    split = gradients(config, half_and_half(config, device), checkpointed=True, dropout=0.0)
    same(split, whole, 1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_dropout_is_the_same_when_a_block_runs_again(config, device):
    if device != "cpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here: the split over cuda:0 and the CPU needs one")
    places = half_and_half(config, device)
    kept = gradients(config, places, checkpointed=False, dropout=0.3)
    again = gradients(config, places, checkpointed=True, dropout=0.3)
    other = gradients(config, places, checkpointed=True, dropout=0.3, seed=5)
    same(again, kept, 1e-4)
    with pytest.raises(AssertionError):
        same(other, kept, 1e-4)


def test_only_the_planned_blocks_run_again(config):
    model = prepare(load_model(TINY, dtype=torch.float32, progress=False), layers=[0, 2])
    runs = [0] * config.num_layers

    def count(layer):
        def hook(*_):
            runs[layer] += 1

        return hook

    for layer, block in enumerate(model.base_model.model.transformer.layers):
        block.attention.query_key_value.register_forward_hook(count(layer))
    model(**random_batch(config, 2, 16)).loss.backward()
    assert runs == [2 if layer in (0, 2) else 1 for layer in range(config.num_layers)]
    with pytest.raises(ValueError, match="block 99"):
        checkpoint_only(model, [99])


@pytest.mark.parametrize("asked_before", [False, True], ids=["fresh", "transformers' own checkpointing first"])
def test_embeddings_need_no_gradient(config, asked_before):
    """The memory formula counts on it: block 0 keeps no input, and no gradient goes back to the embedding's GPU."""
    model = load_model(TINY, dtype=torch.float32, progress=False)
    if asked_before:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable()
        assert model.get_input_embeddings()(torch.tensor([[5]])).requires_grad
        checkpoint_only(model, [])
    model = prepare(model)
    assert not model.get_input_embeddings()(torch.tensor([[5]])).requires_grad
    checkpoint_only(model, [1])
    assert not model.get_input_embeddings()(torch.tensor([[5]])).requires_grad
    assert all(
        block.gradient_checkpointing == (n == 1) for n, block in enumerate(model.get_base_model().transformer.layers)
    )


def test_a_head_that_was_copied_is_one_tensor_again_on_one_device(config):
    """Else a model that was split for a while would hold a second matrix, 1.07 GB at full size."""
    model = ChatGLMForConditionalGeneration(config).requires_grad_(False)
    whole = dict.fromkeys(("transformer", "lm_head"), "cpu")
    model.place(whole | {"lm_head": "meta"})
    assert model.lm_head.weight is not model.transformer.word_embeddings.weight
    assert model.config.tie_word_embeddings is False
    model.place(whole)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert model.config.tie_word_embeddings is True
    assert "lm_head.weight" in model.all_tied_weights_keys
    # A head that is trained has gone its own way.
    model.place(whole | {"lm_head": "meta"})
    model.lm_head.weight.requires_grad_(True)
    model.lm_head.to_empty(device="cpu")
    model.place(whole)
    assert model.lm_head.weight is not model.transformer.word_embeddings.weight


def test_a_head_tied_by_hand_is_one_tensor_again_on_one_device(config):
    """As in a model that was untied before, whose list of tied weights is empty."""
    model = ChatGLMForConditionalGeneration(config).requires_grad_(False)
    whole = dict.fromkeys(("transformer", "lm_head"), "cpu")
    model.config.tie_word_embeddings, model.all_tied_weights_keys = False, {}
    model.lm_head.weight = model.transformer.word_embeddings.weight
    for _ in range(2):
        model.place(whole | {"lm_head": "meta"})
        assert model.lm_head.weight is not model.transformer.word_embeddings.weight
        model.place(whole)
        assert model.lm_head.weight is model.transformer.word_embeddings.weight


@pytest.mark.parametrize(
    "change", ["never tied", "replaced", "filled", "embedding filled", "embedding trained", "dtype"]
)
def test_a_head_of_its_own_is_kept_on_one_device(config, change):
    model = ChatGLMForConditionalGeneration(config).requires_grad_(False)
    embedding, head = model.transformer.word_embeddings, model.lm_head
    whole = dict.fromkeys(("transformer", "lm_head"), "cpu")
    if change == "never tied":
        model.config.tie_word_embeddings, model.all_tied_weights_keys = False, {}
        head.weight = torch.nn.Parameter(embedding.weight.clone(), requires_grad=False)
    model.place(whole | {"lm_head": "meta"})
    # Values do not come back from "meta": what a GPU would have held.
    head.weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    if change == "replaced":
        head.weight = torch.nn.Parameter(torch.ones_like(head.weight), requires_grad=False)
    elif change == "filled":
        head.weight.data[-1, -1] += 1
    elif change == "embedding filled":
        embedding.weight.data[0, 0] += 1
    elif change == "embedding trained":
        embedding.weight.requires_grad_(True)
    elif change == "dtype":
        head.double()
    before = head.weight.detach().clone()
    model.place(whole)
    assert head.weight is not embedding.weight
    assert torch.equal(head.weight, before)


def test_a_head_with_an_adapter_is_untied_and_tied_like_any_other(config):
    model = ChatGLMForConditionalGeneration(config)
    whole = dict.fromkeys(("transformer", "lm_head"), "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    assert model.lm_head.base_layer.weight is model.transformer.word_embeddings.weight
    model.place(whole | {"lm_head": "meta"})
    assert {parameter.device.type for parameter in model.lm_head.parameters()} == {"meta"}
    model.lm_head.lora_A.to_empty(device="cpu")  # values do not come back from "meta"
    model.lm_head.lora_B.to_empty(device="cpu")
    model.place(whole)
    assert model.lm_head.base_layer.weight is model.transformer.word_embeddings.weight
