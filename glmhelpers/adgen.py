"""The published table, for everybody to repeat: the advertisement data (ADGEN), its recipe and its settings.

    {"content": "类型#裤*版型#宽松...", "summary": "宽松的阔腿裤..."}     train.json 114,599 rows, dev.json 1,070
         │ prepare: our column names, both sides cut as the authors' script cuts them
         ▼
    train.jsonl ─► LoRA, 3000 steps of 16 rows ─► adapter ─► dev.jsonl answered, drawn by chance ─► Scores
                                                                                 │
                                                             beside PUBLISHED ◄──┘

The authors' table for ChatGLM-6B gives LoRA BLEU-4 7.62 and ROUGE-L 24.80. This project has no copy of the data and has
not repeated it with the real weights. What the table does not say (rank, alpha, schedule) is as in notebook 04.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmhelpers.data.convert import convert_alpaca
from glmhelpers.data.report import Report
from glmhelpers.inference.scores import Scores, evaluate
from glmhelpers.lora.adapter import save_adapter
from glmhelpers.lora.attach import attach_lora
from glmhelpers.tokens.collate import RightPadCollator
from glmhelpers.tokens.encode import encode_file
from glmhelpers.training.finetune import train, training_arguments
from glmhelpers.utils.folders import expanded
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from thuglm.prompt import process_response

PUBLISHED = {"bleu4": 7.62, "rouge1": 30.60, "rouge2": 6.96, "rougel": 24.80}
"""The LoRA column of the authors' table, in percent."""

COLUMNS = {"content": "instruction", "summary": "output"}
"""Names in the advertisement data -> ours."""

MOST_TOKENS = 62
"""Of content and of summary each: 64 with two special tokens. References are cut too, which changes every score."""

TRAINING = {"max_steps": 3000, "per_device_train_batch_size": 16, "learning_rate": 5e-4}
"""Settings that the authors give beside the LoRA column."""

GENERATION = {"do_sample": True, "temperature": 0.95, "top_p": 0.7, "max_new_tokens": 64}
"""How the answers of the table were drawn, as far as its scripts say."""


@dataclass(frozen=True)
class Prepared:
    """Rows in our form.

    Attributes:
        path: JSON Lines file of the rows.
        report: what became of the rows of the source.
        cut: rows of which one side was shortened.
    """

    path: Path
    report: Report
    cut: int

    @property
    def rows(self) -> list[dict[str, str]]:
        """All of them: `instruction` and `output`."""
        return list(_read(self.path))

    def __str__(self) -> str:
        return f"{self.report.rows_valid:,} rows, {self.cut:,} of them cut to {MOST_TOKENS} tokens a side"


def _read(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def cut_text(text: str, tokenizer: Any, most: int = MOST_TOKENS) -> tuple[str, bool]:
    """The first `most` tokens of a text, as text, and whether there were more.

    Every text goes through the tokenizer and back, a short one too: it normalises (full-width letters become ASCII),
    and answers, which come from it, are compared with these.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    # A character of several byte tokens may have been cut in the middle.
    return process_response(tokenizer.decode(ids[:most])).rstrip("\ufffd"), len(ids) > most


def prepare(source: str | Path, output: str | Path, tokenizer: Any) -> Prepared:
    """Write the rows of an ADGEN file in our form, cut by the published recipe.

    Args:
        source: train.json or dev.json, one row of `content` and `summary` a line.
        output: the JSON Lines file to write; the uncut rows go beside it, into `<stem>.whole.jsonl`.
        tokenizer: ChatGLM's tokenizer.

    Raises:
        FileNotFoundError, ValueError: see `convert_alpaca`.
    """
    source, output, cut = expanded(source), expanded(output), 0
    report = convert_alpaca(source, output.with_suffix(".whole.jsonl"), columns=COLUMNS)

    def rows() -> Iterator[dict[str, str]]:
        nonlocal cut
        for row in _read(report.output):
            sides = {name: cut_text(row[name], tokenizer) for name in ("instruction", "output")}
            cut += any(shortened for _, shortened in sides.values())
            yield {name: text for name, (text, _) in sides.items()}

    kept = convert_alpaca(rows(), output)
    if kept.rows_valid != report.rows_valid:
        raise ValueError(f"{source}: {report.rows_valid - kept.rows_valid} rows have no text left after cutting")
    return Prepared(output, report, cut)


def repeat(run: Any, folder: str | Path, seed: int = 0, **changes: Any) -> tuple[Scores, list[str]]:
    """One row of the table, from the data to the scores: train an adapter, save it as `adgen/`, answer dev.json.

    Run it again after an interruption: the training goes on from its last checkpoint. Hours on two T4s with the real
    weights.

    Args:
        run: from `runtime.choose`; nothing else should be on its GPUs.
        folder: train.json and dev.json of the advertisement data.
        seed: of the sampling.
        changes: other values of TRAINING, or any argument of `TrainingArguments`.

    Returns:
        the scores, and the answers to dev.json in order.

    Raises:
        FileNotFoundError, ValueError: see `convert_alpaca`.
    """
    config, tokenizer = ChatGLMConfig.from_pretrained(run.folder), ChatGLMTokenizer.from_pretrained(run.folder)
    learnt, asked = (
        prepare(expanded(folder) / f"{name}.json", run.output / f"adgen_{name}.jsonl", tokenizer)
        for name in ("train", "dev")
    )
    print(f"train: {learnt}\ndev:   {asked}")
    dataset, settings = encode_file(learnt.path, tokenizer), {**TRAINING, **changes}
    longest = -(-max(dataset["length"]) // 8) * 8
    plan = run.plan(config, settings["per_device_train_batch_size"], longest)
    places = plan.device_map if plan else run.device_map(config)
    model = attach_lora(ChatGLMForConditionalGeneration.from_pretrained(run.folder, dtype=run.dtype, device_map=places))
    arguments = training_arguments(run.output / "adgen_checkpoints", on_gpu=run.devices != ["cpu"], **settings)
    train(model, dataset, RightPadCollator(tokenizer), arguments, plan=plan)
    save_adapter(model, run.output / "adgen", settings={"data": "ADGEN", **settings})
    return evaluate(model, tokenizer, asked.rows, seed, **GENERATION)
