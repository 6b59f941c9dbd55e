"""Whatever stands in an adapter's files: it is loaded, or refused with a ValueError that leaves the base alone."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from glmhelpers.lora import load_adapter
from tests.helpers.adapters import change, drawn, state
from tests.helpers.reference import fresh_model, tokenizer


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    drawn().save_pretrained(place := tmp_path_factory.mktemp("peft"))
    return place


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text("abc.()*+", max_size=6), st.one_of(st.integers(-1, 9), st.floats(), st.text(max_size=3)), max_size=2),
)  # fmt: skip
KEYS = st.one_of(st.sampled_from(sorted(field.name for field in dataclasses.fields(LoraConfig))), st.text(max_size=6))


SPOILS = {
    "cut": lambda tensor: tensor[:-1],
    "wide": lambda tensor: tensor.repeat(1, 2),
    "flat": lambda tensor: tensor.flatten(),
    "half": lambda tensor: tensor.half(),
    "whole": lambda tensor: tensor.int(),
    "eight bits": lambda tensor: tensor.to(torch.float8_e5m2),
    "huge": lambda tensor: tensor.double() * 1e300,
    "infinite": lambda tensor: tensor / 0,
    "none": lambda tensor: tensor[:0],
}
CHANGES = st.dictionaries(KEYS, VALUES, max_size=3)
TENSORS = st.dictionaries(st.integers(0, 7), st.sampled_from(["gone", "renamed", *SPOILS]), max_size=2)


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(CHANGES, TENSORS)
@pytest.mark.filterwarnings("ignore")
def test_any_adapter_is_loaded_with_finite_numbers_or_refused_and_leaves_the_base_alone(
    sound, tmp_path_factory, changes, spoils
):
    copy = Path(shutil.copytree(sound, tmp_path_factory.mktemp("any") / "copy"))
    change(copy, **changes)
    tensors = load_file(copy / "adapter_model.safetensors")
    names = sorted(tensors)
    for place, spoil in spoils.items():
        tensor = tensors.pop(name := names[place])
        if spoil != "gone":
            renamed = name.replace("query_key_value", "dense") if spoil == "renamed" else name
            tensors[renamed] = SPOILS.get(spoil, torch.clone)(tensor).contiguous()
    save_file(tensors, copy / "adapter_model.safetensors")
    base = fresh_model()
    before = state(base)
    try:
        model = load_adapter(base, copy)
    except ValueError:
        assert state(base) == before
    else:
        ids = tokenizer()(["你好"], return_tensors="pt")["input_ids"]
        assert model(input_ids=ids).logits.isfinite().all() or changes.keys() & {"lora_alpha", "alpha_pattern"}


@pytest.mark.filterwarnings("ignore:.*changes the base weights")
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_changed_its_base_can_be_made_plain_as_the_refusal_says(start, tmp_path):
    model = get_peft_model(
        fresh_model(),
        LoraConfig(r=2, target_modules=["query_key_value"], init_lora_weights=start, task_type="CAUSAL_LM"),
    )
    config = model.peft_config["default"]
    config.init_lora_weights = True  # as peft's guide has it: the untrained start, to be taken off again
    model.save_pretrained(tmp_path / "start")
    config.init_lora_weights = start
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight += 0.05 * torch.randn_like(weight)
    ids = torch.tensor([[5, 6, 7, *tokenizer()("")["input_ids"]]])
    want = model.eval()(input_ids=ids).logits
    model.save_pretrained(tmp_path / "as it is")
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
        load_adapter(fresh_model(), tmp_path / "as it is", template="chatglm")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    plain = load_adapter(fresh_model(), tmp_path / "plain", template="chatglm")
    torch.testing.assert_close(plain.eval()(input_ids=ids).logits, want, atol=1e-4, rtol=0)
