"""The parts of the rehearsal that need no GPU: the stand-in for the hub, the copy of the project, the disguise, the table."""

import json
import os
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import nbformat
import psutil
import pytest
import torch

from benchmarks import as_t4, rehearsal
from glmhelpers.weights import download_weights


def test_a_copied_project_downloads_from_the_loopback_hub_by_default(grown, tmp_path, monkeypatch):
    rehearsal.copy_project(grown, tmp_path)
    assert not list((tmp_path / "thuglm").glob("*.bin"))
    assert (tmp_path / "notebooks" / "01_download_weights.ipynb").is_file()
    server = rehearsal.serve(grown)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    try:
        report = download_weights(tmp_path / "thuglm", progress=False)
    finally:
        server.shutdown()
        server.server_close()
    assert report.ok
    for path in grown.glob("*.bin"):
        assert (tmp_path / "thuglm" / path.name).read_bytes() == path.read_bytes()


def test_a_gpu_looks_like_a_t4(monkeypatch):
    real = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30, multi_processor_count=132)
    shares, switched = {}, []
    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_properties": lambda device=None: real,
        "get_device_name": lambda device=None: real.name,
        "mem_get_info": lambda device=None: (70 * 2**30, 80 * 2**30),
        "set_per_process_memory_fraction": lambda share, device: shares.update({device: share}),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for name in ("enable_flash_sdp", "enable_cudnn_sdp"):
        monkeypatch.setattr(torch.backends.cuda, name, switched.append)
    as_t4.disguise()
    assert torch.cuda.get_device_name(1) == torch.cuda.get_device_properties(1).name == "Tesla T4"
    assert torch.cuda.get_device_properties(0).total_memory == as_t4.CAP == 14.75 * 2**30
    assert torch.cuda.get_device_properties(0).multi_processor_count == 132
    assert torch.cuda.mem_get_info(0) == (as_t4.CAP - 10 * 2**30, as_t4.CAP)
    monkeypatch.setenv(as_t4.SHARED_VARIABLE, "1")  # of 10 GB, 3 are its own
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 3 * 2**30)
    assert torch.cuda.mem_get_info(0) == (as_t4.CAP - int(3.5 * 2**30), as_t4.CAP)
    assert shares == pytest.approx({0: 14.75 / 80, 1: 14.75 / 80})
    assert switched == [False, False]


def test_where_no_group_can_be_made_it_is_said(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(rehearsal.Path, "mkdir", refuse)
    assert rehearsal.limit_host(10**9) == "not limited: no control group can be made here (Permission denied)"


def test_table_says_what_failed():
    rows = [
        {"gpus": 2, "notebook": "04", "seconds": 9.6, "host": "not limited", "ok": True, "host_bytes": 5e9}
        | {"peak_bytes": [2**30, 2**31], "predicted_peak_bytes": [2**30]},
        {"gpus": 1, "notebook": "05", "seconds": 1.0, "host": "its process was killed", "ok": False},
    ]
    first, second = rehearsal.table(rows).splitlines()[2:]
    assert first == "| 2 | 04 | 10 | 1.00 | 1.00, 2.00 | 5.0, not limited | passed |"
    assert second == "| 1 | 05 | 1 | - | - | 0.0, its process was killed | FAILED |"


FAKE_TORCH = """
from types import SimpleNamespace
real = SimpleNamespace(name="H100", total_memory=80 * 2**30)
capped = []
cuda = SimpleNamespace(
    is_available=lambda: True, device_count=lambda: 2, mem_get_info=None,
    get_device_properties=lambda device: real,
    set_per_process_memory_fraction=lambda share, device: capped.append((device, round(share * 80, 2))),
)
off = lambda on: None
backends = SimpleNamespace(cuda=SimpleNamespace(enable_flash_sdp=off, enable_cudnn_sdp=off))
"""


def test_a_rank_that_a_notebook_starts_sees_a_t4_too(tmp_path):
    """And caps no other GPU than its own: that would open it."""
    (tmp_path / "torch.py").write_text(FAKE_TORCH)
    ask = "import torch; print(torch.cuda.get_device_properties(0).name, torch.capped)"
    path = os.pathsep.join([str(tmp_path), *rehearsal.FOUND])

    def seen(**more):
        environment = {**os.environ, "PYTHONPATH": path, **more}
        return subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True).stdout

    assert seen(LOCAL_RANK="1") == "Tesla T4 [(1, 14.75)]\n"
    assert seen() == "H100 []\n"


@pytest.mark.once
def test_a_notebook_that_hangs_is_ended_with_its_children_and_says_where(tmp_path, monkeypatch):
    """The cell holds the interpreter's lock, so that no Python of the kernel could end it."""
    source = [
        "import ctypes, subprocess, sys",
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])",
        "print(child.pid)",
        "def held_here():",
        "    ctypes.PyDLL(None).sleep(600)",
        "held_here()",
    ]
    cells = [nbformat.v4.new_code_cell("\n".join(lines)) for lines in (source[:3], source[3:])]
    path, out = tmp_path / "02_hangs.ipynb", tmp_path / "out"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    out.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(rehearsal.PROJECT / "benchmarks"))
    for name in (as_t4.FILE_VARIABLE, as_t4.LIMIT_VARIABLE):
        monkeypatch.setenv(name, "")
    row = rehearsal.run_one(path, out, tmp_path, 20)
    assert not row["ok"]
    assert row["why"] == "stopped after 20 s, its stacks are kept"
    assert "held_here" in (out / "02_hangs.stacks.txt").read_text()
    child = int(nbformat.read(out / path.name, as_version=4).cells[0].outputs[0].text)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert rehearsal.table([row | {"gpus": 2, "notebook": "02", "host": "-"}]).endswith(
        "| FAILED: stopped after 20 s, its stacks are kept |"
    )


def test_a_road_goes_on_behind_a_notebook_that_failed_unless_it_was_the_first(tmp_path, monkeypatch):
    (tmp_path / "machine.json").write_text(json.dumps({"text": "", "seconds": ""}))
    (tmp_path / "notebooks").mkdir()
    for number in ("01", "02", "03"):
        (tmp_path / "notebooks" / f"{number}_x.ipynb").touch()
    options = {"out": tmp_path, "zip": tmp_path / "all.zip", "notebooks": [], "small": False, "limit": 60.0}
    monkeypatch.setattr(rehearsal, "time", SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.setattr(rehearsal.os, "environ", {})

    def walked(until, failing):
        monkeypatch.setattr(rehearsal, "run_one", lambda path, *_: {"ok": path.stem != failing, "seconds": 1.0})
        rehearsal.walk(tmp_path, 2, "", SimpleNamespace(**options, until=until))
        return [(row["notebook"][:2], row["ok"], row.get("why")) for row in rehearsal.read_rows(tmp_path)]

    assert walked(500.0, "02_x") == [("01", True, None), ("02", False, None), ("03", True, None)]
    assert walked(500.0, "01_x") == [("01", False, None)]
    assert walked(20.0, "") == [("01", False, "no time was left")]


def test_notebooks_can_be_chosen_for_one_road_or_all():
    assert rehearsal.chosen(["06", "1=01,05"], 1) == {"01", "05"}
    assert rehearsal.chosen(["06", "1=01,05"], 2) == {"06"}
    assert rehearsal.chosen(["1=01,05"], 2) == rehearsal.chosen([], 1) == set()
    with pytest.raises(ValueError, match="--notebooks 1,05: write"):
        rehearsal.chosen(["1,05"], 1)


def test_after_each_notebook_all_that_is_there_is_packed(tmp_path):
    out, archive = tmp_path / "out", tmp_path / "all.zip"
    out.mkdir()
    (out / "machine.json").write_text(json.dumps({"text": "", "seconds": "They ran beside each other."}))
    for gpus in (1, 2):
        with rehearsal.kept(out, archive):
            (out / f"{gpus}_gpus").mkdir()
            (out / f"{gpus}_gpus" / "03.ipynb").write_text("{}")
            row = {"gpus": gpus, "notebook": "03", "seconds": 1.0, "host": "not limited", "ok": True}
            (out / f"{gpus}_gpus.json").write_text(json.dumps([row]))
    with zipfile.ZipFile(archive) as packed:
        names, lines = set(packed.namelist()), packed.read("table.md").decode().splitlines()
    assert names == {f"{gpus}_gpus{end}" for gpus in (1, 2) for end in (".json", "/03.ipynb")} | {
        "machine.json",
        "table.md",
    }
    assert [line[:5] for line in lines[2:4]] == ["| 2 |", "| 1 |"]
    assert lines[-1] == "They ran beside each other."
    assert {path.name for path in tmp_path.iterdir()} == {"out", "all.zip"}
