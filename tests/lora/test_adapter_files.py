"""Which adapters are let in, and that a refusal leaves the base as it was."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from glmhelpers.lora import attach_lora, export_adapter, export_merged, import_2023, load_adapter, save_adapter
from glmhelpers.lora.adapter_files import CHECKED, FREE
from glmhelpers.lora.export import Source
from glmhelpers.lora.fingerprint import base_note, note_of
from tests.helpers.adapters import change, drawn, state
from tests.helpers.reference import CHECKPOINT, fresh_model, tokenizer

# Settings that mean more than adding (alpha / r) B A, as of peft 0.21: refused unless they are off.
REFUSED = {
    *("alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "fan_in_fan_out", "kasa_config"),
    *("layer_replication", "loftq_config", "lora_bias", "lora_ga_config", "megatron_config", "modules_to_save"),
    *("monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora"),
    "velora_config",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An adapter written by peft alone, without our note."""
    drawn().save_pretrained(place := tmp_path_factory.mktemp("peft"))
    return place


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("base")
    for path in [*CHECKPOINT.iterdir(), *(CHECKPOINT.parent / "tokenizer").iterdir()]:
        (place / path.name).write_bytes(path.read_bytes())
    return place


def test_every_setting_of_peft_has_a_rule():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields - FREE - CHECKED - REFUSED == set(), (
        "a new setting: what does it change? Put it into one of the lists"
    )


def test_an_adapter_of_anybodys_peft_is_loaded_with_a_word_on_what_was_not_checked(folder, capsys):
    ids = tokenizer()(["你好"], return_tensors="pt")["input_ids"]
    wanted = PeftModel.from_pretrained(fresh_model(), folder).eval()(input_ids=ids).logits
    torch.testing.assert_close(load_adapter(fresh_model(), folder)(input_ids=ids).logits, wanted, atol=1e-4, rtol=0)
    assert "has no course.json: whether it belongs to this base" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more",
    [
        {"use_rslora": True},
        {"rank_pattern": {"layers.1.attention.query_key_value": 2}, "alpha_pattern": {"layers.0.attention.query_key_value": 3}},
        {"target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]},
        {"target_modules": r".*layers\.[12]\..*query_key_value"},
        {"layers_to_transform": [0, 3], "layers_pattern": "layers"},
        {"exclude_modules": ["transformer.layers.2.attention.query_key_value"]},
        {"init_lora_weights": "gaussian"},
    ],
    ids=lambda more: next(iter(more)),
)  # fmt: skip
def test_what_is_plain_lora_loads_and_merges_as_peft_does(tmp_path, base_folder, more):
    drawn(**more).save_pretrained(tmp_path / "adapter")
    ids = tokenizer()(["你好"], return_tensors="pt")["input_ids"]
    wanted = PeftModel.from_pretrained(fresh_model(), tmp_path / "adapter").eval()(input_ids=ids).logits
    loaded = load_adapter(fresh_model(), tmp_path / "adapter")
    torch.testing.assert_close(loaded(input_ids=ids).logits, wanted, atol=1e-4, rtol=0)
    save_adapter(loaded, tmp_path / "again")
    torch.testing.assert_close(
        load_adapter(fresh_model(), tmp_path / "again")(input_ids=ids).logits, wanted, atol=1e-4, rtol=0
    )
    merged = (
        type(fresh_model())
        .from_pretrained(export_merged(base_folder, tmp_path / "adapter", tmp_path / "merged", progress=False))
        .float()
    )
    torch.testing.assert_close(merged.eval()(input_ids=ids).logits, wanted, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa': the base was changed before training"),
        ({"init_lora_weights": "pissa_niter_16"}, "the base was changed"),
        ({"init_lora_weights": "olora"}, "the base was changed"),
        ({"init_lora_weights": "corda"}, "the base was changed"),
        ({"init_lora_weights": "loftq"}, "the base was changed"),
        ({"init_lora_weights": "mica"}, "the base was changed"),
        ({"init_lora_weights": ["gaussian"]}, "the base was changed"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"bias": 7}, "bias=7"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
        ({"a_setting_of_2031": "on"}, "a_setting_of_2031='on'"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan: it must be a number above 0"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"lora_alpha": 10**400}, "below a billion"),
        ({"lora_alpha": 1e308}, "below a billion"),
        ({"r": 10**400}, "the rank must be"),
        ({"rank_pattern": {"dense": 10**12}}, "below a billion"),
        ({"target_modules": ["query_key_value", "dense"]}, "lacks 8 of the adapter's 16 tensors"),
        ({"target_modules": ["query_key_value", "word_embeddings"]}, "lacks 2 of the adapter's 10 tensors"),
        ({"target_modules": ["query_key_value", "input_layernorm"]}, "lacks 8 of"),
        ({"target_modules": ["query_key_value", "attention"]}, "lacks 8 of"),
        ({"layers_to_transform": [0, 1]}, "which its target_modules or layers_to_transform leave out"),
        ({"layers_to_transform": 10**30}, "leave out"),
        ({"lora_alpha": "16"}, "lora_alpha='16'"),
        ({"r": 0}, "r=0: the rank"),
        ({"r": True}, "r=True"),
        ({"r": 5}, "has rank 4, adapter_config.json says 5"),
        ({"lora_dropout": 1.5}, "lora_dropout=1.5"),
        ({"rank_pattern": {"(a+)+$": 4}}, "expressions are not handled"),
        ({"alpha_pattern": {"dense": -1}}, "numbers above 0"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ["(a|a)*$"]}, "target_modules"),
        ({"layers_to_transform": ["x"]}, "layers_to_transform"),
        ({"peft_type": "IA3"}, "peft_type='IA3': only LORA"),
    ],
)
def test_what_is_not_plain_lora_is_refused_at_every_door_and_leaves_no_trace(
    copy, base_folder, tmp_path, settings, message
):
    change(copy, **settings)
    base = fresh_model()
    before = state(base)
    doors = [
        lambda: load_adapter(base, copy),
        lambda: export_merged(base_folder, copy, tmp_path / "merged", progress=False),
    ]
    if not {"target_modules", "layers_to_transform"} & set(settings):  # packing asks for no base
        doors.append(lambda: export_adapter(copy, tmp_path / "packed.zip"))
    for door in doors:
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            door()
    assert state(base) == before
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("spoil", ["float8", "vector", "nan", "one side", "nothing", "another name", "another size"])
def test_tensors_that_are_no_pairs_of_matrices_are_refused_and_leave_no_trace(copy, spoil):
    path = copy / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    changed = {
        "float8": {name: tensors[name].to(torch.float8_e4m3fn)},
        "vector": {name: tensors[name].flatten()},
        "nan": {name: tensors[name] * float("nan")},
        "one side": {name: None},
        "nothing": dict.fromkeys(tensors),
        "another name": {"base_model.model.lm_head.weight": torch.ones(2, 2)},
        "another size": {key: value.repeat(1, 2) for key, value in tensors.items() if "lora_A" in key},
    }[spoil]
    save_file({key: value for key, value in {**tensors, **changed}.items() if value is not None}, path)
    base = fresh_model()
    before = state(base)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        load_adapter(base, copy)
    assert state(base) == before
    attach_lora(base)  # and another adapter can be put on it


@pytest.mark.parametrize("layer", ["lm_head", "transformer.word_embeddings", "transformer.layers.9.attention.dense"])
def test_an_adapter_on_a_layer_that_is_not_handled_is_refused_at_both_doors(copy, base_folder, tmp_path, layer):
    base = fresh_model()
    before, width = state(base), base.config.hidden_size
    stem = f"base_model.model.{layer}.lora_"
    tensors = {f"{stem}A.weight": torch.ones(4, width), f"{stem}B.weight": torch.ones(base.config.vocab_size, 4)}
    save_file(tensors, copy / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "adapter.bin")
    change(copy, target_modules=[layer.rpartition(".")[2]])
    for layout in ("safetensors", "published"):
        with pytest.raises(ValueError, match=f"changes {layer}, which is no linear layer in a block"):
            export_merged(base_folder, copy, tmp_path / "merged", layout, progress=False)
    with pytest.raises(ValueError, match=f"changes {layer}, which is no linear layer in a block"):
        load_adapter(base, copy)
    with pytest.raises(ValueError, match="no linear layer"):
        import_2023(base, tmp_path / "adapter.bin")
    assert state(base) == before


def test_a_layer_without_tensors_is_missed_at_both_doors(copy, base_folder, tmp_path):
    path = copy / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "layers.2." not in name}, path)
    with pytest.raises(ValueError, match=r"lacks 2 of the adapter's 8 tensors, the first is \S+layers\.2\."):
        load_adapter(fresh_model(), copy)
    with pytest.raises(ValueError, match=r"lacks 2 of the adapter's 8 tensors, the first is \S+layers\.2\."):
        export_merged(base_folder, copy, tmp_path / "merged", progress=False)


# The base


def test_export_refuses_another_base_as_loading_does(tmp_path, base_folder):
    model = attach_lora(fresh_model())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    folder = save_adapter(model, tmp_path / "adapter")
    export_merged(base_folder, folder, tmp_path / "good", progress=False)
    other = Path(shutil.copytree(base_folder, tmp_path / "other"))
    shard = other / "pytorch_model-00003-of-00008.bin"
    tensors = torch.load(shard, weights_only=True)
    name = next(name for name in tensors if "query_key_value.weight" in name or ("dense" in name and "weight" in name))
    torch.save({**tensors, name: tensors[name] + 1}, shard)
    with pytest.raises(ValueError, match="trained on another base"):
        export_merged(other, folder, tmp_path / "bad", progress=False)
    assert not (tmp_path / "bad").exists()


def test_the_note_of_a_base_is_the_same_from_its_files_and_from_the_model(base_folder):
    model = fresh_model(torch.float16)
    assert note_of(Source(base_folder).weights(model.config), model.config) == base_note(model)
    assert base_note(fresh_model()) == base_note(model)


def test_another_norm_is_another_base_and_old_notes_still_load(tmp_path):
    model = attach_lora(fresh_model())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    folder = save_adapter(model, tmp_path / "adapter")
    base = fresh_model()
    base.transformer.final_layernorm.weight.data *= 2
    with pytest.raises(ValueError, match="the same matrices, but other norms or biases"):
        load_adapter(base, folder)
    note = json.loads((folder / "course.json").read_text())
    del note["base"]["vectors"]
    (folder / "course.json").write_text(json.dumps(note))
    load_adapter(base, folder)


@pytest.mark.parametrize(
    "changes", [{"template": ["chatglm"]}, {"base": 3}, *({"base": b} for b in ({"sizes": [1]}, {"parts": "x"}))]
)
def test_a_damaged_note_is_called_damaged(tmp_path, changes):
    model = attach_lora(fresh_model())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    path = save_adapter(model, tmp_path / "adapter") / "course.json"
    note = json.loads(path.read_text())
    if isinstance(changes.get("base"), dict):
        changes = {"base": {**note["base"], "fingerprint": "another", **changes["base"]}}
    path.write_text(json.dumps({**note, **changes}))
    with pytest.raises(ValueError, match=r"course\.json is damaged"):
        load_adapter(fresh_model(), tmp_path / "adapter")


# Files of 2023


def test_a_file_of_2023_takes_its_alpha_from_the_settings_beside_it(tmp_path):
    model = drawn(lora_alpha=64)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}
    torch.save(tensors, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 64}))
    ids = tokenizer()(["你好"], return_tensors="pt")["input_ids"]
    found = import_2023(fresh_model(), tmp_path / "adapter_model.bin")
    torch.testing.assert_close(found(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"alpha=32 was given, .* says 64"):
        import_2023(fresh_model(), tmp_path / "adapter_model.bin", alpha=32)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 64}))
    with pytest.raises(ValueError, match="the file has rank 4"):
        import_2023(fresh_model(), tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"import_2023\(base, "):
        load_adapter(fresh_model(), tmp_path)


PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 64}


@pytest.mark.parametrize(
    ("beside", "given", "message"),
    [
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights='pissa': the base was changed"),
        ({"use_dora": True}, {}, "use_dora=True"),
        ({"bias": "all"}, {}, "bias='all'"),
        ({"peft_type": "IA3"}, {}, "only LORA"),
        ({"enable_lora": [True, False, True]}, {}, "enable_lora"),
        ({"lora_alpha": 10**400}, {}, "lora_alpha=1000"),
        ({"r": [4]}, {}, "the rank must be"),
        ({"target_modules": ["dense"]}, {}, "leave out|lacks"),
        (None, {"alpha": float("nan")}, "lora_alpha=nan"),
        (None, {"alpha": -3}, "lora_alpha=-3"),
        (None, {"alpha": "16"}, "lora_alpha='16'"),
        (None, {"dropout": 7}, "dropout"),
        (None, {"dtype": torch.float8_e4m3fn}, "must be a matrix of floating point numbers"),
    ],
)
def test_a_file_of_2023_is_held_to_the_same_list(tmp_path, beside, given, message):
    dtype, base = given.pop("dtype", torch.float32), fresh_model()
    before = state(base)
    tensors = {name: tensor.to(dtype) for name, tensor in drawn().state_dict().items() if "lora_" in name}
    torch.save(tensors, tmp_path / "adapter_model.bin")
    if beside is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps({**PLAIN, **beside}))
    with pytest.raises(ValueError, match=message):
        import_2023(base, tmp_path / "adapter_model.bin", **given)
    assert state(base) == before


@pytest.mark.parametrize(
    "more",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"layers.1.attention.query_key_value": 3}},
        {"target_modules": ["query_key_value", "dense"], "layers_to_transform": [1, 3]},
    ],
    ids=lambda more: next(iter(more)),
)
def test_a_file_of_2023_takes_all_settings_that_lie_beside_it(tmp_path, more):
    model = drawn(**more)
    model.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    ids = tokenizer()(["你好"], return_tensors="pt")["input_ids"]
    found = import_2023(fresh_model(), tmp_path / "adapter_model.bin")
    torch.testing.assert_close(found(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=0)
