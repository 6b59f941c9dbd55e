"""The real files, where they are at hand: the published tokenizer and data set, and the published encoder beside ours.

GLM_REAL_DATA    a folder with ice_text.model and alpaca_chinese_dataset.zip; nothing of it is copied or kept
     |  convert.py --real
     v
folder of a tokenizer (a link to ice_text.model), files of the archive below a temporary folder
Published     what the published tokenizer does to a text without special tokens: whitespace to pieces of its own,
              then one call of SentencePiece
"""

import json
import os
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

VARIABLE = "GLM_REAL_DATA"


def real_files(work: Path) -> tuple[Path, Path]:
    """(folder of the data set's history/, folder of the tokenizer), below `work`; without them the program ends."""
    folder = Path(os.environ.get(VARIABLE, ""))
    model, archive = folder / "ice_text.model", folder / "alpaca_chinese_dataset.zip"
    if not (os.environ.get(VARIABLE) and model.is_file() and archive.is_file()):
        sys.exit(f"--real: set {VARIABLE} to the folder that holds {model.name} and {archive.name}")
    source, tokenizer = work / "source", work / "tokenizer"
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(source)
    tokenizer.mkdir()
    (tokenizer / model.name).symlink_to(model.resolve())
    return source / "history", tokenizer


class Published:
    """The published encoder: `encode` as the script of 2023 calls it, a text and its answer to ids."""

    def __init__(self, tokenizer: Any):
        self.sp = SentencePieceProcessor(model_file=str(tokenizer.vocab_file))
        self.bos_token_id = tokenizer.bos_token_id
        self.middle, self.end = [tokenizer.gmask_token_id, tokenizer.bos_token_id], [tokenizer.eos_token_id]

    def ids(self, text: str) -> list[int]:
        """Ids of a text without special tokens."""
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        for length in range(80, 1, -1):
            text = text.replace(" " * length, f"<|blank_{length}|>")
        return self.sp.EncodeAsIds(text)

    def encode(self, prompt: str, answer: str) -> list[int]:
        """Ids of a row."""
        return [*self.ids(prompt), *self.middle, *self.ids(answer), *self.end]


def compare_ids(rows: Path, tokenizer: Any) -> dict[str, Any]:
    """Is each row that `encode_file` makes of these what the published encoder makes of it?"""
    from glmhelpers.tokens.encode import Settings, encode_file
    from glmhelpers.tokens.examples import examples_of

    published, settings = Published(tokenizer), Settings()
    with open(rows, encoding="utf-8") as lines:
        pairs = [pair for line in lines for pair in examples_of(json.loads(line), settings)]
    made = encode_file(rows, tokenizer).with_format("numpy")["input_ids"]
    differing = sum(list(ids) != published.encode(*pair) for ids, pair in zip(made, pairs, strict=True))
    return {"compared_rows": len(pairs), "differing_ids": differing}


def compare_calls(rows: Path, tokenizer: Any, most: int = 20_000, turns: int = 3) -> dict[str, Any]:
    """CPU seconds of `tokenizer(texts)` and of the published encoder, a call a text, in turns; the least of each."""
    with open(rows, encoding="utf-8") as lines:
        texts = [json.loads(line)["output"] for line, _ in zip(lines, range(most), strict=False)]
    published = Published(tokenizer)
    ways = {
        "published": lambda: [published.ids(text) for text in texts],
        "a list": lambda: tokenizer(texts, add_special_tokens=False)["input_ids"],
        "a text at a time": lambda: [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, list[list[int]]] = {}
    for _ in range(turns):
        for way, encode in ways.items():
            started = time.process_time()
            found[way] = encode()
            seconds[way].append(time.process_time() - started)
    least = {way: min(times) for way, times in seconds.items()}
    return {
        "texts": len(texts),
        "cpu_s": {way: round(time, 3) for way, time in least.items()},
        "times_published": {way: round(time / least["published"], 2) for way, time in least.items()},
        "equal": found["a list"] == found["a text at a time"] == found["published"],
    }
