"""Headers of shards: they point at the right bytes, and what is no shard is refused."""

import contextlib
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from glmhelpers.weights.shards import ShardError, list_shards, read_entries

DTYPES = [torch.float16, torch.float32, torch.bfloat16, torch.int64, torch.bool]
TENSORS = st.dictionaries(
    st.text("abc.xyz", min_size=1, max_size=12),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 5), max_size=3)),
    min_size=1,
    max_size=5,
)
QUIET = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_shard(path: Path, shapes: dict) -> dict[str, torch.Tensor]:
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in shapes.items()}
    (save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)
    return tensors


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
@QUIET
@given(shapes=TENSORS)
def test_entries_point_at_the_bytes(tmp_path, ending, shapes):
    path = tmp_path / f"a.{ending}"
    tensors = write_shard(path, shapes)
    data, entries = path.read_bytes(), read_entries(path)
    assert set(entries) == set(tensors)
    for name, entry in entries.items():
        raw = bytearray(data[entry.offset : entry.offset + entry.nbytes])
        assert torch.equal(torch.frombuffer(raw, dtype=entry.dtype).reshape(entry.shape), tensors[name])


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
@QUIET
@given(shapes=TENSORS, cut=st.floats(0, 1, exclude_max=True))
def test_a_cut_shard_is_refused(tmp_path, ending, shapes, cut):
    path = tmp_path / f"a.{ending}"
    write_shard(path, shapes)
    os.truncate(path, int(path.stat().st_size * cut))
    with pytest.raises(ShardError, match=r"a\."):
        read_entries(path)


@QUIET
@given(data=st.binary(max_size=300))
def test_any_bytes_are_refused_as_a_shard(tmp_path, data):
    for ending in ("bin", "safetensors"):
        (tmp_path / f"a.{ending}").write_bytes(data)
        with contextlib.suppress(ShardError):
            assert read_entries(tmp_path / f"a.{ending}") == {}


def test_no_code_runs_from_a_shard(tmp_path):
    class Bad:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"a": Bad()}, tmp_path / "a.bin")
    with pytest.raises(ShardError):
        read_entries(tmp_path / "a.bin")
    assert not (tmp_path / "ran").exists()


def test_views_and_shared_memory_in_one_shard(tmp_path):
    base = torch.arange(12.0)
    torch.save({"a": base, "b": base[4:8]}, tmp_path / "a.bin")
    entries = read_entries(tmp_path / "a.bin")
    assert entries["b"].offset - entries["a"].offset == 16
    torch.save({"a": torch.arange(12.0).reshape(3, 4).T}, tmp_path / "b.bin")
    with pytest.raises(ShardError, match="in one piece"):
        read_entries(tmp_path / "b.bin")


@pytest.mark.parametrize("weight_map", ["[]", "{}", "null", "7", '"ab"', '[["a", "b.bin"]]'])
def test_an_index_that_names_no_shard_is_told(tmp_path, weight_map):
    (tmp_path / "pytorch_model.bin.index.json").write_text(f'{{"weight_map": {weight_map}}}')
    with pytest.raises(ShardError, match=r"pytorch_model.bin.index.json (is not an index of|names no) shard"):
        list_shards(tmp_path)
