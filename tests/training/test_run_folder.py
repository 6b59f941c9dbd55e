"""One training a run folder; a checkpoint whose bytes changed is passed over; a full disk is called one."""

import errno
import io
from pathlib import Path

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from safetensors import SafetensorError

from glmhelpers.training.checkpoint_manager import last_complete, mark_complete, what_is_wrong
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
