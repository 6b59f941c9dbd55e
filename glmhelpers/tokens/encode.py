"""Labels and ids: rows become tokens; what the model reads, and which of it is learnt (the rest is -100).

    place        0    1    2    3        4      5    6    7
    input_ids    ▁    你   好   [gMASK]  <sop>  ▁    好   <eop>
    labels       .    .    .    .        .      ▁    好   <eop>       . = -100, no target
                 └─ prompt ─┘                   └ answer ┘
    target of    place 4 predicts place 5, 5 predicts 6, 6 predicts 7 (the model shifts the labels by one)

<sop> is no target by default: it is the same token in every row, and in use it is a part of the prompt, so nothing
could be learnt from it. The original fine-tuning script trained it all the same; `train_sop=True` does so too.

A conversation is learnt by its last answer. `answers="all"` makes one example of each answer, with the turns before it
in the prompt. One long row with several answers as targets would not do: the prompt is read in both directions, so
earlier answers would see themselves.

Tokens are kept in a file that is named after everything they depend on: the rows, the tokenizer, the template, the
settings and this code. Change any of them, and the old file is not found any more.
"""

import errno
import hashlib
import json
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

import thuglm.prompt
from glmhelpers.tokens import prompts as templates
from glmhelpers.tokens import round_trip, texts
from glmhelpers.tokens.prompts import build_prompt, with_input
from glmhelpers.tokens.report import Settings, TokenReport
from glmhelpers.tokens.round_trip import RoundTrip, around_difference, text_ids
from glmhelpers.utils.environment import output_folder
from glmhelpers.utils.files import current, read_json, whole_file, write_json
from glmhelpers.utils.folders import expanded
from thuglm.constants import IGNORE_INDEX, MAX_LENGTH
from thuglm.prompt import as_turns

CHUNK = 2048
"""Rows that are in memory at one time."""

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "length": pa.int32(),
        "split_key": pa.float64(),
    }
)
PROBES = ("你好，世界！", "a\n\tb  c", "<sop> [MASK] [gMASK] <eop>", "１２３ é 👋")


def examples_of(row: Mapping[str, Any], settings: Settings) -> Iterator[tuple[str, str]]:
    """(prompt, answer) of a row: one pair, or one for each answer of its conversation.

    Args:
        row: `instruction`, `output` and, if there are any, `input`, `history` ([[question, answer], ...]), `system`.
    """
    history = as_turns(row.get("history") or [])
    system = row.get("system") or ""
    if settings.answers == "all":
        for turn, (question, answer) in enumerate(history):
            yield build_prompt(question, history[:turn], settings.template, system=system), answer
    query, about = row["instruction"], row.get("input") or ""
    yield build_prompt(query, history, settings.template, about, system), row["output"]


class _Encoder:
    """Puts prompt and answer ids together; knows the tokenizer's special ids."""

    def __init__(self, tokenizer: Any, settings: Settings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.round_trip = RoundTrip(tokenizer)
        self.model_limit = model_length(tokenizer)
        self.limit = min(settings.max_length or self.model_limit, self.model_limit)
        *middle, end = tokenizer.build_inputs_with_special_tokens([], [])
        self.middle, self.end = middle, [end]
        mask = tokenizer.convert_tokens_to_ids("[MASK]")
        self.reserved = {*middle, end, mask, tokenizer.pad_token_id}

    def join(self, prompt: list[int], answer: list[int]) -> tuple[list[int], int] | str:
        """(input_ids, place of the first answer token), or the reason why there are none."""
        if not self.reserved.isdisjoint(prompt) or not self.reserved.isdisjoint(answer):
            return "special token in the text"
        if not answer:
            return "answer without tokens"
        limit, start = self.limit, len(prompt) + len(self.middle)
        if start + len(answer) + 1 > limit:
            if self.settings.too_long == "drop":
                whose = "the model's " if limit == self.model_limit else ""
                return f"longer than {whose}{limit} tokens"
            answer = answer[: max(0, limit - start - 1)]
            if not answer:
                return f"prompt alone fills {limit} tokens"
        return prompt + self.middle + answer + self.end, start

    def targets_from(self, start: int) -> int:
        """Place of the first target."""
        return start - 1 if self.settings.train_sop else start


def model_length(tokenizer: Any) -> int:
    """Most tokens that the model can read: `max_sequence_length` of the config.json beside the tokenizer's model file;
    that of ChatGLM-6B where there is none."""
    path = Path(str(getattr(tokenizer, "vocab_file", ""))).parent / "config.json"
    try:
        length = read_json(path).get("max_sequence_length", MAX_LENGTH)
    except (OSError, ValueError, AttributeError):
        return MAX_LENGTH
    return length if isinstance(length, int) and length > 0 else MAX_LENGTH


def encode_example(tokenizer: Any, row: Mapping[str, Any], **settings: Any) -> dict[str, list[int]]:
    """Tokens of one row's last answer.

    Args:
        tokenizer: ChatGLM's tokenizer.
        row: as in `examples_of`.
        **settings: fields of `Settings`.

    Returns:
        `input_ids` and `labels` of one length, lists of token ids; a label of -100 is no target.

    Raises:
        ValueError: the row cannot be used (too long, a special token written in its text); the message says why.
    """
    encoder = _Encoder(tokenizer, Settings(**settings))
    *_, (prompt, answer) = examples_of(row, encoder.settings)
    joined = encoder.join(*text_ids(tokenizer, [prompt, answer]))
    if isinstance(joined, str):
        raise ValueError(f"the row {row['instruction'][:40]!r} cannot be encoded: {joined}")
    ids, start = joined
    first = encoder.targets_from(start)
    return {"input_ids": ids, "labels": [IGNORE_INDEX] * first + ids[first:]}


def encode_file(path: str | Path, tokenizer: Any, cache: str | Path | None = None, **settings: Any) -> datasets.Dataset:
    """Tokens of a JSON Lines file, from the cache if they are there.

    Args:
        path: a file as `convert_alpaca` writes it.
        tokenizer: ChatGLM's tokenizer.
        cache: folder for token files; by default `tokens` beside the file, or in the output folder (GLM_OUTPUT) where
            nothing can be written beside it. A token file that is damaged is made again.
        **settings: fields of `Settings`.

    Returns:
        A memory-mapped dataset with the columns `input_ids`, `labels` (lists of int32), `length` (tokens; for
        batches of similar length) and `split_key` (0 to 1, from a hash of the first question). `token_report` tells
        what became of the rows.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is no row (the message names it), or not one example is left.
    """
    path, chosen = expanded(path), Settings(**settings)
    # The present file, also where a conversion was killed before it gave the file its name.
    rows, encoder = current(path.parent, path.name, path.name), _Encoder(tokenizer, chosen)
    name = f"{path.stem}-{cache_key(rows, tokenizer, chosen)}.arrow"
    target = (expanded(cache) if cache else path.parent / "tokens") / name
    try:
        _make_whole(path, rows, target, encoder)
    except OSError as error:
        if cache or error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        target = output_folder() / "tokens" / name
        print(f"[NOTE] nothing can be written into {path.parent}: the tokens are in {target.parent}")
        _make_whole(path, rows, target, encoder)
    return datasets.Dataset.from_file(str(target))


def _make_whole(path: Path, rows: Path, target: Path, encoder: _Encoder) -> None:
    if not _is_whole(target):
        _write(path, rows, target, encoder)


def _is_whole(target: Path) -> bool:
    """Whether a token file is there, with its report, as it was written."""
    if not target.is_file():
        return False
    try:
        values = read_json(target.with_suffix(".json"))
        whole = values.pop("sha256") == _checksum(target, values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        print(f"[NOTE] {target} is damaged, or its report is: the rows are encoded again")
    return whole


def _checksum(tokens: Path, report: Mapping[str, Any]) -> str:
    """SHA-256 of a token file and of its report."""
    with open(tokens, "rb") as file:
        total = hashlib.file_digest(file, "sha256")
    total.update(json.dumps(report, sort_keys=True).encode())
    return total.hexdigest()


def token_report(dataset: datasets.Dataset) -> TokenReport:
    """The report of a dataset that `encode_file` made.

    Raises:
        FileNotFoundError: the report is not beside the dataset's file.
    """
    values = read_json(Path(dataset.cache_files[0]["filename"]).with_suffix(".json"))
    del values["sha256"]
    values["dropped"] = Counter(values["dropped"])
    values["lengths"] = Counter({int(length): count for length, count in values["lengths"].items()})
    values["changed_shown"] = [(before, after) for before, after in values["changed_shown"]]
    return TokenReport(**values)


def cache_key(path: Path, tokenizer: Any, settings: Settings) -> str:
    """32 hexadecimal digits that change with the rows, the tokenizer, the template, the settings or the code."""
    key = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        key.update(hashlib.file_digest(file, "sha256").digest())
    if hasattr(tokenizer, "sp_model"):
        key.update(tokenizer.sp_model.serialized_model_proto())
    # Two tokenizers can share a model file and still differ in what they do before and after it.
    probes = [tokenizer.encode(probe, probe) for probe in PROBES]
    key.update(json.dumps([asdict(settings), model_length(tokenizer), probes], sort_keys=True).encode())
    for module in (__file__, templates.__file__, texts.__file__, round_trip.__file__, thuglm.prompt.__file__):
        key.update(Path(module).read_bytes())
    return key.hexdigest()


def split_key(row: Mapping[str, Any]) -> float:
    """A number from 0 to 1 that depends on the row's first question alone, not on case, width or spaces.

    Rows of one conversation, and a question that occurs twice with different answers, get the same number.
    """
    history = row.get("history") or []
    first = history[0][0] if history else with_input(row["instruction"], row.get("input") or "")
    plain = " ".join(unicodedata.normalize("NFKC", first).casefold().split())
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "big") / 2**64


def split_by_prompt(
    dataset: datasets.Dataset, share: float = 0.05, seed: int = 0
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(training part, held-out part): equal questions are always on the same side, on every machine and in any order.

    Args:
        dataset: from `encode_file`.
        share: part of the questions to hold out, 0 to 1.
        seed: another number holds out other questions.

    Raises:
        ValueError: `share` is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; it must be from 0 to 1")
    golden = 0.6180339887498949
    held = (np.asarray(dataset["split_key"]) + seed * golden) % 1.0 < share
    return dataset.select(np.flatnonzero(~held)), dataset.select(np.flatnonzero(held))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
                texts = row["instruction"], row["output"]
                row["history"] = as_turns(row.get("history") or [])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number} is no row with instruction and output ({type(error).__name__}: {error}); "
                    "let glmhelpers.data.convert.convert_alpaca write this file"
                ) from error
            if not all(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError(f"{path}, line {number}: instruction or output is empty; run convert_alpaca first")
            yield row


def _write(path: Path, source: Path, target: Path, encoder: _Encoder) -> None:
    report = TokenReport(path.name, asdict(encoder.settings))
    rows = _rows(source)
    with whole_file(target) as unfinished:
        with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as stream:
            for chunk, ids in _with_ids(encoder.tokenizer, _chunks(rows, encoder.settings, report)):
                stream.write_batch(_joined(encoder, chunk, ids, report))
        if not report.kept:
            raise ValueError(f"{path}: not one example is left. {report}")
        values = json.loads(json.dumps(vars(report)))
        write_json(target.with_suffix(".json"), values | {"sha256": _checksum(unfinished, values)})


@dataclass
class _Chunk:
    """Examples whose ids are made in one call."""

    texts: list[str]
    """Prompt, answer, prompt, answer, ..."""
    keys: list[float]
    """`split_key` of each example."""


def _with_ids(tokenizer: Any, chunks: Iterable[_Chunk]) -> Iterator[tuple[_Chunk, list[list[int]]]]:
    """Each chunk with its ids. SentencePiece works in a thread: meanwhile Python reads the next rows, and puts the last
    ones together. Of other tokenizers nobody knows whether they may be asked from two threads."""
    ahead = 1 if hasattr(tokenizer, "text_ids") else 0
    with ThreadPoolExecutor(1) as behind:
        waiting: deque[tuple[_Chunk, Future]] = deque()
        for chunk in chunks:
            waiting.append((chunk, behind.submit(text_ids, tokenizer, chunk.texts)))
            if len(waiting) > ahead:
                done, ids = waiting.popleft()
                yield done, ids.result()
        for done, ids in waiting:
            yield done, ids.result()


def _chunks(rows: Iterator[dict[str, Any]], settings: Settings, report: TokenReport) -> Iterator[_Chunk]:
    while some := list(islice(rows, CHUNK)):
        report.rows += len(some)
        chunk = _Chunk([], [])
        for row in some:
            of_row = list(examples_of(row, settings))
            chunk.texts += chain.from_iterable(of_row)
            chunk.keys += [split_key(row)] * len(of_row)
        yield chunk


def _joined(encoder: _Encoder, chunk: _Chunk, ids: list[list[int]], report: TokenReport) -> pa.RecordBatch:
    """The examples of a chunk as they are learnt; `ids` are those of its texts."""
    flat, sizes, starts, kept_keys = [], [], [], []
    learnt: list[tuple[str, list[int]]] = []
    for text, key, prompt, answer in zip(chunk.texts[1::2], chunk.keys, ids[::2], ids[1::2], strict=True):
        report.examples += 1
        whole = len(prompt) + len(encoder.middle) + len(answer) + 1
        report.lengths[whole] += 1
        joined = encoder.join(prompt, answer)
        if isinstance(joined, str):
            report.dropped[joined] += 1
            continue
        report.cut += len(joined[0]) < whole
        learnt.append((text, answer))
        flat += joined[0]
        sizes.append(len(joined[0]))
        starts.append(encoder.targets_from(joined[1]))
        kept_keys.append(key)
    changed = encoder.round_trip.changed([text for text, _ in learnt], [own for _, own in learnt])
    report.changed += len(changed)
    report.changed_shown += [around_difference(*pair) for pair in changed[: 3 - len(report.changed_shown)]]
    report.kept += len(sizes)
    report.tokens += len(flat)
    return _batch(flat, sizes, starts, kept_keys, report)


def _batch(
    flat: list[int], sizes: list[int], starts: list[int], keys: list[float], report: TokenReport
) -> pa.RecordBatch:
    values, lengths = np.array(flat, dtype=np.int32), np.array(sizes, dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    place = np.arange(len(values)) - np.repeat(offsets[:-1], lengths)
    labels = np.where(place < np.repeat(np.array(starts, dtype=np.int32), lengths), IGNORE_INDEX, values)
    report.targets += int((labels != IGNORE_INDEX).sum())
    lists = [pa.ListArray.from_arrays(pa.array(offsets), pa.array(column)) for column in (values, labels)]
    return pa.record_batch([*lists, pa.array(lengths), pa.array(keys, pa.float64())], schema=SCHEMA)
