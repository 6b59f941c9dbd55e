import json
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from glmhelpers import runtime
from glmhelpers.devicemap.check import part_names
from glmhelpers.utils import environment as machine
from thuglm import ChatGLMConfig

ROOT = Path(__file__).resolve().parents[2]
GiB = 2**30  # counted a second time, on purpose


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch) -> Path:
    for name in ("GLM_WEIGHTS", "GLM_DEVICES", "KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GLM_OUTPUT", str(tmp_path / "out"))
    return tmp_path / "out"


@pytest.fixture
def gpus(monkeypatch):
    """Pretend to have GPUs: `gpus(15, 15)` for two of 15 GiB."""

    def pretend(*gib: float) -> None:
        found = [
            runtime.InstalledGPU(index, "Tesla T4", int(0.97 * size * GiB), int(size * GiB))
            for index, size in enumerate(gib)
        ]
        monkeypatch.setattr(runtime, "list_gpus", lambda: found)

    return pretend


@pytest.fixture
def real_weights(monkeypatch, tmp_path) -> Path:
    folder = tmp_path / "real"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(runtime, "find_real_weights", lambda *_, **__: folder)
    return folder


# ---- where ----


@pytest.mark.parametrize("below", ["", "notebooks", "notebooks/assets"])
def test_project_is_found_upwards(below, monkeypatch):
    assert runtime.find_project(ROOT / below) == ROOT
    monkeypatch.chdir(ROOT / below)
    assert runtime.find_project() == ROOT


def test_project_is_found_from_elsewhere(tmp_path):
    assert runtime.find_project(tmp_path) == ROOT, "this file's own project"


def test_machine_name(monkeypatch):
    assert runtime.machine_name() == "local"
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    assert runtime.machine_name() == "Colab"
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert runtime.machine_name() == "Kaggle"


def test_short_paths_show_no_home():
    assert runtime.short(ROOT / "data" / "tiny-chatglm") == "data/tiny-chatglm"


# ---- what is here ----


def test_real_weights_on_the_cpu_are_compared_with_free_memory(tmp_path, monkeypatch, capsys):
    real = tmp_path / "real"
    real.mkdir()
    (real / "config.json").write_text(json.dumps(ChatGLMConfig().to_dict()))
    for free, says in ((20 * 10**9, "needs 24.7 GB; 20.0 GB are free"), (30 * 10**9, "")):
        monkeypatch.setattr(runtime, "free_ram_bytes", lambda free=free: free)
        runtime.choose(real, "cpu")
        said = capsys.readouterr().out
        assert says in said
        assert ("[FAIL] RAM" in said) is bool(says)
    monkeypatch.setattr(runtime, "free_ram_bytes", lambda: 10**9)
    monkeypatch.setattr(runtime, "find_real_weights", lambda *_, **__: None)
    runtime.choose("real", "cpu", may_fetch=True)
    assert "needs 24.7 GB" in capsys.readouterr().out, "before anything is fetched"
    runtime.choose("tiny", "cpu")
    assert "[FAIL]" not in capsys.readouterr().out


def test_nothing_is_said_about_gpus_by_a_torch_that_is_too_old(monkeypatch, capsys):
    old = runtime.Check("versions", False, "torch 2.4 (older than 2.11)", "use a newer image")
    monkeypatch.setattr(runtime, "check_versions", lambda: old)
    monkeypatch.setattr(runtime, "list_gpus", lambda: pytest.fail("torch was asked"))
    assert not runtime.preflight().ok
    assert "GPUs" not in capsys.readouterr().out


def test_preflight_prints_a_line_for_each_subject(capsys):
    found = runtime.preflight()
    lines = capsys.readouterr().out.splitlines()
    for subject in ("machine", "versions", "GPUs", "RAM", "disk", "files"):
        assert any(line.startswith((f"[OK] {subject}:", f"[FAIL] {subject}:")) for line in lines), subject
    assert found.ok, lines
    assert found.project == ROOT
    assert found.ram_free_bytes > 0
    assert found.disk_free_bytes > 0


def test_versions_in_pyproject_are_those_of_the_preflight():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [*settings["dependencies"], *settings["optional-dependencies"]["notebooks"]]
    oldest = {need.split(">=")[0]: need.split(">=")[1].split(",")[0] for need in needs}
    for name, (first, _) in runtime.SUPPORTED.items():
        assert oldest[name] == first, name


GOOD = {name: oldest for name, (oldest, _) in machine.SUPPORTED.items()}


@pytest.mark.parametrize(
    ("changes", "ok", "words"),
    [
        ({}, True, "transformers 5.15"),
        ({"transformers": "5.24.4"}, True, "transformers 5.24.4"),
        ({"transformers": "5.25.0"}, True, "newer than the 5.24 tested here"),
        ({"transformers": "4.57.1"}, False, "pip install 'transformers>=5.15'"),
        ({"ipywidgets": "8.1.9"}, True, "ipywidgets 8.1.9"),
        ({"peft": None}, False, "peft missing"),
        ({"torch": "2.10.0"}, False, "never upgrade it in place"),
        ({"torch": "2.11.0+cu128"}, True, "torch 2.11.0+cu128"),
    ],
)
def test_versions_against_the_window(changes, ok, words):
    installed = {name: version for name, version in (GOOD | changes).items() if version}
    check = runtime.check_versions(installed)
    assert check.ok is ok
    assert words in str(check)
    assert "install 'torch" not in str(check)


def test_gpu_lines(monkeypatch):
    two = [runtime.InstalledGPU(index, "Tesla T4", 14 * GiB, 15 * GiB) for index in range(2)]
    assert "0 Tesla T4, 14.0 of 15.0 GiB free; 1 Tesla T4" in str(machine.check_gpus(two, "Kaggle"))
    monkeypatch.setattr(machine, "_driver_sees_gpu", lambda: False)
    assert "T4 x2" in str(machine.check_gpus([], "Kaggle"))
    assert "change runtime type" in str(machine.check_gpus([], "Colab")).lower()
    monkeypatch.setattr(machine, "_driver_sees_gpu", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    check = machine.check_gpus([], "local")
    assert not check.ok
    assert "built for the CPU" in str(check)


def project_copy(folder: Path) -> Path:
    for name in ("thuglm/published", "data/tiny-chatglm"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


def test_files_line(tmp_path):
    project = project_copy(tmp_path / "p")
    assert runtime._check_files(project).ok
    shard = project / "data" / "tiny-chatglm" / "pytorch_model-00003-of-00008.bin"
    shard.write_bytes(shard.read_bytes()[:1000])
    check = runtime._check_files(project)
    assert not check.ok
    assert "pytorch_model-00003-of-00008.bin is cut off" in check.advice
    (project / "thuglm" / "ice_text.model").write_bytes(b"version https://git-lfs.example\n")
    check = runtime._check_files(project)
    assert not check.ok
    assert "10 files are wrong or missing" in check.found  # the nine of the manifest, and config.json
    assert "git-lfs pointer" in check.advice


def test_files_line_without_the_tiny_checkpoint_or_with_a_strange_manifest(tmp_path):
    project = project_copy(tmp_path / "p")
    (project / "thuglm" / "ice_text.model").write_bytes(b"x")
    (project / "thuglm" / "weights_manifest.json").write_text("{")
    check = runtime._check_files(project)
    assert not check.ok
    assert "thuglm/weights_manifest.json is not JSON" in check.advice
    for name in ("config.json", "pytorch_model.bin.index.json"):
        (project / "thuglm" / name).write_text("{}")
    assert runtime.find_real_weights(project) is None
    shutil.rmtree(project / "thuglm")
    shutil.rmtree(project / "data" / "tiny-chatglm")
    check = runtime._check_files(project)
    assert not check.ok
    assert check.advice.startswith("git checkout -- data/tiny-chatglm"), "not a download of 13 GB into that folder"


def test_real_weights_by_name_and_size(tmp_path, monkeypatch):
    project = project_copy(tmp_path / "p")
    assert runtime.find_real_weights(project) is None
    for name, facts in json.loads((project / "thuglm/published/weights_manifest.json").read_text())["files"].items():
        with (project / "thuglm" / name).open("wb") as file:
            file.truncate(facts["size"])
    assert runtime.find_real_weights(project) is None
    for name in ("config.json", "pytorch_model.bin.index.json"):
        assert not runtime._check_files(project).ok
        (project / "thuglm" / name).write_text("{}")
    assert runtime.find_real_weights(project) == project / "thuglm"
    assert runtime._check_files(project).ok
    (project / "thuglm" / "ice_text.model").unlink()
    assert runtime.find_real_weights(project) is None


def test_free_ram_respects_a_container(monkeypatch):
    limits = {"memory.max": str(8 * GiB), "memory.current": str(3 * GiB)}
    monkeypatch.setattr(machine.Path, "read_text", lambda self: limits[self.name])
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GiB))
    assert runtime.free_ram_bytes() == 5 * GiB
    limits["memory.max"] = "max"
    assert runtime.free_ram_bytes() == 100 * GiB


# ---- which checkpoint, which devices ----


def test_auto_without_gpu_is_tiny_on_the_cpu(gpus, output, capsys):
    gpus()
    run = runtime.choose()
    assert run.is_tiny
    assert run.folder == ROOT / "data" / "tiny-chatglm"
    assert run.devices == ["cpu"]
    assert run.dtype == torch.float32
    assert run.output == output
    assert output.is_dir()
    assert capsys.readouterr().out.startswith("tiny ChatGLM from data/tiny-chatglm on cpu in float32")


@pytest.mark.parametrize(
    ("sizes", "tiny", "devices"),
    [((15, 15), False, [0, 1]), ((15,), False, [0]), ((6,), True, [0]), ((), True, ["cpu"])],
)
def test_auto_with_real_weights_depends_on_the_gpus(gpus, real_weights, sizes, tiny, devices):
    gpus(*sizes)
    run = runtime.choose()
    assert run.is_tiny is tiny
    assert run.devices == devices
    assert run.dtype == (torch.float16 if sizes else torch.float32)


def test_gpus_without_real_weights(gpus, monkeypatch, capsys):
    gpus(15, 15)
    monkeypatch.setattr(runtime, "find_real_weights", lambda *_, **__: None)
    run = runtime.choose()
    assert (run.is_tiny, run.devices) == (True, [0, 1])
    assert "not here" in str(run)
    assert run.wants_download
    assert "[NOTE] These GPUs are large enough" in capsys.readouterr().out
    runtime.choose(may_fetch=True)  # notebook 01 fetches them
    monkeypatch.setenv("GLM_WEIGHTS", "tiny")
    assert not runtime.choose().wants_download
    assert "[NOTE]" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="run notebook 01 first"):
        runtime.choose("real")
    asked = runtime.choose("real", may_fetch=True)
    assert (asked.is_tiny, asked.wants_download) == (True, True)
    monkeypatch.setenv("GLM_WEIGHTS", "real")
    assert runtime.choose(may_fetch=True).wants_download


def test_environment_answers_for_auto(gpus, real_weights, monkeypatch):
    gpus(15, 15)
    monkeypatch.setenv("GLM_WEIGHTS", "tiny")
    monkeypatch.setenv("GLM_DEVICES", "1")
    run = runtime.choose()
    assert (run.is_tiny, run.devices) == (True, [1])
    assert runtime.choose("real", [0, 1]).devices == [0, 1]
    monkeypatch.setenv("GLM_DEVICES", "cpu")
    assert runtime.choose().devices == ["cpu"]


def test_what_cannot_be_chosen(gpus, tmp_path):
    gpus(15)
    with pytest.raises(ValueError, match="GPU 1 was asked for, but this machine has 1"):
        runtime.choose("tiny", [0, 1])
    with pytest.raises(FileNotFoundError, match=r"neither config.json nor ice_text.model"):
        runtime.choose(tmp_path)
    with pytest.raises(ValueError, match=r"devices \['cuda'\] cannot be read"):
        runtime.choose("tiny", "cuda")


def test_empty_variables_mean_auto(gpus, monkeypatch):
    gpus(15)
    monkeypatch.setenv("GLM_WEIGHTS", "")
    monkeypatch.setenv("GLM_DEVICES", "")
    assert runtime.choose().devices == [0]


def test_device_map_of_a_run(gpus):
    config = SimpleNamespace(num_layers=3)
    gpus(15)
    assert runtime.choose("tiny").device_map(config) == dict.fromkeys(part_names(3), 0)
    assert runtime.choose("tiny", "cpu").device_map(config) == dict.fromkeys(part_names(3), "cpu")


def test_device_map_of_two_gpus_covers_every_part(gpus):
    from thuglm import ChatGLMConfig

    gpus(15, 15)
    run = runtime.choose("tiny")
    found = run.device_map(ChatGLMConfig())
    assert list(found) == part_names(28)
    assert {found[f"transformer.layers.{number}"] for number in range(28)} == {0, 1}


def test_the_plan_is_for_the_gpus_of_the_run_and_names_them_as_torch_does(monkeypatch):
    """GPUs 1 and 3 of a machine: the plan counts them 0 and 1, the device map must not."""
    from glmhelpers.devicemap import plan_device_map
    from thuglm import ChatGLMConfig

    names = ["Tesla T4", "Another", "Tesla T4", "Tesla T4"]
    cards = [runtime.InstalledGPU(at, name, 9 * GiB, int(size * GiB)) for at, (name, size) in
             enumerate(zip(names, (14.75, 20, 14.75, 14.75), strict=True))]  # fmt: skip
    monkeypatch.setattr(runtime, "list_gpus", lambda: cards)
    run, config = runtime.choose("tiny", [1, 3]), ChatGLMConfig()
    found = run.plan(config, 4, 1024, objective="memory", lora_rank=4)
    plain = plan_device_map(config, ["20GiB", "T4"], 4, 1024, objective="memory", lora_rank=4)
    assert found.peak_bytes == plain.peak_bytes == found.prediction.peak_bytes
    assert found.device_map == {name: {0: 1, 1: 3}[at] for name, at in plain.device_map.items()}
    assert "GPU 3 (T4): blocks" in str(found)
    assert run.device_map(config) == run.plan(config).device_map
    assert runtime.choose("tiny", "cpu").plan(config) is None


# ---- results ----


def test_result_is_printed_and_kept(output, capsys):
    path = runtime.report_result("01_download_weights", files=9, answer="你好")
    assert capsys.readouterr().out == "RESULT files=9 answer=你好\n"
    assert path == output / "results" / "01_download_weights.json"
    assert json.loads(path.read_text(encoding="utf-8")) == {"files": 9, "answer": "你好"}
    assert [item.name for item in path.parent.iterdir()] == [path.name]
