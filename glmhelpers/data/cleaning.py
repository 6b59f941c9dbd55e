"""What a valid row is, and how the rows of other people's files become ours.

    {"prompt": " Name a fruit ", "response": "Apple.", "history": "", "id": 7}
         |                          |                  |             |
         v                          v                  v             v
    {"instruction": "Name a fruit", "input": "", "output": "Apple."}      other keys are left behind

A row is valid if its instruction and its output are texts with something in them. "N/A" is such a text. Inputs that
only say that there is no input (无输入, No input ...) become "".
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

NAMES = {
    "instruction": ("instruction", "prompt"),
    "input": ("input",),
    "output": ("output", "response"),
    "history": ("history",),
    "system": ("system",),
}
"""Our name of a column -> the names it has in files, the first one found counts."""

NO_INPUT = {
    "noinput",
    "no input",
    "no input needed",
    "no input required",
    "no input necessary",
    "no input provided",
    "no input is needed",
    "no input is required",
    "无输入",
    "没有输入",
    "暂无输入",
    "无需输入",
    "不需要输入",
    "无输入内容",
    "没有输入内容",
    "没有提供输入",
    "输入为空",
}
"""Inputs that say there is none, without the punctuation around them."""

UNDECODABLE = "text that is not UTF-8"
"""Reason of rows with bytes that could not be decoded."""
ENCODING_HINT = "say what its text is, such as encoding='gb18030'"

_AROUND = " \t\n.。!！<>()（）[]【】\"'“”"
# Control characters other than tab and newline, and surrogates (halves of a character, or undecodable bytes).
_TROUBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_BLANK = re.compile(r"[\x0b\x0c\x1c-\x1f]")
_LOST_BYTE = re.compile(r"[\udc80-\udcff]")
_CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003134f]")
_LATIN = re.compile(r"[A-Za-z]{2}")


def find_columns(names: Sequence[Any], columns: Mapping[str, str]) -> dict[str, str]:
    """Our name of a column -> the name it has among `names`; columns that are not there are left out.

    Args:
        names: of a row's keys or a table's columns.
        columns: their name -> our name, as the user says; this counts before anything else.
    """
    said = {ours: theirs for theirs, ours in columns.items() if theirs in names}
    plain = {name.strip().casefold(): name for name in reversed(names) if isinstance(name, str)}
    found: dict[str, str] = {}
    for ours, aliases in NAMES.items():
        theirs = next((alias for alias in aliases if alias in names), None)
        theirs = theirs or next((plain[alias] for alias in aliases if alias in plain), None)
        if ours in said or theirs:
            found[ours] = said[ours] if ours in said else str(theirs)
    return found


def holds_rows(found: Mapping[str, str]) -> bool:
    """Whether a table has the columns that a row needs; `found` is from `find_columns`."""
    return {"instruction", "output"} <= found.keys()


def check_columns(columns: Mapping[str, str]) -> None:
    """Whether each column is said to be one of ours.

    Raises:
        ValueError: one is not; a wrong name would be passed over, and every row be refused for another reason.
    """
    for theirs, ours in columns.items():
        if ours not in NAMES:
            turned = f"; turn it round: {{{ours!r}: {theirs!r}}}" if theirs in NAMES else ""
            raise ValueError(
                f"columns says {{{theirs!r}: {ours!r}}}, but {ours!r} is none of {', '.join(NAMES)}: "
                f"the name in your files comes first, our name second{turned}"
            )


def missing_columns(names: Sequence[Any]) -> str:
    """What to tell about a table, or about objects, without instruction or output."""
    if any(_LOST_BYTE.search(name) for name in names if isinstance(name, str)):
        return f"the names of its columns are no UTF-8; {ENCODING_HINT}"
    more = ", ..." if len(names) > 8 else ""
    return (
        f"its columns are {', '.join(repr(name)[:40] for name in names[:8])}{more}; instruction and output are needed "
        '(say which they are: columns={"their name": "instruction", ...})'
    )


def layout_hint(row: Mapping[str, Any], found: Mapping[str, str]) -> str:
    """What to do about an object that is no row, but holds rows in itself; "" if it seems to hold none.

    Args:
        row: the only object of a file.
        found: from `find_columns`.
    """
    if any(isinstance(row[found[name]], Mapping | list) for name in ("instruction", "output") if name in found):
        return "each column is one list; one object a row is needed: with pandas, to_json(..., orient='records')"
    for name, value in row.items():
        if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
            return f"{len(value):,} objects are inside {name!r}: write that list alone into a file, or pass the list"
    return ""


class Refused(ValueError):
    """A row is not valid; the message is the reason under which it is counted."""


def clean_row(row: Any, found: Mapping[str, str], changes: Counter) -> dict[str, Any]:
    """The row under our names, without what does not belong into a text.

    Args:
        row: what a reader found.
        found: from `find_columns`.
        changes: counts what had to be changed: "lone surrogate", "control character", "placeholder input".

    Returns:
        `instruction`, `input` ("" if there is none), `output`, and if the row has them `history`
        ([[question, answer], ...]) and `system`.

    Raises:
        Refused: it is no valid row.
    """
    values = {ours: row[theirs] for ours, theirs in found.items()}
    cleaned: dict[str, Any] = {
        "instruction": _needed(values.get("instruction"), "instruction", changes),
        "input": _about(values.get("input"), changes),
        "output": _needed(values.get("output"), "output", changes),
    }
    if history := _history(values.get("history"), changes):
        cleaned["history"] = history
    system = values.get("system")
    if not _is_null(system) and not isinstance(system, str):
        raise Refused("system is not text")
    if isinstance(system, str) and (system := clean_text(system, changes)):
        cleaned["system"] = system
    return cleaned


def clean_text(text: str, changes: Counter) -> str:
    """Without space around it and with "\\n" as line end; what cannot be written becomes U+FFFD, and is counted.

    Raises:
        Refused: the text holds bytes that could not be decoded.
    """
    text = text.strip()
    if not _TROUBLE.search(text):
        return text
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if _LOST_BYTE.search(text):
        raise Refused(UNDECODABLE)
    text = _BLANK.sub(" ", text)
    for character in _TROUBLE.findall(text):
        changes["lone surrogate" if character >= "\ud800" else "control character"] += 1
    return _TROUBLE.sub("\ufffd", text)


def is_untranslated(row: Mapping[str, Any]) -> bool:
    """Neither question (with its input) nor answer has a Chinese character, and there are words in Latin letters."""
    text = f"{row['instruction']}\n{row['input']}\n{row['output']}"
    return not _CHINESE.search(text) and bool(_LATIN.search(text))


def _is_null(value: Any) -> bool:
    # Tables write a missing value as NaN, the one number that differs from itself.
    return value is None or (isinstance(value, float) and value != value)


def _needed(value: Any, name: str, changes: Counter) -> str:
    if _is_null(value):
        raise Refused(f"no {name}")
    if not isinstance(value, str):
        raise Refused(f"{name} is not text")
    if not (text := clean_text(value, changes)):
        raise Refused(f"no {name}")
    return text


def _about(value: Any, changes: Counter) -> str:
    if _is_null(value):
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise Refused("input is not text")
    text = clean_text(value, changes)
    if text and " ".join(text.strip(_AROUND).casefold().split()) in NO_INPUT:
        changes["placeholder input"] += 1
        return ""
    return text


def _history(value: Any, changes: Counter) -> list[list[str]]:
    if isinstance(value, str):
        if not value.strip():
            return []
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Refused("history is not pairs of texts") from None
    if _is_null(value):
        return []
    lists = (list, tuple)
    pairs = isinstance(value, lists) and all(isinstance(turn, lists) and len(turn) == 2 for turn in value)
    if not pairs or not all(isinstance(text, str) for turn in value for text in turn):
        raise Refused("history is not pairs of texts")
    return [[clean_text(question, changes), clean_text(answer, changes)] for question, answer in value]
