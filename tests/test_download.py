import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import huggingface_hub
import pytest
import torch
from fault_table import COMMITTED, check_row, read
from hub_server import Hub

from glmhelpers import download, progress, remotes
from glmhelpers.download import download_weights
from glmhelpers.manifest import PUBLISHED, read_manifest, total_bytes
from glmhelpers.remotes import DownloadError
from glmhelpers.verify import verify_weights

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = Path(__file__).parent / "data" / "reference"
LARGE = "pytorch_model-00001-of-00008.bin"
CHUNK = 65536


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """What the hub has: the reference checkpoint with its tokenizer."""
    folder = tmp_path_factory.mktemp("published")
    for path in [*(REFERENCE / "checkpoint").iterdir(), *(REFERENCE / "tokenizer").iterdir()]:
        shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture
def hub(published, monkeypatch):
    # Small files must be able to break in the middle, and nobody wants to wait between retries.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    asleep = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr(huggingface_hub.file_download, "time", asleep)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", asleep)
    with Hub(published) as hub:
        yield hub


def manifest_of(hub: Hub) -> dict:
    config = json.loads((hub.folder / "config.json").read_text())
    tokenizer_config = json.loads((hub.folder / "tokenizer_config.json").read_text())
    return hub.manifest(config=config, tokenizer_config=tokenizer_config)


def fetch(hub: Hub, folder: Path, **more):
    return download_weights(folder, manifest=manifest_of(hub), endpoint=hub.url, progress=False, **more)


def assert_bit_exact(hub: Hub, folder: Path) -> None:
    for name in manifest_of(hub)["files"]:
        assert (folder / name).read_bytes() == (hub.folder / name).read_bytes(), name
    assert not list(folder.glob("*.part"))


def assert_no_wrong_file(hub: Hub, folder: Path) -> None:
    for name, facts in manifest_of(hub)["files"].items():
        if (folder / name).exists():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == facts["sha256"], name


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


def test_token_goes_to_the_hub_only(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    seen = []
    monkeypatch.setattr(remotes, "http_get", lambda url, file, **more: seen.append(more["headers"]))
    for source, sent in (("huggingface", True), ("https://example.invalid/x", False)):
        seen.clear()
        remotes.Remote(manifest_of(hub), source, hub.url).fetch(LARGE, tmp_path / "x.part", 1, lambda count: None)
        assert any("hf_secret" in str(value) for value in seen[0].values()) is sent


def test_folder_is_linked_not_copied(hub, tmp_path):
    origin = tmp_path / "input"
    shutil.copytree(hub.folder, origin)
    report = download_weights(tmp_path / "w", origin, manifest=manifest_of(hub), progress=False)
    assert report.ok
    assert (tmp_path / "w" / LARGE).is_symlink()
    assert (tmp_path / "w" / LARGE).samefile(origin / LARGE)
    assert report.bytes_read == 0, "read once to check, not twice"
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


@pytest.mark.parametrize(
    ("fault", "first_answers", "resumes"),
    [
        ("connection cut in the middle, then refused", ["cut"] + ["refuse"] * 8, True),
        ("body shorter than the file", ["truncated"], True),
        ("wrong bytes from the source", ["wrong bytes"], False),
        ("file not there (404)", ["404"], False),
        ("too many requests (429), again and again", ["429"] * 8, False),
        ("server error (500)", ["500"], False),
        ("no answer at all", ["refuse"] * 8, False),
    ],
)
def test_fault_then_second_call(hub, tmp_path, fault, first_answers, resumes):
    hub.faults[LARGE] = first_answers
    with pytest.raises(DownloadError) as caught:
        fetch(hub, tmp_path)
    assert LARGE in str(caught.value)
    assert not (tmp_path / LARGE).exists()
    assert_no_wrong_file(hub, tmp_path)
    hub.faults.clear()
    hub.requests.clear()
    fetch(hub, tmp_path)
    assert_bit_exact(hub, tmp_path)
    assert hub.resumed(LARGE) is resumes
    asked = {name for name, _, _ in hub.requests}
    assert asked == {LARGE} | {name for name in asked if name > LARGE}, "what was good is not fetched again"
    how = "went on where it stopped" if resumes else "fetched the file from its beginning"
    check_row(fault, str(caught.value), f"the second call {how}; bit-exact", tmp_path)


@pytest.mark.parametrize(
    ("fault", "answers"),
    [
        ("connection cut once", ["cut"]),
        ("too many requests (429), twice", ["429", "429"]),
        ("slow", ["slow"]),
        ("cut, and the server cannot resume", ["cut", "no range"]),
    ],
)
def test_fault_mended_within_the_call(hub, tmp_path, fault, answers):
    hub.faults[LARGE] = answers
    assert fetch(hub, tmp_path).ok
    assert_bit_exact(hub, tmp_path)
    check_row(fault, "(none: it is tried again)", "none needed; bit-exact", tmp_path)


def test_wrong_beginning_is_thrown_away_and_fetched_once_more(hub, tmp_path):
    (tmp_path / f"{LARGE}.part").write_bytes(b"<html>sign in to this network</html>")
    fetch(hub, tmp_path)
    assert_bit_exact(hub, tmp_path)
    assert [first > 0 for name, first, _ in hub.requests if name == LARGE] == [True, False]
    check_row(
        "a network's sign-in page at the beginning", "(none)", "thrown away, fetched once more; bit-exact", tmp_path
    )


def test_part_longer_than_the_file(hub, tmp_path):
    (tmp_path / f"{LARGE}.part").write_bytes(b"x" * 10**6)
    fetch(hub, tmp_path)
    assert_bit_exact(hub, tmp_path)


@pytest.mark.parametrize("kind", ["truncated", "checksum", "lfs_pointer"])
def test_wrong_file_under_its_final_name_is_replaced(hub, tmp_path, kind):
    fetch(hub, tmp_path)
    data = (hub.folder / LARGE).read_bytes()
    wrong = {
        "truncated": data[:200_000],
        "checksum": data[:-1] + bytes([data[-1] ^ 255]),
        "lfs_pointer": b"version https://git-lfs.example/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n",
    }[kind]
    (tmp_path / LARGE).write_bytes(wrong)
    assert [problem.kind for problem in verify_weights(tmp_path, manifest_of(hub)).problems] == [kind]
    hub.requests.clear()
    hub.faults[LARGE] = ["404"]
    with pytest.raises(DownloadError):
        fetch(hub, tmp_path)
    assert not (tmp_path / LARGE).exists()
    fetch(hub, tmp_path)
    assert_bit_exact(hub, tmp_path)
    assert {name for name, _, _ in hub.requests} == {LARGE}
    assert hub.resumed(LARGE) is (kind == "truncated")


def test_killed_half_way(hub, tmp_path):
    hub.faults[LARGE] = ["slow"]
    (tmp_path / "m.json").write_text(json.dumps(manifest_of(hub)))
    code = (
        f"from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = {CHUNK}\n"
        "from glmhelpers.weights import download_weights\n"
        f"download_weights({str(tmp_path / 'w')!r}, manifest={str(tmp_path / 'm.json')!r})"
    )
    env = os.environ | {"HF_ENDPOINT": hub.url, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    worker = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    part = tmp_path / "w" / f"{LARGE}.part"
    deadline = time.monotonic() + 60
    while not (part.is_file() and part.stat().st_size >= CHUNK):
        assert worker.poll() is None, worker.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    assert part.is_file()
    assert not (tmp_path / "w" / LARGE).exists()
    hub.requests.clear()
    fetch(hub, tmp_path / "w")
    assert_bit_exact(hub, tmp_path / "w")
    assert hub.resumed(LARGE)
    check_row(
        "process killed half-way (SIGKILL)",
        "(none: it is gone)",
        "the second call went on where it stopped; bit-exact",
        tmp_path,
    )


def test_two_downloads_to_one_folder(hub, tmp_path):
    from filelock import FileLock

    with FileLock(tmp_path / ".weights.lock"), pytest.raises(OSError, match="another process") as caught:
        fetch(hub, tmp_path)
    assert caught.value.errno == errno.EBUSY
    check_row("two downloads to one folder", str(caught.value.strerror), "wait for the first one", tmp_path)


def test_disk_too_small(hub, tmp_path, monkeypatch):
    need = sum(facts["size"] for facts in manifest_of(hub)["files"].values()) + download.SPARE_BYTES
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=need // 2))
    with pytest.raises(OSError, match="are free") as caught:
        fetch(hub, tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert "/kaggle/temp" in str(caught.value)
    assert "Colab" in str(caught.value)
    assert hub.requests == []
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=need))
    fetch(hub, tmp_path)
    monkeypatch.undo()
    check_row("disk too small", str(caught.value.strerror), "nothing was touched; choose the folder it names", tmp_path)


def test_disk_check_counts_what_is_there(hub, tmp_path):
    facts = manifest_of(hub)
    half = facts["files"][LARGE]["size"] // 2
    (tmp_path / f"{LARGE}.part").write_bytes(b"x" * half)
    wanted = download.wrong_or_missing(tmp_path, facts)
    assert set(wanted) == set(facts["files"])
    assert download.check_disk(tmp_path, facts, wanted) == total_bytes(facts) - half


def test_the_true_sum_is_checked_not_the_published_total():
    assert total_bytes(read_manifest(PUBLISHED)) == 13_416_906_785 + 2_706_249


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

    wanted = {"url", "temp_file", "resume_size", "headers", "expected_size", "displayed_filename", "tqdm_class"}
    assert wanted <= set(inspect.signature(huggingface_hub.file_download.http_get).parameters)
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
        (Path(__file__).parent / f"test_{name}.py").read_text() for name in ("download", "verify", "loading")
    )
    assert read(COMMITTED)
    for fault in read(COMMITTED):
        assert f'"{fault}"' in tests, f"no test causes {fault!r} any more: see tests/fault_table.py"
