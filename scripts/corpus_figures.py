"""Figures of the real data set with the real tokenizer, for notebook 02: counts only, none of its rows.

    GLM_REAL_DATA/alpaca_chinese_dataset.zip ─┐
    GLM_REAL_DATA/ice_text.model ─────────────┴─► convert_alpaca ─► encode_file ─► data/corpus_figures.json

`GLM_REAL_DATA=FOLDER python scripts/corpus_figures.py` writes the file again: same inputs, same bytes. Neither input
belongs to this project, and neither is copied. The one row whose pieces are kept was written for this course.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

import datasets

from glmhelpers.data.convert import convert_alpaca
from glmhelpers.data.report import Report
from glmhelpers.tokens.encode import encode_example, encode_file, token_report
from glmhelpers.tokens.lengths import limit_costs, quantile
from glmhelpers.utils.files import whole_file
from thuglm import ChatGLMTokenizer

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "data" / "corpus_figures.json"
VARIABLE = "GLM_REAL_DATA"
ARCHIVE, MODEL = "alpaca_chinese_dataset.zip", "ice_text.model"

LIMITS = (128, 256, 384, 512, 768, 1024)
PERCENTILES = (50, 90, 99, 99.9, 100)
STEPS = {"as found": {}, "dedupe": {"dedupe": True}, "drop_untranslated": {"dedupe": True, "drop_untranslated": True}}
ROW = {
    "instruction": "把下面的句子翻译成英文。",
    "input": "图书馆星期一上午九点开门。",
    "output": "The library opens at 9 a.m. on Monday.",
}
"""Written for this course."""


def real_data() -> Path | None:
    """The folder with the real files, or None if `GLM_REAL_DATA` names none."""
    folder = os.environ.get(VARIABLE)
    return Path(folder) if folder and all(Path(folder, name).is_file() for name in (ARCHIVE, MODEL)) else None


def real_tokenizer(real: Path, work: Path) -> ChatGLMTokenizer:
    """The published tokenizer, from the real model file and the published settings.

    Args:
        real: folder with `ice_text.model`.
        work: an empty folder, for links to the two files.
    """
    work.mkdir(parents=True, exist_ok=True)
    for path in (real / MODEL, ROOT / "thuglm" / "published" / "tokenizer_config.json"):
        (work / path.name).symlink_to(path.resolve())
    return ChatGLMTokenizer.from_pretrained(work)


def unpack(archive: Path, folder: Path) -> list[Path]:
    """Unpack the JSON files of the archive's `history/`; returns the 25 with Chinese rows.

    The archive's names are UTF-8 without the mark that says so, and zipfile reads them as those of DOS.
    """
    chinese = []
    with zipfile.ZipFile(archive) as packed:
        for member in packed.infolist():
            name = member.filename.encode("utf-8" if member.flag_bits & 0x800 else "cp437").decode("utf-8")
            inside = PurePosixPath(name)
            if "history" not in inside.parts or inside.suffix != ".json":
                continue
            path = folder.joinpath(*inside.parts[inside.parts.index("history") :])
            path.parent.mkdir(parents=True, exist_ok=True)
            with packed.open(member) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
            if "中文" in path.parent.name:
                chinese.append(path)
    return chinese


def make(real: Path) -> dict:
    """All figures, as they stand in the file.

    Args:
        real: folder with the two real files.
    """
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as work:
        tokenizer = real_tokenizer(real, Path(work, "tokenizer"))
        every, chosen = Path(work, "all"), Path(work, "chinese")
        for path in unpack(real / ARCHIVE, every):
            target = chosen / path.relative_to(every)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(path)
        sources = {"all": every, "chinese": chosen}
        return {
            "made_by": "scripts/corpus_figures.py",
            "inputs_sha256": {name: _sha256(real / name) for name in (ARCHIVE, MODEL)},
            "template": "chatglm",
            "corpora": {
                name: {step: _figures(source, options, tokenizer) for step, options in STEPS.items()}
                for name, source in sources.items()
            },
            "row": _row(tokenizer),
        }


def _figures(source: Path, options: dict, tokenizer: ChatGLMTokenizer) -> dict:
    with tempfile.TemporaryDirectory() as work:
        report = convert_alpaca(source, Path(work, "rows.jsonl"), **options)
        tokens = token_report(encode_file(report.output, tokenizer))
    if tokens.kept != report.rows_valid:
        raise ValueError(f"{source.name}: {report.rows_valid} valid rows, but {tokens.kept} were encoded")
    return {
        "files": len(report.files),
        "rows": report.rows,
        "valid": report.rows_valid,
        "rejected": dict(sorted(report.rejected.items())),
        "repaired": _repaired(report),
        "tokens": tokens.tokens,
        "targets": tokens.targets,
        "percentiles": {f"{share:g}": quantile(tokens.lengths, share / 100) for share in PERCENTILES},
        "limits": [
            {
                "limit": cost.limit,
                "kept": cost.kept,
                "dropped": cost.dropped,
                "tokens_if_dropped": round(cost.tokens_if_dropped, 6),
                "tokens_if_cut": round(cost.tokens_if_cut, 6),
            }
            for cost in limit_costs(tokens.lengths, LIMITS)
        ],
        "lengths": {str(length): tokens.lengths[length] for length in sorted(tokens.lengths)},
    }


def _repaired(report: Report) -> list[dict]:
    """The files that had to be mended, by what was mended and how many rows they hold; their names stay outside."""
    return [
        {"repairs": dict(sorted(file.repairs.items())), "rows": file.rows}
        for file in report.files
        if file.status == "repaired"
    ]


def _row(tokenizer: ChatGLMTokenizer) -> dict:
    example = encode_example(tokenizer, ROW)
    return {**ROW, **example, "pieces": tokenizer.convert_ids_to_tokens(example["input_ids"])}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_text(figures: dict) -> str:
    """The file's text: a value a line, short lists and the lengths on one line, so that a change can be read."""
    text = json.dumps(figures, ensure_ascii=False, indent=1)
    for corpus in figures["corpora"].values():
        for step in corpus.values():
            text = text.replace(_indented(step["lengths"], 4), json.dumps(step["lengths"]))
            for cost in step["limits"]:
                text = text.replace(_indented(cost, 5), json.dumps(cost))
    for name in ("input_ids", "labels", "pieces"):
        text = text.replace(_indented(figures["row"][name], 2), json.dumps(figures["row"][name], ensure_ascii=False))
    return text + "\n"


def _indented(value: dict | list, depth: int) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1).replace("\n", "\n" + " " * depth)


def main() -> None:
    """Write the figures, or say what is missing."""
    real = real_data()
    if real is None:
        sys.exit(f"set {VARIABLE} to the folder that holds {ARCHIVE} and {MODEL}: they are no part of this project")
    with whole_file(TARGET) as unfinished:
        unfinished.write_text(as_text(make(real)), "utf-8")


if __name__ == "__main__":
    main()
