"""The adapter made part of the weights: in memory, as files in both layouts, alone; and everything that may go wrong."""

import errno
import json
import re
import shutil
import zipfile
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from glmhelpers.inference.chat import ChatSession, Generation
from glmhelpers.inference.decoder import Decoder, state_of
from glmhelpers.inference.model_state import is_merged, merged_in_memory
from glmhelpers.lora import export
from glmhelpers.lora.adapter_files import read_adapter
from glmhelpers.lora.export import Source, export_adapter, export_merged, plan_shards
from glmhelpers.lora.merge import Correction, corrections
from glmhelpers.lora.proof import closeness, next_logits
from glmhelpers.runtime import find_project
from glmhelpers.weights.consistency import EMBEDDING
from glmhelpers.weights.convert import convert_to_safetensors
from glmhelpers.weights.layout import HEAD, published_shards
from glmhelpers.weights.loading import load_model
from glmhelpers.weights.shards import read_entries
from glmhelpers.weights.verify import verify_weights
from tests.helpers.reference import CHECKPOINT, fresh_model, tokenizer
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration

TEXTS = ["你好", "What is the capital of France?", "晚上睡不着应该怎么办"]
QKV = "transformer.layers.{}.attention.query_key_value.weight"


def adapted(base=None, std=0.05, **settings):
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["query_key_value"], **settings})
    net = get_peft_model(base or fresh_model(), config).eval()
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=std)
    return net


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An adapter for the reference checkpoint, and the base as .bin and as safetensors."""
    folder = tmp_path_factory.mktemp("export")
    adapted().save_pretrained(folder / "adapter")
    shutil.copytree(CHECKPOINT, folder / "bin")
    for name in ("ice_text.model", "tokenizer_config.json"):
        shutil.copyfile(CHECKPOINT.parent / "tokenizer" / name, folder / "bin" / name)
    convert_to_safetensors(folder / "bin", folder / "safe", progress=False)
    return folder


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of the adapter that a test may spoil."""
    return shutil.copytree(folders / "adapter", tmp_path / "adapter")


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# The sum


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 6), st.floats(0.1, 4))
def test_merged_matrix_is_the_rounded_exact_sum(seed, rank, scaling):
    draw = torch.Generator().manual_seed(seed)
    weight = (torch.randn(24, 16, generator=draw) * 0.1).half()
    a, b = torch.randn(rank, 16, generator=draw), torch.randn(24, rank, generator=draw)
    correction = Correction(a, b, scaling)
    merged = correction.added_to(weight)
    exact = weight.double() + scaling * (b.double() @ a.double())
    assert merged.dtype == torch.float16
    room = exact.abs() * 2**-11 + 2**-25 + 1e-5
    assert ((merged.double() - exact).abs() <= room).all()
    assert correction.largest_error(weight, merged) <= 1
    # what a mistake would look like: another scaling, the transposed order, a forgotten adapter; it shows only if the
    # one random input that is looked at does not happen to lie across A
    x = torch.randn(16, generator=torch.Generator().manual_seed(0))
    assume((a @ x).norm() > 0.5)
    assert Correction(a, b, scaling * 1.5).largest_error(weight, merged) > 1
    assert correction.largest_error(weight, weight) > 1


def test_sums_that_do_not_fit_are_refused():
    big = Correction(torch.full((1, 4), 300.0), torch.full((6, 1), 300.0), 1.0)
    with pytest.raises(ValueError, match=r"does not fit into torch\.float16"):
        big.added_to(torch.zeros(6, 4).half())
    with pytest.raises(ValueError, match=r"a weight of \[4, 6\] and an adapter for \[6, 4\]"):
        big.added_to(torch.zeros(4, 6))


@pytest.mark.parametrize("rslora", [False, True])
def test_corrections_are_what_peft_adds(tmp_path, rslora):
    net = adapted(use_rslora=rslora, target_modules=["query_key_value", "dense"])
    net.save_pretrained(tmp_path)
    found = corrections(read_adapter(tmp_path))
    assert len(found) == 8
    for name, layer in net.named_modules():
        if hasattr(layer, "lora_A"):
            correction = found[name.removeprefix("base_model.model.") + ".weight"]
            delta = layer.get_delta_weight("default")
            torch.testing.assert_close(correction.scaling * correction.b @ correction.a, delta, atol=1e-7, rtol=1e-5)


# In memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merging_in_memory_changes_no_answer_and_leaves_no_trace(dtype):
    net = adapted(fresh_model(dtype), std=0.3)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    addresses, ids = state_of(net.get_base_model()), tokenizer()(["你好"], return_tensors="pt")["input_ids"]
    unmerged = Decoder(net).generate(ids, max_new_tokens=12)
    with merged_in_memory(net) as same:
        assert same is net
        assert is_merged(net)
        moved = [name for name, p in net.named_parameters() if not torch.equal(p, before[name])]
        assert len(moved) == 4
        assert all("query_key_value.base_layer.weight" in name for name in moved)
        if dtype == torch.float32:
            assert Decoder(net).generate(ids, max_new_tokens=12) == unmerged
    assert not is_merged(net)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert state_of(net.get_base_model()) == addresses


def test_weights_come_back_after_an_error_too():
    net = adapted(fresh_model(torch.float16), std=0.3)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with pytest.raises(KeyError), merged_in_memory(net):
        raise KeyError
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_merging_twice_or_without_adapter_is_refused():
    net = adapted()
    with (
        merged_in_memory(net),
        pytest.raises(ValueError, match="merged already"),
        merged_in_memory(net),
    ):
        pass
    with pytest.raises(ValueError, match="no adapter"), merged_in_memory(fresh_model()):
        pass


def test_the_base_cannot_be_asked_while_the_adapter_is_merged():
    """peft would unmerge behind our back, with a rounding error."""
    chat = ChatSession(adapted(), tokenizer(), settings=Generation(4, temperature=0))
    with merged_in_memory(chat.model):
        assert chat.chat("你好").adapter
        chat.adapter = False
        with pytest.raises(RuntimeError, match="adapter is merged"):
            chat.chat("你好")
    assert not chat.chat("你好").adapter


# As files


@pytest.mark.parametrize("layout", ["safetensors", "published"])
@pytest.mark.parametrize("base", ["bin", "safe"])
def test_exported_model_equals_base_plus_adapter(folders, tmp_path, base, layout):
    output = export_merged(folders / base, folders / "adapter", tmp_path / "merged", layout, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert verify_weights(output).ok
    wanted = next_logits(adapted(), tokenizer(), TEXTS)
    model = ChatGLMForConditionalGeneration.from_pretrained(output, dtype=torch.float32).eval()
    close = closeness(wanted, next_logits(model, tokenizer(), TEXTS))
    assert close.ok
    assert close.same_best == 1
    assert "[OK]" in str(close)
    assert not closeness(wanted, next_logits(fresh_model(), tokenizer(), TEXTS)).ok
    loaded = load_model(output, dtype=torch.float32, progress=False)
    auto = AutoModel.from_pretrained(output, dtype=torch.float32).eval()
    for other in (loaded, auto):
        assert torch.equal(next_logits(other, tokenizer(), TEXTS), next_logits(model, tokenizer(), TEXTS))


def test_every_tensor_that_the_adapter_does_not_name_is_copied_bit_by_bit(folders, tmp_path):
    output = export_merged(folders / "bin", folders / "adapter", tmp_path / "merged", "published", progress=False)
    base, merged = Source(folders / "bin"), Source(output)
    assert base.where.keys() == merged.where.keys()
    changed = []
    for name, (_, entry) in base.where.items():
        assert merged.where[name][1].dtype == entry.dtype, name
        if not torch.equal(base.read(name, entry.shape), merged.read(name, entry.shape)):
            changed.append(name)
    assert sorted(changed) == [QKV.format(layer) for layer in range(4)]


def test_tiny_checkpoint_keeps_its_files(tmp_path):
    """Same names, same tensors in each, in the same order and dtype."""
    tiny = find_project() / "data" / "tiny-chatglm"
    adapted(ChatGLMForConditionalGeneration.from_pretrained(tiny, dtype=torch.float32)).save_pretrained(tmp_path / "a")
    output = export_merged(tiny, tmp_path / "a", tmp_path / "merged", "published", progress=False)
    names = sorted(path.name for path in tiny.glob("*.bin"))
    assert sorted(path.name for path in output.glob("*.bin")) == names
    assert len(names) == 8
    for name in names:
        old = torch.load(tiny / name, weights_only=True)
        new = torch.load(output / name, weights_only=True)
        assert [(key, tensor.dtype) for key, tensor in old.items()] == [(key, t.dtype) for key, t in new.items()]


def test_from_safetensors_back_to_the_published_files(folders, tmp_path):
    """What safetensors left out is there again: the head, which is the embedding, and the rotary frequencies."""
    output = export_merged(folders / "safe", folders / "adapter", tmp_path / "merged", "published", progress=False)
    there, base = Source(output), Source(folders / "bin")
    config = ChatGLMConfig.from_pretrained(output)
    wanted = [(name, shape) for shapes in published_shards(config) for name, shape in shapes.items()]
    assert [(name, entry.shape) for name, (_, entry) in there.where.items()] == wanted
    assert torch.equal(there.read(HEAD, there.where[HEAD][1].shape), there.read(EMBEDDING, there.where[HEAD][1].shape))
    name = "transformer.layers.2.attention.rotary_emb.inv_freq"
    shape = there.where[name][1].shape
    exact = fresh_model().transformer.rotary_emb.frequencies().half()
    assert torch.equal(there.read(name, shape), exact)
    if name in base.where:
        assert torch.equal(there.read(name, shape), base.read(name, shape))


def test_real_model_is_planned_into_the_published_eight_files():
    config = ChatGLMConfig()
    published, safe = plan_shards(config, "published"), plan_shards(config, "safetensors")
    assert next(iter(published)) == "pytorch_model-00001-of-00008.bin"
    assert len(published) == 8
    assert list(published["pytorch_model-00008-of-00008.bin"]) == ["lm_head.weight"]
    assert list(safe)[-1] == "model-00007-of-00007.safetensors"
    kept = [name for shapes in safe.values() for name in shapes]
    everything = [name for shapes in published.values() for name in shapes]
    assert [n for n in everything if n != "lm_head.weight" and not n.endswith("inv_freq")] == kept


def test_disk_is_checked_before_anything_is_written(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(export.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 10**6))
    with pytest.raises(OSError, match=r"needs 0\.06 GB.*0\.06 GB are free.*Kaggle.*export_adapter") as error:
        export_merged(folders / "bin", folders / "adapter", tmp_path / "x" / "merged")
    assert error.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(folders, tmp_path):
    (tmp_path / "merged").mkdir()
    with pytest.raises(FileExistsError, match="delete it, or choose another"):
        export_merged(folders / "bin", folders / "adapter", tmp_path / "merged")
    with pytest.raises(ValueError, match="no layout 'gguf'"):
        export_merged(folders / "bin", folders / "adapter", tmp_path / "x", "gguf")


def test_an_interrupted_export_leaves_nothing(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "save_file", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export_merged(folders / "bin", folders / "adapter", tmp_path / "merged", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_lies_is_found_out(folders, tmp_path, monkeypatch):
    def lie(tensors, path, metadata):
        save_file(tensors, path, metadata=metadata)
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(export, "save_file", lie)
    with pytest.raises(RuntimeError, match=r"model-00001.*does not read back"):
        export_merged(folders / "bin", folders / "adapter", tmp_path / "merged", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_reading_back_compares_every_bit_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "BLOCK", 16)
    tensor = torch.randn(5, 7).half()
    tensor[4, 6] = torch.nan  # never equal to itself as a number
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    entry = read_entries(tmp_path / "x.safetensors")["x"]
    assert export.reads_back(tmp_path / "x.safetensors", entry, tensor)
    assert export.reads_back(tmp_path / "x.safetensors", entry, tensor.t().contiguous().t())
    assert not export.reads_back(tmp_path / "x.safetensors", entry, tensor.bfloat16())
    for at in ((0, 0), (4, 5)):
        other = tensor.clone()
        other[at] += 1
        assert not export.reads_back(tmp_path / "x.safetensors", entry, other)
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-4])
    assert not export.reads_back(tmp_path / "x.safetensors", entry, tensor)
    with pytest.raises(OSError, match="70 bytes were to be read"):
        export.read_tensor(tmp_path / "x.safetensors", entry)


def test_everybody_may_read_what_was_exported(folders, tmp_path):
    output = export_merged(folders / "bin", folders / "adapter", tmp_path / "merged", progress=False)
    plain = tmp_path / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in output.iterdir()} == {plain.stat().st_mode}


def test_a_wrong_sum_is_found_out(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(Correction, "added_to", lambda self, weight: weight)
    with pytest.raises(RuntimeError, match=r"layers\.0\.attention.* times further off"):
        export_merged(folders / "bin", folders / "adapter", tmp_path / "merged", progress=False)


# Adapters that cannot be merged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_other_kinds_of_adapters_are_named(copy, change, message):
    change_config(copy, **change)
    with pytest.raises(ValueError, match=message):
        read_adapter(copy)


def test_incomplete_and_foreign_adapters_are_refused(copy, folders, tmp_path):
    path = copy / "adapter_model.safetensors"
    tensors = load_file(path)
    one = next(name for name in tensors if "lora_B" in name)
    save_file({name: value for name, value in tensors.items() if name != one}, path)
    with pytest.raises(ValueError, match=r"without B\.weight"):
        read_adapter(copy)
    save_file({re.sub(r"layers\.3", "layers.77", name): value for name, value in tensors.items()}, path)
    with pytest.raises(ValueError, match=r"changes transformer\.layers\.77.*no linear layer in a block"):
        export_merged(folders / "bin", copy, tmp_path / "merged", progress=False)
    save_file({name: value.repeat(2, 1) if "_B" in name else value for name, value in tensors.items()}, path)
    with pytest.raises(ValueError, match="model of another size"):
        export_merged(folders / "bin", copy, tmp_path / "merged", progress=False)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"lm_head\.weight, which is no lora_A"):
        read_adapter(copy)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks adapter_model\.safetensors"):
        read_adapter(copy)


# The adapter alone


def test_packed_adapter_loads_with_plain_peft_and_names_no_path(folders, tmp_path):
    archive = export_adapter(folders / "adapter", tmp_path / "adapter.zip")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path / "there")
        texts = [packed.read(name) for name in packed.namelist() if name.endswith((".json", ".md"))]
    assert not any(str(CHECKPOINT).encode() in text for text in texts)
    again = PeftModel.from_pretrained(fresh_model(), tmp_path / "there").eval()
    wanted = next_logits(adapted(), tokenizer(), TEXTS)
    assert torch.equal(next_logits(again, tokenizer(), TEXTS), wanted)


def test_packing_an_incomplete_adapter_writes_nothing(copy, tmp_path):
    (copy / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError):
        export_adapter(copy, tmp_path / "adapter.zip")
    assert not (tmp_path / "adapter.zip").exists()
