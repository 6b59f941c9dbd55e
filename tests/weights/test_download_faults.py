"""Everything that goes wrong while weights are fetched, caused for real on loopback; then the second call."""

# ruff: noqa: F811 - a fixture that is imported has the name of the parameters that ask for it

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import huggingface_hub
import pytest

from glmhelpers.weights import download
from glmhelpers.weights import hub as remotes
from glmhelpers.weights.download import download_weights
from glmhelpers.weights.hub import DownloadError
from glmhelpers.weights.manifest import total_bytes
from glmhelpers.weights.verify import verify_weights
from tests.helpers.fault_table import check_row
from tests.helpers.hub_case import (  # noqa: F401
    CHUNK,
    LARGE,
    assert_bit_exact,
    assert_no_wrong_file,
    fetch,
    hub,
    manifest_of,
    published,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("fault", "first_answers", "resumes"),
    [
        ("connection cut in the middle, then refused", ["cut"] + ["refuse"] * 8, True),
        ("body shorter than the file", ["truncated"], True),
        ("wrong bytes from the source", ["wrong bytes"], False),
        ("file not there (404)", ["404"], False),
        ("refused (401)", ["401"], False),
        ("too many requests (429), again and again", ["429"] * 8, False),
        ("server error (500)", ["500"], False),
        ("no answer at all", ["refuse"] * 8, False),
        ("a web page instead of the file", ["web page"], False),
        ("a git-lfs pointer instead of the file", ["pointer"], False),
        ("another file, longer than published", ["longer"], False),
        ("another file, shorter than what came before (416)", ["cut", "416"], True),
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
    ("fault", "says"),
    [
        ("endless", "more than the 427,140 bytes that were published"),
        ("drip", "sent only .* bytes in .*call download_weights again"),
        ("dripping header", "did not finish the header of its answer in .*call download_weights again"),
        ("dripping status", "did not finish the header of its answer in .*call download_weights again"),
        ("packed drip", "sent only .* bytes in .*call download_weights again"),
        ("come back in 31 years", "come back in 1000000000 s"),
        ("bomb", "more than the"),
        ("bomb in a bomb", "gzip, gzip"),
        ("another packing", "zstd"),
    ],
)
def test_a_server_cannot_take_time_or_disk_without_limit(hub, tmp_path, monkeypatch, fault, says):
    hub.faults[LARGE] = [fault]
    sizes, judge = [], remotes.wrong_answer
    with monkeypatch.context() as patch:
        patch.setattr(remotes, "PATIENCE", 0.3 if "drip" in fault else 30.0)
        patch.setattr(remotes, "wrong_answer", lambda part, *a: sizes.append(part.stat().st_size) or judge(part, *a))
        with pytest.raises(DownloadError, match=says):
            fetch(hub, tmp_path)
    assert sizes[-1] <= manifest_of(hub)["files"][LARGE]["size"] + 1, "never more on the disk than was published"
    assert_no_wrong_file(hub, tmp_path)
    fetch(hub, tmp_path)
    assert_bit_exact(hub, tmp_path)


@pytest.mark.parametrize("fault", ["400", "410", "451", "304", "sent in a circle", "sent to a file"])
def test_what_no_second_try_can_mend_is_not_called_a_broken_connection(hub, tmp_path, fault):
    hub.faults[LARGE] = [fault] * 30
    with pytest.raises(DownloadError, match=f"does not give {LARGE} .*a second try is no help") as caught:
        fetch(hub, tmp_path)
    assert "broke off" not in str(caught.value)
    assert_no_wrong_file(hub, tmp_path)


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


def test_a_packed_answer_is_unpacked_from_the_beginning(hub, tmp_path):
    hub.faults[LARGE] = ["cut", "packed"]
    assert fetch(hub, tmp_path).ok
    assert_bit_exact(hub, tmp_path)


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
        "from glmhelpers.weights import download_weights\n"
        f"download_weights({str(tmp_path / 'w')!r}, manifest={str(tmp_path / 'm.json')!r})"
    )
    env = os.environ | {"HF_ENDPOINT": hub.url, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    worker = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    part = tmp_path / "w" / f"{LARGE}.part"
    deadline = time.monotonic() + 240
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


SETTINGS = [
    ({"HF_ENDPOINT": "hf-mirror.example"}, "HF_ENDPOINT"),
    ({"HF_ENDPOINT": "https//mirror.example"}, "HF_ENDPOINT"),
    ({"HF_ENDPOINT": "https://"}, "HF_ENDPOINT"),
    ({"HF_ENDPOINT": "\u201chttps://mirror.example\u201d"}, "HF_ENDPOINT"),
    ({"HF_TOKEN": "\u201chf_abc\u201d"}, "HF_TOKEN"),
    ({"HF_TOKEN": "hf_令牌"}, "HF_TOKEN"),
    ({"HF_TOKEN": "hf_abc def"}, "HF_TOKEN"),
    ({"ALL_PROXY": "socks5://user:secret@127.0.0.1:1"}, "ALL_PROXY.*socksio"),
    ({"https_proxy": "socks://127.0.0.1:1"}, "https_proxy"),
    *(
        ({"HTTPS_PROXY": f"{scheme}user:secret@{place}"}, f"HTTPS_PROXY is '{place}', no address of a proxy: write it")
        for scheme in ("http://", "")
        for place in ("127.0.0.1:abc", "127.0.0.1:99999", "127.0.0.1:0", ":80")
    ),
    ({"HTTP_PROXY": "https//127.0.0.1:1"}, "HTTP_PROXY is 'https//127.0.0.1:1', no address of a proxy"),
    ({"ALL_PROXY": "http://"}, "ALL_PROXY is 'http://', no address of a proxy"),
    ({"all_proxy": " "}, "all_proxy is ' ', no address of a proxy"),
    ({"http_proxy": "ftp://127.0.0.1:1"}, "http_proxy is 'ftp://127.0.0.1:1', no address of a proxy"),
    ({"HTTP_PROXY": "http://[::1"}, "HTTP_PROXY is 'http://\\[::1', no address of a proxy"),
    ({"HTTP_PROXY": "http://ü ser:1"}, "HTTP_PROXY.* cannot be used .*write it as"),
    ({"SSL_CERT_FILE": "/nowhere/ca.pem"}, "SSL_CERT_FILE is '/nowhere/ca.pem', which cannot be used .*No such file"),
    ({"SSL_CERT_FILE": __file__}, "SSL_CERT_FILE"),
]


@pytest.mark.parametrize(("settings", "named"), SETTINGS, ids=[str(settings) for settings, _ in SETTINGS])
def test_a_setting_that_no_second_try_can_mend_is_named(hub, tmp_path, monkeypatch, settings, named):
    huggingface_hub.close_session()
    with monkeypatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        for name, value in settings.items():
            patch.setenv(name, value)
        with pytest.raises(remotes.SettingError, match=named) as caught:
            download_weights(tmp_path, manifest=manifest_of(hub), progress=False)
    assert "again" not in str(caught.value).replace("copy it again", "")
    assert "secret" not in str(caught.value)
    assert "hf_" not in str(caught.value)
    assert hub.requests == []
    assert fetch(hub, tmp_path).ok, "mended in the same process, the next call works"


def test_offline_is_named_and_no_matter_where_all_is_here(hub, tmp_path, monkeypatch):
    fetch(hub, tmp_path / "all")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    with pytest.raises(remotes.SettingError, match=r"TRANSFORMERS_OFFLINE forbids.*restart the kernel"):
        fetch(hub, tmp_path / "none")
    assert fetch(hub, tmp_path / "all").ok


def test_a_proxy_that_cannot_be_reached_is_named_and_not_kept(hub, tmp_path, monkeypatch):
    huggingface_hub.close_session()
    with monkeypatch.context() as patch:
        patch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        patch.setenv("HTTPS_PROXY", "http://127.0.0.1:2")  # not asked for an address that begins with http
        with pytest.raises(DownloadError, match=r"through the proxy of HTTP_PROXY \(.*whether HTTP_PROXY is right"):
            fetch(hub, tmp_path)
    assert fetch(hub, tmp_path).ok


def test_a_proxy_that_is_none_does_no_harm_where_none_is_used(hub, tmp_path, monkeypatch):
    huggingface_hub.close_session()
    monkeypatch.setenv("HTTP_PROXY", "https//127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "localhost, *")
    assert fetch(hub, tmp_path).ok


def test_no_way_to_the_server(hub, tmp_path):
    with pytest.raises(DownloadError, match=r"HF_ENDPOINT.*modelscope") as caught:
        download_weights(tmp_path, manifest=manifest_of(hub), endpoint="http://127.0.0.1:1", progress=False)
    fetch(hub, tmp_path)
    assert_bit_exact(hub, tmp_path)
    check_row("no way to the server", str(caught.value), "bit-exact from a mirror that can be reached", tmp_path)


def refuse_to_write(monkeypatch) -> None:
    """Root may write everywhere, so the refusal of a read-only file system is played."""

    def refuses(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuses)


def test_a_folder_that_cannot_be_written(hub, tmp_path, monkeypatch):
    refuse_to_write(monkeypatch)
    with pytest.raises(OSError, match=r"cannot be written.*choose another folder") as caught:
        fetch(hub, tmp_path)
    assert caught.value.errno == errno.EROFS
    assert hub.requests == []
    assert list(tmp_path.iterdir()) == []
    message = str(caught.value.strerror)
    check_row("read-only folder", message, "nothing was fetched; choose the folder it names", tmp_path)
    with pytest.raises(FileExistsError, match="cannot be written"):
        fetch(hub, hub.folder / LARGE)


def test_a_read_only_folder_with_all_files_is_fine(hub, tmp_path, monkeypatch):
    folder = shutil.copytree(hub.folder, tmp_path / "input")
    refuse_to_write(monkeypatch)
    assert fetch(hub, folder).ok
    assert hub.requests == []
    (folder / LARGE).write_bytes((folder / LARGE).read_bytes()[:-1] + b"x")
    os.utime(folder / LARGE, ns=(1, 1))
    with pytest.raises(OSError, match="cannot be written"):
        fetch(hub, folder)


def test_a_part_that_is_a_link_is_not_written_through(hub, tmp_path):
    (tmp_path / "mine").write_bytes(b"precious")
    (tmp_path / f"{LARGE}.part").symlink_to(tmp_path / "mine")
    fetch(hub, tmp_path)
    assert_bit_exact(hub, tmp_path)
    assert (tmp_path / "mine").read_bytes() == b"precious"
    assert not (tmp_path / LARGE).is_symlink()


def test_killed_between_the_last_byte_and_the_name(hub, tmp_path):
    shutil.copy(hub.folder / LARGE, tmp_path / f"{LARGE}.part")
    fetch(hub, tmp_path)
    assert_bit_exact(hub, tmp_path)
    assert LARGE not in {name for name, _, _ in hub.requests}


def test_two_downloads_to_one_folder(hub, tmp_path):
    from filelock import FileLock

    with FileLock(tmp_path / ".weights.lock"), pytest.raises(OSError, match="another process") as caught:
        fetch(hub, tmp_path)
    assert caught.value.errno == errno.EBUSY
    check_row("two downloads to one folder", str(caught.value.strerror), "wait for the first one", tmp_path)


def test_disk_too_small(hub, tmp_path, monkeypatch):
    need = sum(facts["size"] for facts in manifest_of(hub)["files"].values()) + download.SPARE_BYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=need // 2))
    with pytest.raises(OSError, match="are free") as caught:
        fetch(hub, tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert "/kaggle/temp" in str(caught.value)
    assert "Colab" in str(caught.value)
    assert hub.requests == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=need))
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


@pytest.mark.parametrize("answers", [["404"], ["refuse"] * 8, ["endless"], ["web page"], ["410"]])
def test_a_password_in_an_address_is_sent_and_not_shown(hub, tmp_path, answers):
    hub.faults[LARGE] = answers
    address = hub.url.replace("//", "//somebody:geheim@") + "/plain"
    with pytest.raises(DownloadError) as caught:
        remotes.Remote(manifest_of(hub), address).fetch(LARGE, tmp_path / "part", 427_140, lambda count: None)
    assert "geheim" not in str(caught.value)
    assert "Basic" in hub.tokens[-1]
