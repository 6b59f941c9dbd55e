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
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

import thuglm.prompt
from glmhelpers.tokens import examples, round_trip, texts
from glmhelpers.tokens import prompts as templates
from glmhelpers.tokens.examples import Chunk, chunks, examples_of
from glmhelpers.tokens.report import Settings, TokenReport
from glmhelpers.tokens.round_trip import RoundTrip, around_difference, text_ids
from glmhelpers.utils.environment import output_folder
from glmhelpers.utils.files import current, read_json, whole_file, write_json
from glmhelpers.utils.folders import expanded
from thuglm.constants import IGNORE_INDEX, MAX_LENGTH

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "length": pa.int32(),
        "split_key": pa.float64(),
    }
)
PROBES = ("你好，世界！", "a\n\tb  c", "<sop> [MASK] [gMASK] <eop>", "１２３ é 👋")


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

    def targets_from(self, start: Any) -> Any:
        """Place of the first target, or many of them."""
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
        FileNotFoundError: no such file. IsADirectoryError: it is a folder.
        ValueError: a line is no row (the message names it), or not one example is left.
    """
    path, chosen = expanded(path), Settings(**settings)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name the file in it that convert_alpaca wrote")
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
    for module in (examples, templates, texts, round_trip, thuglm.prompt):
        key.update(Path(str(module.__file__)).read_bytes())
    key.update(Path(__file__).read_bytes())
    return key.hexdigest()


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


def _write(path: Path, source: Path, target: Path, encoder: _Encoder) -> None:
    report = TokenReport(path.name, asdict(encoder.settings))
    with whole_file(target) as unfinished:
        with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as stream:
            for chunk, ids in _with_ids(encoder.tokenizer, chunks(source, encoder.settings, report)):
                stream.write_batch(_joined(encoder, chunk, ids, report))
        if not report.kept:
            raise ValueError(f"{path}: not one example is left. {report}")
        values = json.loads(json.dumps(vars(report)))
        write_json(target.with_suffix(".json"), values | {"sha256": _checksum(unfinished, values)})


def _with_ids(tokenizer: Any, some: Iterable[Chunk]) -> Iterator[tuple[Chunk, list[list[int]]]]:
    """Each chunk with its ids. SentencePiece works in threads and needs no lock of Python, which reads the next rows
    meanwhile, and puts the last ones together. Of other tokenizers nobody knows whether two threads may ask them."""
    threads = min(4, os.cpu_count() or 1)
    # Chunks take unequal times, so some more than there are threads wait.
    ahead = 2 * threads if hasattr(tokenizer, "text_ids") else 0
    with ThreadPoolExecutor(threads) as behind:
        waiting: deque[tuple[Chunk, Future]] = deque()
        for chunk in some:
            waiting.append((chunk, behind.submit(text_ids, tokenizer, chunk.texts)))
            if len(waiting) > ahead:
                done, ids = waiting.popleft()
                yield done, ids.result()
        for done, ids in waiting:
            yield done, ids.result()


def _joined(encoder: _Encoder, chunk: Chunk, ids: list[list[int]], report: TokenReport) -> pa.RecordBatch:
    """The examples of a chunk as they are learnt; `ids` are those of its texts."""
    texts, keys = chunk.texts[1::2], chunk.keys
    flat, prompts, answers = _flat(ids)
    lengths = prompts + len(encoder.middle) + answers + 1
    report.examples += len(lengths)
    report.lengths.update(lengths.tolist())
    # Which examples are not simply put together: one that is too long, has no answer, or a special token in a text.
    odd = (answers == 0) | (lengths > encoder.limit)
    special = np.flatnonzero(np.isin(flat, list(encoder.reserved)))
    odd[np.searchsorted(np.cumsum(prompts + answers), special, "right")] = True
    if odd.any():
        kept = np.ones(len(odd), bool)
        for place in np.flatnonzero(odd).tolist():
            joined = encoder.join(ids[2 * place], ids[2 * place + 1])
            if isinstance(joined, str):
                report.dropped[joined] += 1
                kept[place] = False
            else:
                report.cut += len(joined[0]) < int(lengths[place])
                ids[2 * place + 1] = joined[0][joined[1] : -1]
        places = np.flatnonzero(kept).tolist()
        texts, keys = [texts[place] for place in places], keys[kept]
        ids = [own for place in places for own in ids[2 * place : 2 * place + 2]]
        flat, prompts, answers = _flat(ids)
    changed = encoder.round_trip.changed(texts, ids[1::2])
    report.changed += len(changed)
    report.changed_shown += [around_difference(*pair) for pair in changed[: 3 - len(report.changed_shown)]]
    report.kept += len(texts)
    return _batch(encoder, flat, prompts, answers, keys, report)


def _flat(ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids one behind the other as int32, numbers of ids of the prompts, and of the answers)."""
    sizes = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(chain.from_iterable(ids), np.int32, int(sizes.sum())), sizes[::2], sizes[1::2]


def _batch(
    encoder: _Encoder, flat: np.ndarray, prompts: np.ndarray, answers: np.ndarray, keys: np.ndarray, report: TokenReport
) -> pa.RecordBatch:
    """Examples of the ids of their texts, which lie one behind the other, and with the special ids between them."""
    starts = prompts + len(encoder.middle)
    lengths = starts + answers + 1
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ends, first = offsets[1:] - 1, offsets[:-1] + prompts
    values, is_text = np.empty(offsets[-1], np.int32), np.ones(offsets[-1], bool)
    special = [(first + place, id) for place, id in enumerate(encoder.middle)] + [(ends, encoder.end[0])]
    for places, id in special:
        values[places] = id
        is_text[places] = False
    values[is_text] = flat
    # Runs of what is no target and what is one, in turn.
    untaught = encoder.targets_from(starts)
    runs = np.stack([untaught, lengths - untaught], 1).ravel()
    labels = np.where(np.repeat(np.arange(len(runs)) % 2 == 1, runs), values, np.int32(IGNORE_INDEX))
    report.tokens += len(values)
    report.targets += int((lengths - untaught).sum())
    columns = [pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(each)) for each in (values, labels)]
    return pa.record_batch([*columns, pa.array(lengths, pa.int32()), pa.array(keys, pa.float64())], schema=SCHEMA)
