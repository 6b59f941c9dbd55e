"""lm-evaluation-harness finds the model by its door: one small task on the tiny checkpoint, a smoke test."""

import json
from pathlib import Path

import pytest

import thuglm  # noqa: F401 - makes the model known to the Auto classes

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness could not be installed")

TINY = Path(__file__).parents[2] / "data" / "tiny-chatglm"
TASK = {
    "task": "sums",
    "dataset_path": "json",
    "test_split": "train",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 24},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


# The harness adds no special tokens by itself: either it is told to, or it goes through the chat template.
@pytest.mark.parametrize("how", ["special tokens", "chat template"])
def test_a_task_is_answered(how, tmp_path, monkeypatch):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    class Harness(HFLM):
        def tok_decode(self, tokens, skip_special_tokens=True):
            # The published tokenizer decodes <eop> to nothing; for the harness, which stops at that text, it has one.
            return "<eop>" if tokens == self.eot_token_id else super().tok_decode(tokens, skip_special_tokens)

    rows = [{"question": "3+4=", "answer": "3+4=7."}, {"question": "你是谁？", "answer": "nobody"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task = {**TASK, "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl")}}
    (tmp_path / "sums.yaml").write_text(json.dumps(task), "utf-8")
    result = lm_eval.simple_evaluate(
        model=Harness(pretrained=str(TINY), dtype="float32", add_bos_token=True, device="cpu", batch_size=2),
        tasks=["sums"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template=how == "chat template",
        bootstrap_iters=0,
    )
    assert result["results"]["sums"]["exact_match,none"] == 0.5
