"""Weights from every kind of source, checked and linked; what goes wrong on the way is in test_download_faults.py."""

# ruff: noqa: F811 - a fixture that is imported has the name of the parameters that ask for it

import json
import shutil
import sys
import types
from pathlib import Path

import huggingface_hub
import pytest
import torch

from glmhelpers.utils import progress
from glmhelpers.weights import hub as remotes
from glmhelpers.weights import manifest as checksums
from glmhelpers.weights.download import download_weights
from glmhelpers.weights.manifest import PUBLISHED, read_manifest, total_bytes
from glmhelpers.weights.verify import verify_weights
from tests.helpers.fault_table import COMMITTED, read
from tests.helpers.hub_case import LARGE, assert_bit_exact, fetch, hub, manifest_of, published  # noqa: F401


def test_everything_arrives_and_loads(hub, tmp_path):
    report = fetch(hub, tmp_path / "w")
    assert report.ok
    assert report.checksums_done
    assert_bit_exact(hub, tmp_path / "w")
    written = json.loads((tmp_path / "w" / "pytorch_model.bin.index.json").read_text())
    original = json.loads((hub.folder / "pytorch_model.bin.index.json").read_text())
    assert written["weight_map"] == original["weight_map"]
    assert written["metadata"]["total_size"] == original["metadata"]["total_size"]
    from thuglm import ChatGLMForConditionalGeneration, ChatGLMTokenizer

    model = ChatGLMForConditionalGeneration.from_pretrained(tmp_path / "w", dtype=torch.float32)
    assert ChatGLMTokenizer.from_pretrained(tmp_path / "w").gmask_token_id == model.config.gmask_token_id


def test_second_call_asks_for_nothing(hub, tmp_path):
    fetch(hub, tmp_path)
    hub.requests.clear()
    fetch(hub, tmp_path)
    assert hub.requests == []


def test_plain_base_url(hub, tmp_path):
    download_weights(tmp_path, f"{hub.url}/plain/", manifest=manifest_of(hub), progress=False)
    assert_bit_exact(hub, tmp_path)


def test_mirror_from_the_environment(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/")
    download_weights(tmp_path, manifest=manifest_of(hub), progress=False)
    assert_bit_exact(hub, tmp_path)


def test_another_revision_than_the_manifests(hub, tmp_path):
    manifest = manifest_of(hub)
    manifest["huggingface"] = manifest["huggingface"] | {"revision": "d" * 40}
    with pytest.raises(remotes.DownloadError, match="404"):
        download_weights(tmp_path, manifest=manifest, endpoint=hub.url, progress=False)
    download_weights(tmp_path, manifest=manifest, endpoint=hub.url, revision=hub.revision, progress=False)
    assert_bit_exact(hub, tmp_path)


def test_token_goes_to_the_hub_only(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for source, sent in (("huggingface", "Bearer hf_secret"), (f"{hub.url}/plain", None)):
        hub.tokens.clear()
        fetch(hub, tmp_path / str(sent), source=source)
        assert set(hub.tokens) == {sent}


def test_a_source_that_was_verified_is_not_read_again(hub, tmp_path, monkeypatch):
    origin = shutil.copytree(hub.folder, tmp_path / "input")
    assert verify_weights(origin, manifest_of(hub)).ok
    monkeypatch.setattr(checksums, "sha256_of", lambda *a: pytest.fail("read again"))
    assert download_weights(tmp_path / "w", origin, manifest=manifest_of(hub), progress=False).ok
    assert (tmp_path / "w" / LARGE).samefile(origin / LARGE)


def test_a_source_one_folder_too_high_is_told_where_to_look(hub, tmp_path):
    origin = shutil.copytree(hub.folder, tmp_path / "input" / "chatglm" / "1")
    with pytest.raises(FileNotFoundError, match=rf"there is one in {origin}: give that as source"):
        download_weights(tmp_path / "w", tmp_path / "input", manifest=manifest_of(hub), progress=False)
    assert download_weights(tmp_path / "w", origin, manifest=manifest_of(hub), progress=False).ok


def test_folder_is_linked_not_copied(hub, tmp_path):
    origin = tmp_path / "input"
    shutil.copytree(hub.folder, origin)
    report = download_weights(tmp_path / "w", origin, manifest=manifest_of(hub), progress=False)
    assert report.ok
    assert (tmp_path / "w" / LARGE).is_symlink()
    assert (tmp_path / "w" / LARGE).samefile(origin / LARGE)
    assert report.bytes_read == 0, "read once to check, not twice"
    assert not list(origin.glob(".*")), "the source is never written"
    # A wrong copy that was there before is replaced, the source is never touched.
    (tmp_path / "w" / LARGE).unlink()
    (tmp_path / "w" / LARGE).write_bytes(b"old")
    download_weights(tmp_path / "w", origin, manifest=manifest_of(hub), progress=False)
    assert (origin / LARGE).read_bytes() == (hub.folder / LARGE).read_bytes()
    (origin / LARGE).write_bytes(b"x" * (origin / LARGE).stat().st_size)
    with pytest.raises(FileNotFoundError, match=f"wrong bytes in {LARGE}"):
        download_weights(tmp_path / "v", origin, manifest=manifest_of(hub), progress=False)
    (origin / LARGE).unlink()
    with pytest.raises(FileNotFoundError, match="not complete"):
        download_weights(tmp_path / "v", origin, manifest=manifest_of(hub), progress=False)
    assert not list((tmp_path / "v").glob("*.bin"))


def test_the_true_sum_is_checked_not_the_published_total():
    assert total_bytes(read_manifest(PUBLISHED)) == 13_416_906_785 + 2_706_249


def test_a_folder_with_its_own_manifest_is_brought_to_that_one(hub, tmp_path, monkeypatch):
    """What `verify_weights` names as the mending command must mend, and not fetch another model over this one."""
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    (tmp_path / "weights_manifest.json").write_text(json.dumps(manifest_of(hub)))
    (problem, *_) = verify_weights(tmp_path).problems
    assert problem.message.endswith(f"Mend: download_weights({str(tmp_path)!r})")
    assert download_weights(str(tmp_path), progress=False).ok
    assert_bit_exact(hub, tmp_path)
    assert verify_weights(tmp_path).ok


def test_a_checkpoint_that_is_published_nowhere_is_left_alone(tmp_path):
    files = {"a.bin": {"size": 4, "sha256": "0" * 64}}
    (tmp_path / "weights_manifest.json").write_text(json.dumps({"files": files, "mend": "make it again"}))
    (tmp_path / "a.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"no \"huggingface\".*make it again"):
        download_weights(tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == b"mine"


def test_config_of_another_version_is_written_anew(hub, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"vocab_size": 150528}')
    download_weights(tmp_path, manifest=manifest_of(hub), endpoint=hub.url)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 3040
    printed = capsys.readouterr().out
    assert "config.json does not fit" in printed
    assert "[OK]" in printed


def test_config_that_only_says_more_is_kept(hub, tmp_path):
    config = json.loads((hub.folder / "config.json").read_text()) | {"note": "mine"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    fetch(hub, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == config


@pytest.mark.parametrize(
    ("source", "manifest", "words"),
    [
        ("hugingface", None, "source 'hugingface' is unknown"),
        ("huggingface", {"files": {"a.bin": {"size": 1, "sha256": "0" * 64}}}, "repo_id"),
        ("huggingface", {"files": {}}, '"files"'),
        ("huggingface", {"files": {"../a": {"size": 1, "sha256": "0" * 64}}}, "plain file names"),
        ("huggingface", {"files": {"a": {"size": -1, "sha256": "0" * 64}}}, "size of a"),
        ("huggingface", {"files": {"a": {"size": 1, "sha256": "xyz"}}}, "sha256 of a"),
    ],
)
def test_what_cannot_be_a_source(tmp_path, source, manifest, words):
    with pytest.raises(ValueError, match=words):
        download_weights(tmp_path / "w", source, manifest=manifest)
    assert not (tmp_path / "w").exists()


def test_modelscope_through_its_own_package(hub, tmp_path, monkeypatch):
    def model_file_download(model_id, file_path, revision=None, local_dir=None):
        assert model_id == "someone/model"
        target = Path(local_dir) / file_path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(hub.folder / file_path, target)
        return str(target)

    facts = manifest_of(hub) | {"modelscope": {"model_id": "someone/model"}}
    with pytest.raises(ImportError, match="pip install modelscope"):
        download_weights(tmp_path, "modelscope", manifest=facts, progress=False)
    for name in ("modelscope", "modelscope.hub", "modelscope.hub.file_download"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["modelscope.hub.file_download"].model_file_download = model_file_download
    download_weights(tmp_path, "modelscope", manifest=facts, progress=False)
    assert_bit_exact(hub, tmp_path)


def test_names_of_huggingface_hub_that_are_used():
    import inspect

    assert {"GET", "stream"} <= {"GET", *dir(huggingface_hub.get_session())}
    assert isinstance(huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT, int)
    assert {"endpoint", "revision"} <= set(inspect.signature(huggingface_hub.hf_hub_url).parameters)


def test_progress_line():
    bar = progress.TextProgress(4000, 1000, show=False)
    bar.start("a.bin", 2000, 500)
    bar.add(500)
    assert bar.text().startswith("a.bin  50 % 1.00 of 2.00 kB | all  37 % 1.50 of 4.00 kB")
    assert "left" in bar.text()
    assert [progress.clock(seconds) for seconds in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]
    assert progress.percent(999, 1000) == " 99 %"


def test_committed_fault_table_has_rows_that_tests_make():
    tests = " ".join(
        (Path(__file__).parent / f"test_{name}.py").read_text() for name in ("download_faults", "verify", "loading")
    )
    assert read(COMMITTED)
    for fault in read(COMMITTED):
        assert f'"{fault}"' in tests, f"no test causes {fault!r} any more: see tests/fault_table.py"
