"""~ is the home folder in every public function that takes a path, and no folder named ~ is made."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from glmhelpers import adgen, runtime
from glmhelpers.data import convert_alpaca, write_broken_files
from glmhelpers.distributed.job import Job
from glmhelpers.lora import attach_lora, export_adapter, export_merged, import_2023, load_adapter, save_adapter
from glmhelpers.tokens import encode_file
from glmhelpers.training import training_arguments
from glmhelpers.training.checkpoint_manager import run_folder
from glmhelpers.utils.folders import expanded
from glmhelpers.weights import (
    check_consistency,
    convert_to_safetensors,
    download_weights,
    list_shards,
    load_model,
    read_entries,
    read_manifest,
    verify_weights,
)
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer

TINY = Path(__file__).resolve().parents[2] / "data" / "tiny-chatglm"
ROWS = [{"instruction": f"question {number}", "output": "answer"} for number in range(4)]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copytree(TINY, tmp_path / "home" / "tiny")
    yield tmp_path / "home"
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_weights(home):
    assert verify_weights("~/tiny", manifest="~/tiny/weights_manifest.json").ok
    assert download_weights("~/copy", source="~/tiny", manifest="~/tiny/weights_manifest.json", progress=False).ok
    assert check_consistency("~/tiny") == []
    assert read_manifest(folder="~/tiny") == read_manifest("~/tiny/weights_manifest.json")
    assert list_shards(Path("~/copy"))[0].parent == home / "copy"
    assert read_entries(Path("~/tiny/pytorch_model-00001-of-00008.bin"))
    assert convert_to_safetensors("~/tiny", "~/converted", progress=False) == home / "converted"
    assert load_model("~/converted", progress=False).load_report.read_bytes


def test_model(home):
    assert ChatGLMConfig.from_pretrained("~/tiny").num_layers == 8
    assert ChatGLMTokenizer.from_pretrained(Path("~/tiny")).vocab_size
    assert ChatGLMForConditionalGeneration.from_pretrained("~/tiny").config.num_layers == 8


def test_rows(home):
    (home / "rows.json").write_text(json.dumps(ROWS))
    tokenizer = ChatGLMTokenizer.from_pretrained(TINY)
    assert convert_alpaca("~/rows.json", "~/rows.jsonl").rows_valid == len(ROWS)
    assert len(encode_file("~/rows.jsonl", tokenizer, cache="~/tokens")) == len(ROWS)
    assert list((home / "tokens").glob("*.arrow"))
    write_broken_files("~/broken")
    (home / "train.json").write_text(json.dumps({"content": "类型#裤", "summary": "好"}) + "\n")
    assert adgen.prepare("~/train.json", "~/prepared.jsonl", tokenizer).path == home / "prepared.jsonl"


def test_adapters(home):
    def base():
        return ChatGLMForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)

    model = attach_lora(base())
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    save_adapter(model, "~/adapter")
    load_adapter(base(), "~/adapter")
    assert export_adapter("~/adapter", "~/adapter.zip") == home / "adapter.zip"
    assert export_merged("~/tiny", "~/adapter", "~/merged", progress=False) == home / "merged"
    torch.save({n: p for n, p in model.state_dict().items() if "lora_" in n}, home / "old.pt")
    import_2023(base(), "~/old.pt")


def test_runs(home, monkeypatch):
    assert training_arguments("~/run", False).output_dir == str(home / "run")
    assert run_folder("~/run", {}).parent == home / "run"
    job = Job(folder="~/tiny", rows="~/rows.jsonl", output="~/run", start_from="~/old", eval_rows="~/held.jsonl")
    assert (job.start_from, job.eval_rows) == (str(home / "old"), str(home / "held.jsonl"))
    assert (job.folder, job.adapter_folder) == (str(home / "tiny"), home / "run" / "adapter")
    monkeypatch.setenv("GLM_OUTPUT", "~/outputs")
    assert runtime.choose("~/tiny", "cpu").output == home / "outputs"


def test_only_a_home_folder_is_written_out():
    assert expanded("~no-such-user/x") == Path("~no-such-user/x")
    assert expanded("a/~") == Path("a/~")
