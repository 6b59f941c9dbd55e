"""One placement from any form, one verdict at every door: against rules written down a second time."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmhelpers.cost_model.step_memory import predict
from glmhelpers.devicemap import DeviceMapError, Placement, check_device_map, part_names, plan_device_map
from glmhelpers.inference.decoder import stage_parts
from glmhelpers.lora.attach import attach_lora
from glmhelpers.training.finetune import train
from glmhelpers.training.memory_plan import predict_training
from glmhelpers.weights.loading import load_model
from tests.helpers.reference import fresh_model
from thuglm import ChatGLMConfig

TINY = Path(__file__).resolve().parents[2] / "data" / "tiny-chatglm"
CONFIG = ChatGLMConfig.from_pretrained(TINY)
LAYERS = CONFIG.num_layers
KEYS = ["", "transformer", "transformer.layers", *part_names(LAYERS), "transformer.layers.1.mlp", "lm_heat"]
DEVICES = [0, 1, 2, "cuda:0", "cuda:1", torch.device("cuda", 1), "cpu", torch.device("cpu"), "x", None, -1]


def resolved(device_map):
    """Part -> device: walk up from the part to the root, and take the first name that the map has."""
    found = {}
    for part in part_names(LAYERS):
        pieces = part.split(".")
        ways = [".".join(pieces[:count]) for count in range(len(pieces), -1, -1)]
        found[part] = next((device_map[way] for way in ways if way in device_map), "nowhere")
    return found


def is_good(device_map, gpus):
    names = {"cuda:0": 0, "cuda:1": 1, **{number: number for number in range(gpus)}}
    if set(device_map) - set(KEYS[:-2]) or any(
        str(place) not in map(str, [*names, "cpu"]) for place in device_map.values()
    ):
        return False
    places = [
        names.get(str(place), place) if "cpu" not in str(place) else 99 for place in resolved(device_map).values()
    ]
    places = [int(place) if str(place).isdigit() else place for place in places]
    embedding, *chain, norm, head = places
    return (
        "nowhere" not in places
        and [*chain, norm] == sorted([*chain, norm])
        and head == norm
        and embedding in (99, chain[0], head)
    )


def verdict(call):
    try:
        call()
    except DeviceMapError as error:
        return str(error)
    return "good"


MAPS = st.one_of(
    st.dictionaries(st.sampled_from(KEYS), st.sampled_from(DEVICES), max_size=4),
    # Mostly good ones: a whole map with a few names more.
    st.builds(
        lambda cut, end, more: {"": end, **{f"transformer.layers.{layer}": 0 for layer in range(cut)}, **more},
        st.integers(0, LAYERS),
        st.sampled_from([0, 1, "cpu"]),
        st.dictionaries(st.sampled_from(KEYS[:-2]), st.sampled_from([0, 1, "cpu"]), max_size=2),
    ),
)


@pytest.mark.once
@given(MAPS)
@settings(max_examples=150, deadline=None)
def test_every_door_gives_the_same_verdict(device_map):
    said = verdict(lambda: Placement.of(device_map, LAYERS, 2))
    assert (said == "good") == is_good(device_map, 2), said
    assert verdict(lambda: check_device_map(CONFIG, device_map, ["T4", "T4"])) == said
    assert verdict(lambda: predict(CONFIG, device_map, 1, 64, gpus=["T4", "T4"])) == said
    if said != "good":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "device_count", lambda: 2)
            assert verdict(lambda: load_model(TINY, device_map, progress=False)) == said
        return
    placement = Placement.of(device_map, LAYERS)
    assert list(placement.map) == part_names(LAYERS)
    assert Placement.of(placement.map, LAYERS) == Placement.of(placement, LAYERS) == placement
    assert sorted(layer for blocks in placement.blocks.values() for layer in blocks) == list(range(LAYERS))
    assert list(predict(CONFIG, device_map, 1, 64).devices) == placement.devices


ODD_KEYS = [
    "lm_head ",
    "transformer.layers.99",
    "transformer.layers.-1",
    "transformer.layers.x",
    None,
    0,
    b"lm_head",
    ("",),
]
ODD_DEVICES = ["cuda:9", "cuda:x", "cuda", "disk", "mps", "", 1.0, float("nan"), True, 10**30, -(10**30), [0], {}, b"0"]


def any_map(dice: random.Random) -> dict:
    """Mostly good: blocks up to a cut on GPU 0, and up to three names more, some of them odd."""
    cut = dice.randint(0, LAYERS)
    whole = {"": dice.choice((0, 1, "cpu")), **{f"transformer.layers.{layer}": 0 for layer in range(cut)}}
    more = [
        (dice.choice(KEYS if dice.random() < 0.8 else ODD_KEYS), dice.choice(DEVICES[:5] if dice.random() < 0.7 else ODD_DEVICES))
        for _ in range(dice.randint(0, 3))
    ]  # fmt: skip
    return {**(whole if dice.random() < 0.8 else {}), **dict(more)}


@pytest.mark.once
@pytest.mark.parametrize("seed", range(4))
def test_any_map_is_a_placement_of_every_part_or_refused_in_words(seed):
    """2,000 maps."""
    dice, good = random.Random(seed), 0
    for _ in range(500):
        device_map = any_map(dice)
        said = verdict(lambda device_map=device_map: check_device_map(CONFIG, device_map, ["T4", "T4"]))
        odd_key = any(key is odd for key in device_map for odd in ODD_KEYS)
        if not odd_key and not any(place is odd for place in device_map.values() for odd in ODD_DEVICES):
            assert (said == "good") == is_good(device_map, 2), (device_map, said)
        good += said == "good"
        if said == "good":
            places = Placement.of(device_map, LAYERS, 2).map
            assert list(places) == part_names(LAYERS)
            assert set(places.values()) <= {0, 1, "cpu"}
        assert 0 < len(said.strip()) < 4000
    assert 100 < good < 400


def test_a_map_of_two_names_works_everywhere():
    device_map = {"transformer": 0, "lm_head": 0}
    full = dict.fromkeys(part_names(LAYERS), 0)
    assert check_device_map(CONFIG, device_map) == {0: list(range(LAYERS))}
    assert Placement.of(device_map, LAYERS).map == full
    assert predict(CONFIG, device_map, 4, 64).breakdown == predict(CONFIG, full, 4, 64).breakdown
    places = {"transformer": "cpu", "lm_head": "cpu"}
    model = load_model(TINY, places, torch.float32, progress=False)
    placed = type(model).from_pretrained(TINY, dtype=torch.float32, device_map=places)
    assert Placement.of(model) == Placement.of(placed) == Placement.of("cpu", LAYERS) == Placement.of(None, LAYERS)
    assert predict(CONFIG, model, 4, 64, dtype="float32") == predict(CONFIG, places, 4, 64, dtype="float32")
    parts = ["embedding", *map(str, range(LAYERS)), "norm", "head"]
    assert stage_parts(model) == [(parts, torch.device("cpu"))]
    assert predict_training(attach_lora(model), 4, 64).devices == ("cpu",)


def test_the_longest_name_wins_in_any_order():
    places = {"transformer.layers.0": "meta", "transformer": "cpu", "lm_head": "cpu"}
    for order in (places, dict(reversed(places.items()))):
        net = fresh_model()
        net.place(order)
        assert [block.input_layernorm.weight.device.type for block in net.transformer.layers][:2] == ["meta", "cpu"]


@pytest.fixture
def on_the_cpu(monkeypatch):
    """A plan for one GPU whose parts are on the CPU, as there is no GPU here."""
    plan = plan_device_map(ChatGLMConfig.from_pretrained(TINY), "T4", 4, 64, dtype="float32", checkpointed="all")
    plan.__dict__["device_map"] = dict.fromkeys(plan.device_map, "cpu")
    return plan


def test_a_plan_is_applied_once(on_the_cpu):
    model = attach_lora(load_model(TINY, dtype=torch.float32, progress=False))
    assert on_the_cpu.apply(model) == [f"{LAYERS} blocks are checkpointed, where 0 were"]
    assert all(block.gradient_checkpointing for block in model.get_base_model().transformer.layers)
    assert on_the_cpu.apply(model) == []


def test_a_plan_for_something_else_is_refused(on_the_cpu):
    model = attach_lora(load_model(TINY, dtype=torch.float32, progress=False))
    real = plan_device_map(CONFIG, ["T4"], 4, 64, dtype="float32")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceMapError, match="GPU 0, which does not exist"):
            real.apply(model)
    other = plan_device_map(ChatGLMConfig(), ["T4"], 4, 64, dtype="float32", base_bits=4)
    with pytest.raises(ValueError, match="for another model"):
        other.apply(model)
    arguments = SimpleNamespace(per_device_train_batch_size=8)
    with pytest.raises(ValueError, match="batch_size is 4 in the plan and 8 here"):
        train(model, [], None, arguments, plan=on_the_cpu)
    wide = attach_lora(load_model(TINY, dtype=torch.float32, progress=False), r=2)
    arguments.per_device_train_batch_size = 4
    with pytest.raises(ValueError, match="lora_rank is 8 in the plan and 2 here"):
        train(wide, [], None, arguments, plan=on_the_cpu)
