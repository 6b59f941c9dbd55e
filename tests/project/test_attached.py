"""Project, weights and adapter in trees like those of Kaggle and Colab, with sparse files of the real sizes."""

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmhelpers.attached import find_adapter, find_real_weights
from glmhelpers.utils import environment, folders
from glmhelpers.utils.folders import cloud_tops, find_folders
from glmhelpers.weights import download
from glmhelpers.weights.hub import DownloadError

ROOT = Path(__file__).resolve().parents[2]
FILES = json.loads((ROOT / "thuglm" / "published" / "weights_manifest.json").read_text())["files"]

MOUNTS = [
    "kaggle/input/chatglm",  # before 2026
    "kaggle/input/datasets/owner/chatglm",
    "kaggle/input/notebooks/owner/download/course/thuglm",  # the output of notebook 01
    "kaggle/input/models/owner/chatglm/pytorch/6b/1",
    "kaggle/input/models/owner/chatglm/pytorch/6b/1/a/b/c/d/e",
    "kaggle/temp/chatglm-6b",
    "kaggle/working/course/thuglm",
    "content/course/thuglm",
    "content/drive/MyDrive/models/chatglm",
]


@pytest.fixture
def project(tmp_path) -> Path:
    (tmp_path / "project").mkdir()
    return tmp_path / "project"


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "root"


def put_weights(folder: Path, without: tuple[str, ...] = ()) -> Path:
    folder.mkdir(parents=True)
    for name, facts in FILES.items():
        if name not in without:
            (folder / name).touch()
            os.truncate(folder / name, facts["size"])
    for name in {"config.json", "pytorch_model.bin.index.json"} - set(without):
        (folder / name).write_text("{}")
    return folder


def put_adapter(folder: Path, without: tuple[str, ...] = ()) -> Path:
    folder.mkdir(parents=True)
    for name in {"adapter_config.json", "adapter_model.safetensors", "course.json"} - set(without):
        (folder / name).write_text("{}")
    return folder


# ---- the search ----


def test_the_nearest_come_first_and_equally_near_ones_by_name(tmp_path):
    for place in ("a/a/a/a", "b/a", "c", "b/b", "a/b/c"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / "mark").touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_folders("mark", [tmp_path])]
    assert found == ["c", "b/a", "b/b", "a/b/c", "a/a/a/a"]


def test_a_huge_data_set_does_not_hide_what_lies_beside_it(tmp_path, capsys):
    for number in range(100):
        (tmp_path / "a-million" / f"{number:03}" / "pictures").mkdir(parents=True)
        (tmp_path / "b" / f"{number % 10}" / f"{number:03}").mkdir(parents=True)
    deep = tmp_path / "z" / "owner" / "slug" / "version" / "course"
    deep.mkdir(parents=True)
    (deep / "mark").touch()
    assert find_folders("mark", [tmp_path], max_folders=20) == [deep]
    assert "[NOTE] stopped looking for mark below" in capsys.readouterr().out
    assert find_folders("mark", [tmp_path], max_seconds=-1) == []
    assert "after 0 folders" in capsys.readouterr().out


def test_links_in_a_circle_and_closed_or_missing_folders_end_nothing(tmp_path, capsys):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a" / "itself").symlink_to(tmp_path / "a" / "itself")
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "mark").touch()
    try:
        assert find_folders("mark", [tmp_path, tmp_path / "not there"]) == [tmp_path / "z"]
    finally:
        (tmp_path / "closed").chmod(0o700)
    assert capsys.readouterr().out == ""


def test_a_folder_behind_a_link_is_found_once(tmp_path):
    (tmp_path / "real" / "set").mkdir(parents=True)
    (tmp_path / "real" / "set" / "mark").touch()
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "set").symlink_to(tmp_path / "real" / "set")
    (tmp_path / "input" / "twin").symlink_to(tmp_path / "real" / "set")
    assert find_folders("mark", [tmp_path / "input"]) == [tmp_path / "input" / "set"]


def test_the_rest_of_a_drive_is_left_alone(root):
    for place in ("content/drive/MyDrive/a", "content/drive/Shareddrives/b"):
        (root / place).mkdir(parents=True)
        (root / place / "mark").touch()
    assert find_folders("mark", cloud_tops(root)) == [root / "content/drive/MyDrive/a"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), min_size=1, max_size=12), st.data())
def test_the_order_is_that_of_a_sorted_listing(places, data):
    marked = data.draw(st.lists(st.sampled_from(places), unique_by=tuple))
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        for place in places:
            top.joinpath(*place).mkdir(parents=True, exist_ok=True)
        for place in marked:
            top.joinpath(*place, "mark").touch()
        wanted = sorted((path.parent for path in top.rglob("mark")), key=lambda path: (len(path.parts), path.parts))
        assert find_folders("mark", [top]) == wanted


# ---- weights ----


@pytest.mark.parametrize("place", MOUNTS)
def test_weights_are_found_wherever_a_cloud_puts_them(project, root, place):
    assert find_real_weights(project, root) is None
    folder = put_weights(root / place)
    said = []
    assert find_real_weights(project, root, said.append) == folder
    road = "the attached input" if "input" in place else "Drive" if "Drive" in place else "this machine"
    assert said[0].startswith(f"weights: from {road}")
    assert str(folder) in said[0]


def test_complete_weights_win_over_nearer_ones_and_both_are_named(project, root):
    half = put_weights(root / "kaggle/input/half", without=("pytorch_model-00004-of-00008.bin",))
    said = []
    assert find_real_weights(project, root, said.append) is None
    assert "pytorch_model-00004-of-00008.bin missing or of a wrong size" in said[0]
    far = put_weights(root / "kaggle/input/models/owner/chatglm/pytorch/6b/1")
    assert find_real_weights(project, root, said.append) == far
    assert said[1] == f"weights: from the attached input {far}; not taken: {half} (incomplete)"
    near = put_weights(root / "kaggle/input/datasets/owner/chatglm")
    assert find_real_weights(project, root, said.append) == near
    assert str(far) in said[2].split("not taken")[1]
    own = put_weights(project / "thuglm")
    assert find_real_weights(project, root) == own


@pytest.mark.parametrize("lacking", ["config.json", "pytorch_model.bin.index.json", "pytorch_model-00008-of-00008.bin"])
def test_weights_that_would_not_load_are_not_complete(project, root, lacking):
    put_weights(root / "kaggle/input/x", without=(lacking,))
    said = []
    assert find_real_weights(project, root, said.append) is None
    assert lacking in said[0]


def test_a_tokenizer_alone_and_other_checkpoints_are_not_spoken_of(project, root):
    put_weights(root / "kaggle/input/tokenizer", without=tuple(set(FILES) - {"ice_text.model"}))
    shutil.copytree(ROOT / "data" / "tiny-chatglm", root / "kaggle/input/tiny")
    said = []
    assert find_real_weights(project, root, said.append) is None
    assert said == []


def test_a_download_from_a_folder_too_high_names_the_right_one(tmp_path):
    deep = put_weights(tmp_path / "notebooks/owner/slug/version/course/thuglm")
    with pytest.raises(FileNotFoundError, match=f"there is one in {deep}: give that as source"):
        download.download_weights(tmp_path / "new", tmp_path / "notebooks", progress=False)


# ---- weights that must be fetched again ----


def test_wanted_weights_are_fetched_again_and_the_road_is_said(root, monkeypatch, capsys):
    from glmhelpers import runtime

    two = [runtime.InstalledGPU(index, "Tesla T4", 15 * 2**30, 15 * 2**30) for index in range(2)]
    monkeypatch.setattr(runtime, "list_gpus", lambda: two)
    monkeypatch.setattr(runtime, "find_real_weights", lambda *_, **__: None)
    monkeypatch.setattr(folders, "ROOT", root)
    monkeypatch.setattr(runtime, "machine_name", lambda: "Kaggle")
    monkeypatch.delenv("GLM_WEIGHTS", raising=False)
    monkeypatch.setattr(download, "download_weights", lambda folder, source: put_weights(folder))
    run = runtime.choose(source="modelscope")
    assert run.folder == root / "kaggle/temp/chatglm-6b"
    assert not run.is_tiny
    printed = capsys.readouterr().out
    assert printed.startswith("weights: neither here nor attached, so they are fetched from modelscope to ")
    assert "[NOTE]" not in printed

    def broken(folder, source):
        raise DownloadError("the connection broke off")

    monkeypatch.setattr(download, "download_weights", broken)
    with pytest.raises(DownloadError, match=r"(?s)broke off.*Settings > Internet > On; or attach.*WEIGHTS = .tiny."):
        runtime.choose("real", source="huggingface")


# ---- adapter ----


def test_adapter_of_this_session_then_the_nearest_complete_one(root, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="run notebook 04 here, or attach its output"):
        find_adapter(output=tmp_path / "out", root=root)
    put_adapter(root / "kaggle/input/half", without=("adapter_model.safetensors",))
    with pytest.raises(FileNotFoundError, match=r"no complete adapter in .*half"):
        find_adapter(output=tmp_path / "out", root=root)
    drive = put_adapter(root / "content/drive/MyDrive/chatglm/one/still/deeper/adapter")
    assert find_adapter(output=tmp_path / "out", root=root) == drive
    assert capsys.readouterr().out.startswith(f"adapter: from Drive, {drive}; not taken: ")
    notebook = put_adapter(root / "kaggle/input/notebooks/owner/training/adapter")
    assert find_adapter(output=tmp_path / "out", root=root) == notebook
    assert f"adapter: from the attached input {notebook}" in capsys.readouterr().out
    own = put_adapter(tmp_path / "out" / "adapter")
    assert find_adapter(output=tmp_path / "out", root=root) == own
    assert capsys.readouterr().out.startswith("adapter: from this machine")
    assert find_adapter(str(drive), tmp_path / "out", root) == drive
    with pytest.raises(FileNotFoundError, match=r"no complete adapter in .*wrong"):
        find_adapter(tmp_path / "wrong", tmp_path / "out", root)


# ---- project ----


def test_our_own_place_wins_over_a_clone_on_a_cloud(root, tmp_path):
    (root / "content/course/glmhelpers").mkdir(parents=True)
    (root / "content/course/glmhelpers/runtime.py").touch()
    assert environment.find_project(tmp_path, root) == ROOT
    assert environment.find_project(root / "content/course/glmhelpers", root) == root / "content/course"


@pytest.mark.parametrize("place", ["content/course", "kaggle/input/datasets/o/s/course-main", "kaggle/input/a/b/c/d/e"])
def test_an_installed_package_finds_the_project_on_a_cloud(root, tmp_path, monkeypatch, place):
    monkeypatch.setattr(environment, "OWN_PLACE", tmp_path / "site-packages")
    with pytest.raises(FileNotFoundError, match="clone the project"):
        environment.find_project(tmp_path, tmp_path / "nothing")
    (root / place / "glmhelpers").mkdir(parents=True)
    (root / place / "glmhelpers/runtime.py").touch()
    assert environment.find_project(tmp_path, root) == root / place


def test_a_folder_of_outputs_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GLM_OUTPUT", str(tmp_path / "file" / "out"))
    with pytest.raises(OSError, match=r"%env GLM_OUTPUT=/a/folder"):
        environment.output_folder()


def test_a_drive_whose_session_has_ended_hides_nothing_else(root, tmp_path, monkeypatch, capsys):
    adapter = root / "content" / "adapter"
    adapter.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_text("{}")
    broken, stat = root / "content" / "drive" / "MyDrive", os.stat
    broken.mkdir(parents=True)

    def of_a_broken_mount(path, *args, **more):
        if str(path).startswith(str(broken)):
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected", str(path))
        return stat(path, *args, **more)

    monkeypatch.setattr(os, "stat", of_a_broken_mount)
    assert broken not in cloud_tops(root)
    assert find_adapter(output=broken / "outputs", root=root) == adapter
    assert find_real_weights(tmp_path, root) is None
    capsys.readouterr()
