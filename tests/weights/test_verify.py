import hashlib
import io
import itertools
import json
import os
import shutil
import types
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmhelpers.utils import progress
from glmhelpers.weights import manifest as checksums_module
from glmhelpers.weights.consistency import EMBEDDING, check_consistency
from glmhelpers.weights.download import download_weights
from glmhelpers.weights.manifest import PUBLISHED, read_manifest
from glmhelpers.weights.shards import ShardError, list_shards
from glmhelpers.weights.verify import verify_weights
from tests.helpers.fault_table import check_row

REFERENCE = Path(__file__).resolve().parents[1] / "reference"
FIRST, SECOND = "pytorch_model-00001-of-00008.bin", "pytorch_model-00002-of-00008.bin"


@pytest.fixture
def folder(tmp_path) -> Path:
    for path in [*(REFERENCE / "checkpoint").iterdir(), *(REFERENCE / "tokenizer").iterdir()]:
        shutil.copy(path, tmp_path / path.name)
        (tmp_path / path.name).chmod(0o644)
    files = {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in tmp_path.iterdir()
        if path.suffix in (".bin", ".model")
    }
    small = {key: json.loads((tmp_path / f"{key}.json").read_text()) for key in ("config", "tokenizer_config")}
    facts = {"huggingface": {"repo_id": "someone/model"}, "files": files, **small}
    (tmp_path / "weights_manifest.json").write_text(json.dumps(facts))
    return tmp_path


@pytest.fixture
def published(folder, tmp_path_factory) -> Path:
    """Another folder with the right files."""
    return shutil.copytree(folder, tmp_path_factory.mktemp("published") / "files")


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_shard(path: Path, **changes) -> None:
    tensors = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in (tensors | changes).items() if value is not None}, path)


def other_tokenizer(pieces: list[str]) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a small text about the sea and the hills"] * 20),
        model_writer=out,
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=3,
        pad_piece="<pad>",
        control_symbols=pieces,
        minloglevel=2,
    )
    return out.getvalue()


def test_the_whole_folder_is_fine(folder):
    report = verify_weights(folder)
    assert report.ok
    assert report.problems == []
    assert report.checksums_done
    assert (
        report.bytes
        == report.bytes_read
        == sum((folder / name).stat().st_size for name in read_manifest(None, folder)["files"])
    )
    assert str(report).startswith("[OK]")


def break_missing(folder):
    (folder / SECOND).unlink()


def break_pointer(folder):
    sha256 = read_manifest(None, folder)["files"][SECOND]["sha256"]
    text = f"version https://git-lfs.example/spec/v1\noid sha256:{sha256}\nsize 95219\n"
    (folder / SECOND).write_text(text.ljust(135))


def break_pointer_of_other_version(folder):
    (folder / SECOND).write_text(f"version https://git-lfs.example/spec/v1\noid sha256:{'0' * 64}\nsize 95219\n")


def break_truncated(folder):
    os.truncate(folder / SECOND, 50_000)


def break_one_bit(folder):
    data = bytearray((folder / SECOND).read_bytes())
    data[40_000] ^= 1
    (folder / SECOND).write_bytes(data)


def break_longer(folder):
    (folder / SECOND).write_bytes(bytes(200_000))


def break_config(folder):
    edit_json(folder / "config.json", vocab_size=150528, bos_token_id=150004)


def break_tokenizer_config(folder):
    edit_json(folder / "tokenizer_config.json", num_image_tokens=20000)


def break_config_of_other_size(folder):
    edit_json(folder / "config.json", inner_hidden_size=128)


def break_config_lost(folder):
    (folder / "config.json").unlink()


def break_config_cut(folder):
    os.truncate(folder / "config.json", 100)


def break_embedding(folder):
    edit_shard(folder / FIRST, **{EMBEDDING: torch.zeros(150528, 1, dtype=torch.float16)})


def break_shard_of_other_model(folder):
    edit_shard(folder / SECOND, extra=torch.zeros(3))


def break_tokenizer(folder):
    (folder / "ice_text.model").write_bytes(other_tokenizer([]))


FAULTS = [
    ("a shard is not there", break_missing, SECOND, "missing"),
    ("cloned without git-lfs", break_pointer, SECOND, "lfs_pointer"),
    ("git-lfs pointer of another version", break_pointer_of_other_version, SECOND, "lfs_pointer"),
    ("a shard is cut off", break_truncated, SECOND, "truncated"),
    ("one bit changed", break_one_bit, SECOND, "checksum"),
    ("a file with more bytes than published", break_longer, SECOND, "checksum"),
    ("config.json of v1.0", break_config, "config.json", "version"),
    ("config.json of another size", break_config_of_other_size, "config.json", "version"),
    ("config.json is not there", break_config_lost, "config.json", "missing"),
    ("config.json is cut off", break_config_cut, "config.json", "truncated"),
    ("tokenizer_config.json of v1.0", break_tokenizer_config, "tokenizer_config.json", "version"),
    ("embedding of v1.0", break_embedding, FIRST, "version"),
    ("a whole shard of another model", break_shard_of_other_model, SECOND, "version"),
    ("ice_text.model of v1.0", break_tokenizer, "ice_text.model", "version"),
]


@pytest.mark.parametrize(("fault", "damage", "name", "kind"), FAULTS, ids=[row[0] for row in FAULTS])
def test_each_fault_is_found_named_and_mended(folder, published, fault, damage, name, kind):
    damage(folder)
    report = verify_weights(folder)
    assert not report.ok
    assert kind in {"missing", "lfs_pointer", "truncated", "checksum", "version"}
    found = {problem.file: problem for problem in report.problems}
    assert found[name].kind == kind
    assert name in found[name].message
    assert "download_weights(" in found[name].message
    message = f"{kind}: {found[name].message}"
    if kind != "checksum" or damage is break_longer:
        quick = verify_weights(folder, checksums=False)
        assert not quick.checksums_done
        assert {(problem.file, problem.kind) for problem in quick.problems} >= {(name, kind)}
    assert download_weights(folder, published, folder / "weights_manifest.json", progress=False).ok
    check_row(fault, message, f"one call of download_weights puts {name} right", folder)


def test_a_folder_that_is_not_there(tmp_path):
    report = verify_weights(tmp_path / "nothing")
    assert {problem.kind for problem in report.problems} == {"missing"}
    assert [problem.file for problem in report.problems] == list(read_manifest(PUBLISHED)["files"])


def test_another_model_against_the_published_manifest(folder):
    report = verify_weights(folder, PUBLISHED)
    assert {problem.kind for problem in report.problems} == {"version"}
    assert {problem.file for problem in report.problems} == {*read_manifest(PUBLISHED)["files"], "config.json"}
    assert len(report.problems) == 10


def test_a_dangling_link(folder):
    break_missing(folder)
    (folder / SECOND).symlink_to(folder / "gone")
    (problem,) = verify_weights(folder).problems
    assert (problem.kind, "link to a file that is gone" in problem.message) == ("missing", True)


def test_mending_command_without_a_place_of_publication(folder):
    edit_json(folder / "weights_manifest.json", huggingface=None)
    facts = json.loads((folder / "weights_manifest.json").read_text())
    del facts["huggingface"]
    break_missing(folder)
    (problem,) = verify_weights(folder, facts).problems
    assert f"git checkout -- {folder / SECOND}" in problem.message


def test_second_call_reads_nothing_and_a_change_is_seen(folder):
    assert verify_weights(folder).bytes_read > 0
    assert verify_weights(folder).bytes_read == 0
    break_one_bit(folder)
    os.utime(folder / SECOND, ns=(1, 1))
    report = verify_weights(folder)
    assert [problem.kind for problem in report.problems] == ["checksum"]
    assert report.bytes_read == (folder / SECOND).stat().st_size


@pytest.mark.parametrize("memory", ["{broken", "[]", "null", '{"NAME": null}', '{"NAME": [1]}', '{"NAME": [1, 2, 3]}'])
def test_damaged_memory_is_no_memory(folder, memory):
    assert verify_weights(folder).ok
    (folder / checksums_module.MEMORY_NAME).write_text(memory.replace("NAME", SECOND))
    report = verify_weights(folder)
    assert (report.ok, report.bytes_read) == (True, report.bytes)


def test_a_folder_that_cannot_be_written_is_remembered_elsewhere(folder, tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    # Nothing can be written under that name, also not by root, as in a Kaggle input data set.
    (folder / checksums_module.MEMORY_NAME).mkdir()
    assert verify_weights(folder).bytes_read > 0
    assert verify_weights(folder).bytes_read == 0
    assert len(list(cache.glob("glmhelpers/*.json"))) == 1
    break_one_bit(folder)
    os.utime(folder / SECOND, ns=(1, 1))
    assert [problem.file for problem in verify_weights(folder).problems] == [SECOND]
    # Neither here nor there: slow, but no error.
    (cache / "none").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "none"))
    assert verify_weights(folder).bytes_read == verify_weights(folder).bytes_read > 0


def test_progress_of_the_checksums(folder, capsys, monkeypatch):
    clock = itertools.count(0, 20)  # each look at the clock is 20 seconds later
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    report = verify_weights(folder, progress=True)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) >= 2
    assert printed[-1].startswith("sha256 of 9 files 100 % ")
    assert f"of {report.bytes / 1e6:.2f} MB" in printed[-1]
    assert "all" not in printed[-1]
    verify_weights(folder, progress=True)
    assert capsys.readouterr().out == "", "nothing was read"
    seen: list[int] = []
    (folder / checksums_module.MEMORY_NAME).unlink()
    verify_weights(folder, progress=seen.append)
    assert sum(seen) == report.bytes


def test_a_folder_under_the_name_of_a_file(folder, published):
    break_missing(folder)
    (folder / SECOND).mkdir()
    (problem,) = verify_weights(folder).problems
    assert problem.kind == "missing"
    assert f"{SECOND} is a folder" in problem.message
    with pytest.raises(IsADirectoryError, match=f"{SECOND} is a folder.*remove or rename it") as caught:
        download_weights(folder, published, folder / "weights_manifest.json", progress=False)
    assert (folder / SECOND).is_dir(), "it is not for us to delete it"
    (folder / SECOND).rmdir()
    assert download_weights(folder, published, folder / "weights_manifest.json", progress=False).ok
    message, recovery = str(caught.value.strerror), "nothing was touched; one call once it is removed"
    check_row("a folder where a file belongs", message, recovery, folder)


@pytest.mark.parametrize("workers", [1, 4])
def test_checksums_against_hashlib(folder, workers):
    names = [path.name for path in folder.glob("*.bin")]
    seen = []
    found, size = checksums_module.checksums(folder, names, workers, seen.append)
    assert found == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    assert size == sum(seen) == sum((folder / name).stat().st_size for name in names)


def test_consistency_says_nothing_about_a_good_folder(folder):
    assert check_consistency(folder) == []


@pytest.mark.parametrize(
    ("damage", "name", "words"),
    [
        (lambda f: edit_json(f / "config.json", vocab_size=3041), FIRST, "3040 rows, config.json says vocab_size 3041"),
        (lambda f: edit_json(f / "config.json", vocab_size=2000), "ice_text.model", "3000 pieces"),
        (lambda f: edit_json(f / "config.json", gmask_token_id=7), "ice_text.model", "[gMASK] is 2657"),
        (lambda f: edit_json(f / "config.json", num_layers=3), "pytorch_model-00007-of-00008.bin", "holds block 3"),
        (lambda f: edit_shard(f / SECOND, surplus=torch.zeros(3)), "pytorch_model.bin.index.json", "does not name"),
        (
            lambda f: edit_shard(
                f / "pytorch_model-00008-of-00008.bin", **{"lm_head.weight": None, "x": torch.zeros(2)}
            ),
            "pytorch_model.bin.index.json",
            "looks for lm_head.weight",
        ),
        (lambda f: (f / SECOND).unlink(), SECOND, "index.json names it"),
        (
            lambda f: (f / "pytorch_model.bin.index.json").write_text("{"),
            "pytorch_model.bin.index.json",
            "not an index",
        ),
        (
            lambda f: (f / "ice_text.model").write_bytes(other_tokenizer(["[MASK]", "[gMASK]"])),
            "ice_text.model",
            "<sop>",
        ),
    ],
)
def test_files_that_do_not_belong_together(folder, damage, name, words):
    damage(folder)
    problems = {problem.file: problem for problem in check_consistency(folder)}
    assert words in problems[name].message


def test_index_may_not_point_outside_its_folder(folder):
    edit_json(folder / "pytorch_model.bin.index.json", weight_map={"a": "../b.bin"})
    with pytest.raises(ShardError, match="beside its index"):
        list_shards(folder)


QUIET = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@QUIET
@given(content=st.fixed_dictionaries({"files": JSON}) | JSON)
def test_any_json_is_a_manifest_or_a_clear_error(tmp_path, content):
    (tmp_path / "m.json").write_text(json.dumps(content))
    words = "accepted"
    try:
        read_manifest(tmp_path / "m.json")
    except ValueError as error:
        words = str(error)
    assert words.startswith(("accepted", str(tmp_path / "m.json")))


def test_the_manifest_in_the_package_is_the_published_one():
    facts = read_manifest()
    assert facts["model"] == "ChatGLM-6B v1.1"
    config = json.loads((PUBLISHED.parent / "config.json").read_text())
    tokenizer_config = json.loads((PUBLISHED.parent / "tokenizer_config.json").read_text())
    assert facts["config"].items() <= config.items()
    assert facts["tokenizer_config"].items() <= tokenizer_config.items()
