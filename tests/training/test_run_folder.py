"""One training a run folder; a checkpoint whose bytes changed is passed over; a full disk is called one."""

import errno
import io
from pathlib import Path

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from safetensors import SafetensorError

from glmhelpers.training.checkpoint_manager import (
    checkpoints,
    keep_last,
    last_complete,
    mark_complete,
    what_is_wrong,
)
from glmhelpers.training.guards import NoLabelsError, TrainingStoppedError
from glmhelpers.utils.files import alone, room_for
from glmhelpers.weights.hub import DownloadError, SettingError
from tests.helpers.resumable_run import run


def test_two_trainings_in_one_run_folder(tmp_path):
    run(tmp_path, max_steps=1)
    (folder,) = tmp_path.iterdir()
    before = sorted(folder.rglob("*"))
    with alone(folder), pytest.raises(OSError, match="another process is training in") as caught:
        run(tmp_path, max_steps=1)
    assert caught.value.errno == errno.EBUSY
    assert sorted(folder.rglob("*")) == before
    run(tmp_path, max_steps=1)


def test_changed_bytes_of_the_same_size_are_seen_and_said(tmp_path, capsys):
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(b"moments")
        mark_complete(folder, step=step)
    (folder / "optimizer.pt").write_bytes(b"moment5")
    assert last_complete(tmp_path).name == "checkpoint-5"
    assert "checkpoint-10 is skipped: optimizer.pt has other bytes than were written" in capsys.readouterr().out


def test_others_may_read_a_checkpoint_as_they_may_its_folder(tmp_path):
    (tmp_path / "adapter_model.safetensors").touch(mode=0o600)
    tmp_path.chmod(0o755)
    mark_complete(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_marker_with_sizes_only_is_still_read(tmp_path):
    (tmp_path / "optimizer.pt").write_bytes(b"moments")
    (tmp_path / "complete.json").write_text('{"files": {"optimizer.pt": 7}}')
    assert what_is_wrong(tmp_path) is None


def test_a_full_disk_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    save = torch.save

    def to_a_full_disk(content, path, *args, **more):
        save(content, "/dev/full" if Path(str(path)).name == "optimizer.pt" else path, *args, **more)

    run(tmp_path, max_steps=2, save_steps=1)
    (folder,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", to_a_full_disk)
        with pytest.raises(OSError, match=r"the disk is full: .*checkpoint-") as caught:
            run(tmp_path, max_steps=3, save_steps=1)
    assert caught.value.errno == errno.ENOSPC
    full = [path for path in tmp_path.iterdir() if path != folder]
    assert not list(full[0].glob("checkpoint-*")), "what was half written makes room"
    run(tmp_path, max_steps=3, save_steps=1)


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ],
)
def test_every_library_s_words_for_a_full_disk(tmp_path, error):
    (tmp_path / "half").write_bytes(b"x")
    with pytest.raises(OSError, match="the disk is full") as caught, room_for(tmp_path / "half"):
        raise error
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [DownloadError, SettingError, TrainingStoppedError, NoLabelsError])
def test_jupyter_shows_the_sentence_alone(kind):
    shell = InteractiveShell()
    shown = []
    shell._showtraceback = lambda kind, value, lines: shown.extend(lines)
    try:
        raise kind("what happened, and what to do") from KeyError("200 lines")
    except kind:
        shell.showtraceback()
    assert shown == [f"{kind.__name__}: what happened, and what to do"]


def test_another_error_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), room_for(tmp_path):
        raise RuntimeError("shapes do not fit")
    with pytest.raises(io.UnsupportedOperation), room_for(tmp_path):
        raise io.UnsupportedOperation("no")


@pytest.mark.parametrize(
    ("marker", "says"),
    [
        ("[]", "cannot be read"),
        ("null", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"files": [1]}', "cannot be read"),
        ('{"files": {}}', "names no file"),
        ('{"files": {"a": 1}, "sha256": 7}', "cannot be read"),
        ('{"files": {"a": "7"}}', "a has 1 bytes, 7 were written"),
        ('{"files": {"a": null}}', "a has 1 bytes, None were written"),
        ('{"files": {"a": 1}, "sha256": {"a": []}}', "other bytes"),
        ('{"files": {"\\u0000": 1}}', "is missing"),
        ('{"files": {"' + "a" * 5000 + '": 1}}', "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_any_marker_is_judged_and_the_checkpoint_before_it_is_taken(tmp_path, marker, says):
    good, bad = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    for folder in (good, bad):
        folder.mkdir()
        (folder / "a").write_bytes(b"1")
    mark_complete(good)
    if marker is None:
        (bad / "complete.json").mkdir()
    else:
        (bad / "complete.json").write_text(marker)
    said = []
    assert last_complete(tmp_path, said.append) == good
    assert says in said[0]


def test_folders_that_only_look_like_checkpoints_and_links_are_left_alone(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    run_folder = tmp_path / "run"
    for folder in (elsewhere, *(run_folder / f"checkpoint-{name}" for name in ("2", "3", "²", "-1", "1e3"))):
        folder.mkdir(parents=True)
        (folder / "a").write_bytes(b"1")
        mark_complete(folder)
    (run_folder / "checkpoint-1").symlink_to(elsewhere)
    assert [path.name for path in checkpoints(run_folder)] == ["checkpoint-3", "checkpoint-2", "checkpoint-1"]
    keep_last(run_folder, 1)
    assert what_is_wrong(elsewhere) is None
    assert sorted(path.name for path in run_folder.iterdir()) == [
        f"checkpoint-{name}" for name in ("-1", "1", "1e3", "3", "²")
    ]
