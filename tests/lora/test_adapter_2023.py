"""Adapters of the 2023 script: both styles of names, both forms, and nothing silently left out."""

import pytest
import torch
import torch.nn.functional as F

from glmhelpers.lora.adapter import load_adapter, save_adapter
from glmhelpers.lora.adapters_2023 import import_2023, read_2023
from glmhelpers.lora.attach import adapter_weights, attach_lora
from glmhelpers.lora.proof import prove
from tests.helpers.reference import fresh_model, tokenizer

STEM = "base_model.model.transformer.layers.{}.attention.query_key_value.{}{}.weight"
HIDDEN, LAYERS, RANK = 64, 4, 8


def old_file(path, adapter="", parameter=False, drop=(), **more):
    """Write what the 2023 script wrote: random trained tensors; `adapter` is ".default" for peft 0.3."""
    generator = torch.Generator().manual_seed(4)
    stored = {}
    for layer in range(LAYERS):
        for side, shape in (("lora_A", (RANK, HIDDEN)), ("lora_B", (3 * HIDDEN, RANK))):
            tensor = torch.randn(shape, generator=generator) * 0.05
            stored[STEM.format(layer, side, adapter)] = torch.nn.Parameter(tensor) if parameter else tensor
    stored = {name: tensor for name, tensor in {**stored, **more}.items() if name not in drop}
    torch.save(stored, path)
    return stored


def ids():
    return tokenizer()(["晚上睡不着应该怎么办"], return_tensors="pt")["input_ids"]


@torch.no_grad()
def logits_by_hand(stored, adapter, alpha=32):
    """The base with each query_key_value changed to W + alpha / r * B A: LoRA's definition, no peft."""
    model = fresh_model()
    for layer, block in enumerate(model.transformer.layers):
        a, b = (stored[STEM.format(layer, side, adapter)].detach() for side in ("lora_A", "lora_B"))
        block.attention.query_key_value.weight += alpha / RANK * b @ a
    return model(input_ids=ids()).logits


@pytest.mark.parametrize("parameter", [False, True])
@pytest.mark.parametrize("adapter", ["", ".default"])
def test_both_styles_land_and_compute_what_lora_says(adapter, parameter, tmp_path):
    stored = old_file(tmp_path / "chatglm-lora.pt", adapter, parameter)
    model = import_2023(fresh_model(), tmp_path / "chatglm-lora.pt")
    torch.testing.assert_close(model(input_ids=ids()).logits, logits_by_hand(stored, adapter), atol=2e-3, rtol=0)
    places = adapter_weights(model)
    assert len(places) == len(stored) == 2 * LAYERS
    for name, tensor in stored.items():
        assert torch.equal(places[name.replace(".default.", ".")], tensor)
    assert {weight.dtype for weight in places.values()} == {torch.float32}


def test_an_imported_adapter_is_an_adapter_like_any_other(tmp_path):
    old_file(tmp_path / "chatglm-lora.pt")
    model = import_2023(fresh_model(), tmp_path / "chatglm-lora.pt", alpha=16)
    folder = save_adapter(model, tmp_path / "adapter", settings={"from": "chatglm-lora.pt"})
    assert prove(model, load_adapter(fresh_model(), folder, template="chatglm"), ids()).ok


def test_float16_tensors_become_float32(tmp_path):
    stored = old_file(tmp_path / "a.pt")
    torch.save({name: tensor.half() for name, tensor in stored.items()}, tmp_path / "half.pt")
    model = import_2023(fresh_model(), tmp_path / "half.pt")
    assert {weight.dtype for weight in adapter_weights(model).values()} == {torch.float32}


def test_the_two_thirds_form_of_peft_0_2_computes_the_same(tmp_path):
    """Against that form's own forward: two small products, a grouped convolution, zeros for the middle third."""
    generator = torch.Generator().manual_seed(9)
    stored = {}
    for layer in range(LAYERS):
        stored[STEM.format(layer, "lora_A", "")] = torch.randn(2 * RANK, HIDDEN, generator=generator) * 0.05
        stored[STEM.format(layer, "lora_B", "")] = torch.randn(2 * HIDDEN, RANK, generator=generator) * 0.05
    torch.save(stored, tmp_path / "chatglm-lora.pt")
    model = import_2023(fresh_model(), tmp_path / "chatglm-lora.pt")
    x = torch.randn(2, 5, HIDDEN, generator=generator)
    for layer in range(LAYERS):
        a, b = (stored[STEM.format(layer, side, "")] for side in ("lora_A", "lora_B"))
        after_a = F.linear(x, a)
        after_b = F.conv1d(after_a.transpose(-2, -1), b.unsqueeze(-1), groups=2).transpose(-2, -1)
        correction = x.new_zeros(2, 5, 3 * HIDDEN)
        correction[..., :HIDDEN], correction[..., 2 * HIDDEN :] = after_b[..., :HIDDEN], after_b[..., HIDDEN:]
        linear = model.base_model.model.transformer.layers[layer].attention.query_key_value
        want = linear.get_base_layer()(x) + correction * 32 / RANK
        torch.testing.assert_close(linear(x), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": [STEM.format(3, "lora_B", "")]}, r"layers\.3\.\S+lora_A\.weight but no lora_B"),
        ({"drop": [STEM.format(2, "lora_A", "")]}, r"layers\.2\.\S+lora_B\.weight but no lora_A"),
        (
            {"drop": [STEM.format(2, side, "") for side in ("lora_A", "lora_B")]},
            r"lacks 2 of the adapter's 8 tensors, the first is \S+layers\.2\.",
        ),
        ({"lm_head.weight": torch.ones(2, 2)}, r"'lm_head\.weight' \(Tensor\), which is no LoRA tensor"),
        ({"epoch": 3}, r"'epoch' \(int\), which is no LoRA tensor"),
        (
            {STEM.format(4, s, ""): torch.ones(8, 64) for s in ("lora_A", "lora_B")},
            r"layers\.4\.\S+ but this base has no linear layer there",
        ),
        ({STEM.format(1, "lora_A", ""): torch.ones(8, 64).long()}, r"as torch.int64 \[8, 64\].* matrix of floating"),
        ({STEM.format(1, "lora_A", ""): torch.tensor(1.0)}, r"must be a matrix of floating point numbers"),
        ({STEM.format(1, "lora_A", ""): torch.full((8, 64), torch.nan)}, r"holds NaN or infinity"),
        ({STEM.format(0, "lora_A", ".other"): torch.ones(8, 64)}, r"several adapters \(None, other\)"),
        (
            {STEM.format(1, "lora_A", ""): torch.ones(4, 64), STEM.format(1, "lora_B", ""): torch.ones(192, 4)},
            r"mixes ranks \(\[4, 8\]\)",
        ),
        ({STEM.format(1, "lora_B", ""): torch.ones(100, 8)}, r"lora_B.weight is \[100, 8\] .* but \[192, 8\]"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_ignored(changes, message, tmp_path):
    old_file(tmp_path / "chatglm-lora.pt", **changes)
    with pytest.raises(ValueError, match=message):
        import_2023(fresh_model(), tmp_path / "chatglm-lora.pt")


def test_a_refused_file_leaves_the_base_without_an_adapter(tmp_path):
    base, want = fresh_model(), fresh_model()(input_ids=ids()).logits
    old_file(tmp_path / "bad.pt", drop=[STEM.format(2, side, "") for side in ("lora_A", "lora_B")])
    with pytest.raises(ValueError, match="lacks 2 of"):
        import_2023(base, tmp_path / "bad.pt")
    assert torch.equal(base(input_ids=ids()).logits, want)
    assert not any("lora" in name for name, _ in base.named_parameters())
    old_file(tmp_path / "good.pt")
    import_2023(base, tmp_path / "good.pt")


class Evil:
    """A pickle that would run code when it is loaded."""

    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_a_file_with_code_in_it_is_not_loaded(tmp_path, capsys):
    torch.save({"a": Evil()}, tmp_path / "chatglm-lora.pt")
    with pytest.raises(ValueError, match=r"chatglm-lora\.pt was not loaded.*anybody's code"):
        read_2023(tmp_path / "chatglm-lora.pt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs", b"hello world", b"half"])
def test_a_damaged_file_is_refused(content, tmp_path):
    whole = tmp_path / "whole.pt"
    old_file(whole)
    (tmp_path / "x.pt").write_bytes(whole.read_bytes()[:5000] if content == b"half" else content)
    with pytest.raises(ValueError, match=r"x\.pt was not loaded: it is damaged"):
        read_2023(tmp_path / "x.pt")


def test_something_else_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds list, not a dict"):
        read_2023(tmp_path / "x.pt")
    with pytest.raises(FileNotFoundError):
        read_2023(tmp_path / "nothing.pt")


def test_todays_trained_parameters_by_name_are_such_a_file(tmp_path):
    """The 2023 way of saving, applied to today's model: `{name: p for name, p in named_parameters() if trained}`."""
    model = attach_lora(fresh_model(), r=4, dropout=0.0)
    for name, weight in adapter_weights(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    trained = {name: p.to("cpu") for name, p in model.named_parameters() if p.requires_grad}
    torch.save(trained, tmp_path / "chatglm-lora.pt")
    again = import_2023(fresh_model(), tmp_path / "chatglm-lora.pt")
    assert torch.equal(again(input_ids=ids()).logits, model.eval()(input_ids=ids()).logits)
