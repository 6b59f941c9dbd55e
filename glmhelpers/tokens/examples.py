"""Lines of a file become the texts that are encoded: a prompt and an answer for each example, and its split key.

2048 lines ──► three columns of clean texts ──► templates, keys: a column at a time
         └──► anything else, in any line     ──► row by row, where an error names its line

Most files hold nothing but clean questions, inputs and answers. To ask every row by itself what it is takes longer than
to make its prompt: so all are asked at once, and only the answer "not quite" leads to the way that asks each.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from glmhelpers.tokens.prompts import TEMPLATES, build_prompt, with_input
from glmhelpers.tokens.report import Settings, TokenReport
from glmhelpers.tokens.texts import unclean
from thuglm.prompt import as_turns, check_text

CHUNK = 2048
"""Rows that are in memory at one time."""
_columns = itemgetter("instruction", "input", "output")
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
"""An escape of half a character, with or without the other half behind it."""


@dataclass
class Chunk:
    """Examples whose ids are made in one call.

    Attributes:
        texts: prompt, answer, prompt, answer, ...
        keys: `split_key` of each example.
    """

    texts: list[str]
    keys: np.ndarray


def examples_of(row: Mapping[str, Any], settings: Settings) -> Iterator[tuple[str, str]]:
    """(prompt, answer) of a row: one pair, or one for each answer of its conversation.

    Args:
        row: `instruction`, `output` and, if there are any, `input`, `history` ([[question, answer], ...]), `system`.

    Raises:
        TypeError: one of these is no text.
        ValueError: one of them holds half a character (see `check_text`), or the history cannot be read.
    """
    history = as_turns(row.get("history") or [])
    check_texts(row, history)
    system = row.get("system") or ""
    if settings.answers == "all":
        for turn, (question, answer) in enumerate(history):
            yield build_prompt(question, history[:turn], settings.template, system=system), answer
    query, about = row["instruction"], row.get("input") or ""
    yield build_prompt(query, history, settings.template, about, system), row["output"]


def check_texts(row: Mapping[str, Any], history: list[tuple[str, str]]) -> None:
    """`check_text` of all texts of a row; `history` is its own, read."""
    for name in ("instruction", "output", "input", "system"):
        if name in ("instruction", "output") or row.get(name) is not None:
            check_text(row[name], f"the row's {name}")
    for number, turn in enumerate(history):
        check_text("".join(turn), f"turn {number} of the row's history")


def split_key(row: Mapping[str, Any]) -> float:
    """A number from 0 to 1 that depends on the row's first question alone, not on case, width or spaces.

    Rows of one conversation, and a question that occurs twice with different answers, get the same number.
    """
    history = row.get("history") or []
    first = history[0][0] if history else with_input(row["instruction"], row.get("input") or "")
    return float(_keys([first])[0])


def _keys(questions: list[str]) -> np.ndarray:
    """Split keys, float64, of first questions."""
    plain = (" ".join(unicodedata.normalize("NFKC", each).casefold().split()) for each in questions)
    digests = [hashlib.blake2b(each.encode(), digest_size=8).digest() for each in plain]
    return np.frombuffer(b"".join(digests), ">u8") / 2.0**64


def chunks(path: Path, settings: Settings, report: TokenReport) -> Iterator[Chunk]:
    """The examples of a JSON Lines file; its rows are counted in `report`.

    Raises:
        ValueError: a line is no row; the message names it.
    """
    before = 0
    with open(path, "rb") as file:
        while lines := list(islice(file, CHUNK)):
            yield _in_columns(lines, settings, report) or _row_by_row(path, lines, before, settings, report)
            before += len(lines)


def _in_columns(lines: list[bytes], settings: Settings, report: TokenReport) -> Chunk | None:
    """The examples of lines that hold a question, an input and an answer each, and no more; None if some do not."""
    joined = b",".join(lines)
    if b"\\u" in joined and _HALF.search(joined):
        return None
    try:
        rows = json.loads(f"[{joined.decode()}]")
        queries, inputs, answers = zip(*map(_columns, rows), strict=True)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    # No object goes over the end of a line, so each line is one: no text of JSON holds a line end as it is.
    one_each = joined.count(b"}\n,{") == len(lines) - 1 == len(rows) - 1
    if not one_each or {*map(len, rows)} != {3} or {*map(type, chain(queries, inputs, answers))} != {str}:
        return None
    if not (all(map(str.strip, queries)) and all(map(str.strip, answers))):
        return None
    report.rows += len(rows)
    template = TEMPLATES[settings.template]
    prompts = [template(query, (), about) for query, about in zip(queries, inputs, strict=True)]
    for place in unclean(queries) | unclean(inputs):
        prompts[place] = build_prompt(queries[place], (), settings.template, inputs[place])
    keys = _keys([with_input(query, about) for query, about in zip(queries, inputs, strict=True)])
    return Chunk(list(chain.from_iterable(zip(prompts, answers, strict=True))), keys)


def _row_by_row(path: Path, lines: list[bytes], before: int, settings: Settings, report: TokenReport) -> Chunk:
    """The examples of any lines; `before` is how many stand above them in the file."""
    texts: list[str] = []
    keys: list[float] = []
    for number, line in enumerate(lines, before + 1):
        if line.strip():
            row = _row(path, number, line)
            report.rows += 1
            of_row = list(examples_of(row, settings))
            texts += chain.from_iterable(of_row)
            keys += [split_key(row)] * len(of_row)
    return Chunk(texts, np.array(keys, np.float64))


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
        texts = row["instruction"], row["output"]
        if None not in texts:  # "is empty" says more
            check_texts(row, as_turns(row.get("history") or []))
        row["history"] = as_turns(row.get("history") or [])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}, line {number} is no row with instruction and output ({type(error).__name__}: {error}); "
            "let glmhelpers.data.convert.convert_alpaca write this file"
        ) from error
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{path}, line {number}: instruction or output is empty; run convert_alpaca first")
    return row
