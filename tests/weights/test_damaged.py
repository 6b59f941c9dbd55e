"""Any config, index, record and file system: a report, or a ValueError that names the file; nothing runs for ever."""

import errno
import fcntl
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmhelpers.weights import manifest
from glmhelpers.weights.consistency import check_consistency
from glmhelpers.weights.convert import convert_to_safetensors
from glmhelpers.weights.download import download_weights
from glmhelpers.weights.loading import load_model
from glmhelpers.weights.shards import list_shards, read_entries
from glmhelpers.weights.verify import verify_weights
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer

TINY = Path(__file__).resolve().parents[2] / "data" / "tiny-chatglm"
SECOND = "pytorch_model-00002-of-00008.bin"
CONFIG = json.loads((TINY / "config.json").read_text())
ENTRIES = {path.name: read_entries(path) for path in list_shards(TINY)}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Tiny ChatGLM with a manifest that says nothing about config.json."""
    shutil.copytree(TINY, tmp_path / "tiny")
    facts = json.loads((TINY / "weights_manifest.json").read_text())
    facts.pop("config", None)
    facts["files"].pop("config.json", None)
    (tmp_path / "tiny" / "weights_manifest.json").write_text(json.dumps(facts))
    return tmp_path / "tiny"


def list_entries(folder: Path) -> list:
    return [read_entries(path) for path in list_shards(folder)]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


values = st.none() | st.booleans() | st.integers() | st.just(10**12) | st.floats() | st.text(max_size=5)
values |= st.lists(values, max_size=2) | st.dictionaries(st.text(max_size=2), values, max_size=1)


configs = st.dictionaries(st.sampled_from([*CONFIG, "quantization_bit", "pre_seq_len"]), values, min_size=1, max_size=3)
on_one_folder = HealthCheck.function_scoped_fixture


@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=[on_one_folder])
@given(configs)
def test_any_config_gives_a_report(folder, changes):
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    for problem in check_consistency(folder, ENTRIES):
        assert problem.file in problem.message


@settings(max_examples=40, deadline=None, suppress_health_check=[on_one_folder])
@given(configs)
def test_any_config_gives_a_model_or_a_value_error(folder, changes):
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    verify_weights(folder)
    with suppress(ValueError):
        load_model(folder, progress=False)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "7", "{", "\x00", "[" * 10**5, '{"vocab_size": ' + "9" * 5000 + "}"]
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "pytorch_model.bin.index.json"])
def test_any_text_in_a_json_file_is_a_report(folder, name, text):
    (folder / name).write_text(text)
    verify_weights(folder)
    (folder / manifest.MEMORY_NAME).write_text(text)
    verify_weights(folder)


@pytest.mark.parametrize("key", ["num_layers", "num_attention_heads", "vocab_size", "hidden_size", "inner_hidden_size"])
@pytest.mark.parametrize("value", ["28", None, [1], {}, True, -1, 0, 10**12, 1.5])
def test_sizes_that_cannot_be_are_named(folder, key, value):
    (folder / "config.json").write_text(json.dumps(CONFIG | {key: value}))
    (problem,) = verify_weights(folder).problems
    assert f"config.json says {key} " in problem.message
    with pytest.raises(ValueError, match=f"config.json says {key} "):
        load_model(folder, progress=False)


def test_a_packed_release_is_named_as_one(folder):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_bit": 4}))
    (problem,) = verify_weights(folder).problems
    assert "a packed release" in problem.message
    for call in (load_model, ChatGLMConfig.from_pretrained):
        with pytest.raises(ValueError, match="a packed release"):
            call(folder)
    assert ChatGLMConfig(quantization_bit=0).num_layers == 28, "as in the published config.json"


@pytest.mark.parametrize("above", ["", "models--zai-org--chatglm-6b", "hub/models--zai-org--chatglm-6b"])
def test_a_folder_of_the_hub_cache_is_named_as_one(tmp_path, above):
    deep = tmp_path / above / "snapshots" / ("a" * 40)
    shutil.copytree(TINY, deep)
    assert f"give '{deep}'" in verify_weights(tmp_path).problems[0].message
    with pytest.raises(FileNotFoundError, match=f"cache.*{deep}"):
        list_shards(tmp_path)


@pytest.mark.parametrize("name", [SECOND, "ice_text.model"])
def test_a_file_of_the_right_size_that_is_no_such_file(folder, name):
    (folder / name).write_bytes(b"\xff" * (folder / name).stat().st_size)
    for checksums in (True, False):
        (problem,) = verify_weights(folder, checksums=checksums).problems
        assert (problem.file, problem.kind) == (name, "checksum")
        assert "right size, but cannot be read" in problem.message
    read = ChatGLMTokenizer.from_pretrained if name == "ice_text.model" else list_entries
    with pytest.raises(ValueError, match=name):
        read(folder)


def test_a_file_that_the_disk_does_not_give_back(folder, monkeypatch):
    def reads(path, progress):
        if path.name == SECOND:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, progress)

    real = manifest.sha256_of
    monkeypatch.setattr(manifest, "sha256_of", reads)
    (problem,) = verify_weights(folder).problems
    assert (problem.file, problem.kind) == (SECOND, "checksum")
    assert os.strerror(errno.EIO) in problem.message


def test_a_record_that_came_with_a_copied_folder_is_not_believed(folder, tmp_path):
    assert verify_weights(folder).bytes_read > 0
    assert verify_weights(folder).bytes_read == 0
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = (copy / SECOND).stat()
    flip_a_bit(copy / SECOND)
    os.utime(copy / SECOND, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [problem.file for problem in verify_weights(copy).problems] == [SECOND]
    # Not in the same folder either, whatever time the file shows.
    flip_a_bit(folder / SECOND)
    os.utime(folder / SECOND, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [problem.file for problem in verify_weights(folder).problems] == [SECOND]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_no_obstacle(folder, tmp_path, monkeypatch, code):
    def no_locks(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="no lock can be had"):
        assert download_weights(tmp_path / "new", folder, manifest=folder / "weights_manifest.json", progress=False).ok


def test_a_file_system_without_links_gets_copies(folder, tmp_path, monkeypatch, capsys):
    def no_links(*args, **more):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "symlink_to", no_links)
    assert download_weights(tmp_path / "new", folder, manifest=folder / "weights_manifest.json").ok
    assert "copied from" in capsys.readouterr().out
    assert not (tmp_path / "new" / SECOND).is_symlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(OSError, match="are free") as caught:
        download_weights(tmp_path / "newer", folder, manifest=folder / "weights_manifest.json", progress=False)
    assert caught.value.errno == errno.ENOSPC


NO_CONFIGS = {
    "lost": (None, "is not there"),
    "empty": (b"", r"is empty \(0 bytes\)"),
    "blank": (b" \n", r"is empty \(2 bytes\)"),
    "cut": (b'{"vocab_size": 12', "is no whole JSON"),
    "a list": (b"[]", r"holds '\[\]' and no settings"),
    "a number": (b"5", "holds '5' and no settings"),
    "null": (b"null", "holds 'None' and no settings"),
    "of another encoding": ('{"a": "你好"}'.encode("gbk"), "is no whole JSON.*utf-8"),
    "deep": (b"[" * 100_000, "is no whole JSON"),
}


@pytest.mark.parametrize("name", NO_CONFIGS)
def test_a_config_that_is_none_is_named_with_what_mends_it(folder, name):
    content, what = NO_CONFIGS[name]
    path = folder / "config.json"
    path.write_bytes(content or b"")
    if content is None:
        path.unlink()
    for load in (load_model, ChatGLMConfig.from_pretrained, ChatGLMForConditionalGeneration.from_pretrained):
        with pytest.raises(OSError, match=rf"config.json {what}.*verify_weights\({str(folder)!r}\)"):
            load(folder)
    shutil.copy(TINY / "weights_manifest.json", folder)
    (problem,) = verify_weights(folder).problems
    assert (problem.file, "Mend: " in problem.message) == ("config.json", True), "the advice is a good one"


@pytest.mark.parametrize("name", [name for name in NO_CONFIGS if name != "lost"])
def test_a_config_that_is_none_is_a_problem_whatever_the_manifest_says(folder, name):
    (folder / "config.json").write_bytes(NO_CONFIGS[name][0])
    assert [problem.file for problem in verify_weights(folder).problems] == ["config.json"]


def test_what_a_config_leaves_out_is_the_default(folder):
    """`{}` is the configuration of the full-size model: load_model says so, and sends its reader to verify_weights."""
    shutil.copy(TINY / "weights_manifest.json", folder)
    (folder / "config.json").write_text(json.dumps({key: CONFIG[key] for key in CONFIG if key != "hidden_size"}))
    with pytest.raises(ValueError, match=r"config.json makes it \[.*, 4096\]"):
        load_model(folder)
    (problem,) = verify_weights(folder).problems
    assert "leaves out hidden_size, which means 4096, the manifest says 128" in problem.message


@pytest.mark.parametrize("below", ["", "w"])
def test_converting_onto_a_file_says_what_to_do(folder, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        OSError, match=r"file.* cannot be written \(.*nothing was converted: give another folder as output"
    ):
        convert_to_safetensors(folder, tmp_path / "file" / below, progress=False)
    assert (tmp_path / "file").read_text() == "mine"
    assert convert_to_safetensors(folder, tmp_path / "another", progress=False) == tmp_path / "another"


def test_a_folder_of_shards_that_is_none_is_named(folder, tmp_path):
    for place, what in ((folder / "ice_text.model", "it is a file, the folder"), (tmp_path / "none", "no such folder")):
        with pytest.raises(FileNotFoundError, match=rf"{place.name}: .*{what}.*download_weights"):
            load_model(place)
        with pytest.raises(FileNotFoundError, match=rf"{place.name} is no folder.*give the folder that holds them"):
            convert_to_safetensors(place, tmp_path / "out", progress=False)
