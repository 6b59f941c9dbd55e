import errno
import json
import math
import os
import shutil
import types
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glmhelpers.devicemap.check import DeviceMapError, Placement, check_placement, part_names
from glmhelpers.utils.files import _HERE
from glmhelpers.weights import convert, loading, reading
from glmhelpers.weights.convert import convert_to_safetensors
from glmhelpers.weights.download import download_weights
from glmhelpers.weights.layout import HEAD, part_of, tensor_shapes
from glmhelpers.weights.loading import load_model
from glmhelpers.weights.manifest import read_manifest
from glmhelpers.weights.reading import BlockReader
from glmhelpers.weights.shards import Entry, ShardError, read_entries
from glmhelpers.weights.verify import verify_weights
from tests.helpers.checkpoint_folder import FIRST, LAST, SECOND, edit_shard
from tests.helpers.fault_table import check_row
from tests.helpers.hub_server import Hub
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration

EMBEDDING = "transformer.word_embeddings.weight"
IDS = torch.tensor([[5, 6, 7, 2657, 2660, 8, 9]])
QUIET = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_same_model(one, other) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name
    with torch.no_grad():
        assert torch.equal(one(IDS).logits, other(IDS).logits)


# ---- the whole model ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_equal_to_from_pretrained(folder, dtype, ending):
    wanted = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    if ending == "safetensors":
        convert_to_safetensors(folder, replace=True, progress=False)
        assert not list(folder.glob("*.bin*"))
    model = load_model(folder, dtype=dtype, progress=False)
    assert_same_model(model, wanted)
    assert not model.training
    assert model.config.dtype == dtype
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert model.transformer.layers[0].input_layernorm.weight.dtype == dtype
    assert model.hf_device_map == dict.fromkeys(part_names(4), "cpu")


def test_the_head_is_not_read_and_every_shard_is_reported(folder, capsys):
    report = load_model(folder, dtype=torch.float16).load_report
    shapes = tensor_shapes(ChatGLMConfig.from_pretrained(folder))
    wanted = sum(2 * math.prod(shape) for name, shape in shapes.items() if name != HEAD and "inv_freq" not in name)
    assert report.read_bytes == wanted
    assert [shard.name for shard in report.shards] == [f"pytorch_model-0000{n}-of-00008.bin" for n in range(1, 9)]
    assert report.shards[-1].read_bytes == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 9
    assert all("MB/s | host" in line for line in printed[:7])
    assert "not read" in printed[7]


def test_stored_head_and_inv_freq_are_ignored(folder):
    wanted = load_model(folder, progress=False)
    edit_shard(folder / LAST, **{HEAD: torch.zeros(3040, 64, dtype=torch.float16)})
    edit_shard(folder / FIRST, **{"transformer.layers.0.attention.rotary_emb.inv_freq": torch.zeros(4)})
    assert_same_model(load_model(folder, progress=False), wanted)


def test_default_dtype_is_that_of_the_config(folder):
    assert load_model(folder, progress=False).dtype == torch.float16


FAULTS = [
    (
        "a tensor is in no shard",
        lambda f: edit_shard(f / SECOND, **{"transformer.layers.0.mlp.dense_h_to_4h.weight": None}),
        "looks for transformer.layers.0.mlp.dense_h_to_4h.weight",
    ),
    (
        "model and config.json of different sizes",
        lambda f: edit_config(f, inner_hidden_size=128),
        "config.json makes it",
    ),
    ("an embedding that does not fit config.json", lambda f: edit_config(f, vocab_size=4000), "of different versions"),
    ("more blocks in the shards than in config.json", lambda f: edit_config(f, num_layers=3), "of different models"),
    ("fewer blocks in the shards than in config.json", lambda f: edit_config(f, num_layers=5), "are in no shard"),
]


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("fault", "damage", "words"), FAULTS, ids=[row[0] for row in FAULTS])
def test_refused_before_a_weight_is_copied(folder, tmp_path, monkeypatch, fault, damage, words):
    published = shutil.copytree(folder, tmp_path / "published")
    damage(folder)
    monkeypatch.setattr(BlockReader, "fill", lambda *a: pytest.fail("a weight was copied"))
    with pytest.raises(ValueError, match=words) as caught:
        load_model(folder, progress=False)
    monkeypatch.undo()
    with Hub(published) as hub:
        facts = hub.manifest(config=json.loads((published / "config.json").read_text()))
    assert "verify_weights(" in str(caught.value)
    assert not verify_weights(folder, facts, checksums=False).ok, "the advice must lead somewhere"
    download_weights(folder, published, facts, progress=False)
    assert_same_model(load_model(folder, progress=False), load_model(published, progress=False))
    check_row(fault, str(caught.value), "nothing was copied; after download_weights it loads", folder)


def test_missing_tensor_without_an_index(folder):
    (folder / "pytorch_model.bin.index.json").unlink()
    edit_shard(folder / SECOND, **{"transformer.layers.0.mlp.dense_h_to_4h.weight": None})
    with pytest.raises(ValueError, match=r"1 parameters are in no shard.*layers.0.mlp.dense_h_to_4h.weight"):
        load_model(folder, progress=False)
    edit_shard(folder / SECOND, **{"transformer.extra.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"holds transformer.extra.weight"):
        load_model(folder, progress=False)


def test_a_damaged_shard_is_named(folder):
    (folder / "pytorch_model.bin.index.json").unlink()
    os.truncate(folder / SECOND, 5000)
    with pytest.raises(ShardError, match=SECOND):
        load_model(folder, progress=False)


def test_a_tensor_that_was_forgotten_is_found(folder, monkeypatch):
    real = loading.choose_entries

    def forgetful(headers, model):
        shards = real(headers, model)
        del shards[folder / SECOND]["transformer.layers.1.input_layernorm.bias"]
        return shards

    monkeypatch.setattr(loading, "choose_entries", forgetful)
    with pytest.raises(RuntimeError, match=r"transformer.layers.1.input_layernorm.bias is still on meta"):
        load_model(folder, progress=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: blocks on a GPU and on the CPU")
def test_first_half_on_the_gpu_rest_on_the_cpu(folder):
    names = part_names(4)
    device_map = {name: 0 if place < 3 else "cpu" for place, name in enumerate(names)}
    model = load_model(folder, device_map, torch.float32, progress=False)
    assert model.transformer.layers[1].mlp.dense_4h_to_h.weight.device == torch.device("cuda:0")
    assert model.transformer.layers[2].mlp.dense_4h_to_h.weight.device == torch.device("cpu")
    assert model.lm_head.weight.device == torch.device("cpu")
    wanted = load_model(folder, dtype=torch.float32, progress=False)
    assert torch.equal(
        model.transformer.layers[0].mlp.dense_4h_to_h.weight.cpu(),
        wanted.transformer.layers[0].mlp.dense_4h_to_h.weight,
    )
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits.cpu(), wanted(IDS).logits, atol=1e-3, rtol=1e-3)


# ---- where things belong ----


def test_part_names_are_modules_of_the_model(folder):
    model = load_model(folder, progress=False)
    modules = dict(model.named_modules())
    assert set(part_names(4)) <= set(modules)
    assert {part_of(name) for name, _ in model.named_parameters(remove_duplicate=False)} == set(part_names(4))


def test_check_placement_names_the_first_offender(folder):
    model = load_model(folder, progress=False)
    placement = Placement.of("cpu", 4)
    assert check_placement(model, placement, torch.float16) == 1 + 4 * 12 + 2 + 1 + 1
    name = "transformer.layers.2.attention.dense.bias"
    # "meta" stands for the other device: this machine may have no GPU.
    with pytest.raises(
        RuntimeError, match=r"transformer.layers.2.input_layernorm.weight is on cpu, the device map says meta"
    ):
        check_placement(model, Placement({**placement.map, "transformer.layers.2": "meta"}), torch.float16)
    with pytest.raises(RuntimeError, match=r"word_embeddings.weight is torch.float16, torch.float32 was asked for"):
        check_placement(model, placement, torch.float32)
    model.transformer.layers[2].attention.dense.bias = torch.nn.Parameter(torch.empty(64, device="meta"))
    with pytest.raises(RuntimeError, match=f"{name} is still on meta"):
        check_placement(model, placement, torch.float16)
    model = load_model(folder, progress=False)
    model.transformer.rotary_emb.to("meta")
    with pytest.raises(RuntimeError, match=r"buffer transformer.rotary_emb.inv_freq is still on meta"):
        check_placement(model, placement, torch.float16)


@pytest.mark.parametrize(
    ("device_map", "words"),
    [
        ({"transformer": "cpu"}, "lm_head is on no GPU: add it"),
        ({"": "cpu", "transformer.layers.9": "cpu"}, "blocks 0 to 3, not block 9"),
        ({"": "graphics"}, "'graphics' is no device"),
        (99, "the model is sent to GPU 99, which does not exist"),
        ("auto", "is not planned here"),
    ],
)
def test_device_maps_that_cannot_be(folder, device_map, words):
    with pytest.raises(DeviceMapError, match=words):
        load_model(folder, device_map, progress=False)


# ---- bytes ----


@QUIET
@given(
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=4),
    source=st.sampled_from([torch.float16, torch.float32, torch.bfloat16]),
    target=st.sampled_from([torch.float16, torch.float32]),
    workers=st.integers(1, 3),
)
def test_blocks_of_any_size_arrive(tmp_path, sizes, source, target, workers):
    tensors = {str(place): torch.randn(size).to(source) for place, size in enumerate(sizes)}
    save_file(tensors, tmp_path / "a.safetensors")
    entries = read_entries(tmp_path / "a.safetensors")
    found = {name: torch.full(entry.shape, math.nan, dtype=target) for name, entry in entries.items()}
    block, reading.BLOCK = reading.BLOCK, 256
    try:
        with BlockReader(workers) as reader:
            reader.fill(tmp_path / "a.safetensors", [(entries[name], found[name]) for name in entries])
    finally:
        reading.BLOCK = block
    for name, value in tensors.items():
        assert torch.equal(found[name], value.to(target))


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(100))
    entry = Entry(torch.float32, (64,), 0)
    with BlockReader(1) as reader, pytest.raises(EOFError, match=r"a.bin ends at byte 100, 156 more were expected"):
        reader.fill(tmp_path / "a.bin", [(entry, torch.empty(64))])


# ---- safetensors ----


def test_converted_copy_is_whole_verified_and_loads(folder, tmp_path):
    wanted = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float16)
    output = convert_to_safetensors(folder, tmp_path / "copy", progress=False)
    assert (folder / FIRST).is_file()
    assert sorted(path.name for path in output.glob("*.safetensors")) == [
        f"model-0000{n}-of-00008.safetensors" for n in range(1, 8)
    ]
    report = verify_weights(output)
    assert report.ok
    assert report.bytes_read == 0, "hashed once, when it was written"
    assert_same_model(ChatGLMForConditionalGeneration.from_pretrained(output, dtype=torch.float16), wanted)
    assert_same_model(load_model(output, dtype=torch.float16, progress=False), wanted)
    stored = {name: value for path in output.glob("*.safetensors") for name, value in load_file(path).items()}
    assert HEAD not in stored
    assert set(stored) == {name for name, _ in wanted.named_parameters()}


def test_converting_beside_the_originals_keeps_their_manifest(folder):
    files = {FIRST: {"size": (folder / FIRST).stat().st_size, "sha256": "0" * 64}}
    (folder / "weights_manifest.json").write_text(json.dumps({"files": files}))
    convert_to_safetensors(folder, progress=False)
    assert set(read_manifest(None, folder)["files"]) > {FIRST, "model-00001-of-00008.safetensors"}


def test_interrupted_conversion_goes_on(folder, monkeypatch):
    wanted = load_model(folder, progress=False)
    real, calls = convert._convert, []

    def stops(path, names, target):
        calls.append(path.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(path, names, target)

    monkeypatch.setattr(convert, "_convert", stops)
    with pytest.raises(KeyboardInterrupt):
        convert_to_safetensors(folder, replace=True, progress=False)
    # What SIGKILL would have left behind: nobody else removes it, and a second one may not fit.
    nobody = next(pid for pid in range(4_000_000, 0, -1) if not psutil.pid_exists(pid))
    (folder / f".model-00004-of-00008.safetensors.{_HERE}.{nobody}.x.tmp").write_bytes(bytes(1000))
    assert len(list(folder.glob("*.safetensors"))) == 3
    assert len(list(folder.glob("*.bin"))) == 5
    convert_to_safetensors(folder, replace=True, progress=False)
    assert len(calls) == 4 + 4
    assert not list(folder.glob(".*.tmp"))
    assert_same_model(load_model(folder, progress=False), wanted)
    with pytest.raises(FileNotFoundError, match=r"no .bin shards"):
        convert_to_safetensors(folder)


def test_conversion_of_an_incomplete_folder(folder):
    (folder / SECOND).unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model-00002-of-00008.safetensors nor its .bin"):
        convert_to_safetensors(folder, progress=False)


def test_conversion_needs_disk(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=convert.SPARE_BYTES + 600_000))
    with pytest.raises(OSError, match="replace=True") as caught:
        convert_to_safetensors(folder, progress=False)
    assert caught.value.errno == errno.ENOSPC
    assert not list(folder.glob("*.safetensors"))
    convert_to_safetensors(folder, replace=True, progress=False)
    check_row(
        "disk too small to convert",
        str(caught.value.strerror),
        "nothing was written; replace=True went through",
        folder,
    )


def test_a_copy_that_differs_is_thrown_away(folder, monkeypatch):
    def wrong(tensors, path, metadata):
        save_file({name: value + 1 for name, value in tensors.items()}, path, metadata)

    monkeypatch.setattr(convert, "save_file", wrong)
    with pytest.raises(RuntimeError, match="differs from"):
        convert_to_safetensors(folder, replace=True, progress=False)
    assert not list(folder.glob("*.safetensors*"))
    assert (folder / FIRST).is_file()


# ---- host memory ----


def test_host_never_holds_a_second_copy(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks import load, random_checkpoint

    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this kernel cannot reset the record of the largest resident memory")
    random_checkpoint.write_checkpoint(tmp_path, random_checkpoint.make_config("tiny"), "bin", "cpu")
    found = load.load_in_process(tmp_path, "cpu", workers=2)
    extra = found["rss_growth_less_kept_bytes"] - found["import_bytes"]
    largest = max(path.stat().st_size for path in tmp_path.glob("*.bin"))
    assert found["kept_on_cpu_bytes"] > 6 * largest
    assert extra < 1.2 * largest, "more than about one shard beside the parameters themselves"
    assert found["tensors_checked"] == 1 + 28 * 12 + 2
