"""What a valid row is, and how the rows of other people's files become ours.

    {"prompt": " Name a fruit ", "response": "Apple.", "history": "", "id": 7}
         |                          |                  |             |
         v                          v                  v             v
    {"instruction": "Name a fruit", "input": "", "output": "Apple."}      other keys are left behind

A row is valid if its instruction and its output are texts with something in them. "N/A" is such a text. Inputs that
only say that there is no input (无输入, No input ...) become "".
"""

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glmhelpers.data.chats import is_message, read_chat
from glmhelpers.tokens import texts

NAMES = {
    "instruction": ("instruction", "prompt"),
    "input": ("input",),
    "output": ("output", "response", "completion"),
    "history": ("history",),
    "system": ("system",),
    "messages": ("messages", "conversations", "conversation"),
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

NO_PAIRS, NO_CHAT = "history is not pairs of texts", "messages are no conversation"
PLACEHOLDER, NUMBER = "placeholder input", "numbers written as texts"

_AROUND = " \t\n.。!！<>()（）[]【】\"'“”"
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
    return {"instruction", "output"} <= found.keys() or "messages" in found


def check_columns(columns: Mapping[str, str]) -> None:
    """Whether each column is said to be one of ours.

    Raises:
        TypeError: they are no mapping.
        ValueError: one is not; a wrong name would be passed over, and every row be refused for another reason.
    """
    if not isinstance(columns, Mapping):
        raise TypeError(f'columns is {columns!r}; write it as {{"their name": "instruction", ...}}')
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
    if is_message(dict.fromkeys(names)):
        return 'they are messages; put those of one conversation into one object: {"messages": [...]}'
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
    # A row whose output is a list is no table: there both are lists, of one length; or all are, where one is not found.
    pair = [row[found[name]] for name in ("instruction", "output") if name in found]
    columns = pair if len(pair) == 2 else list(row.values()) if pair else []
    sizes = [len(value) if isinstance(value, Mapping | list) else 0 for value in columns]
    is_table = len(sizes) > 1 and sizes[0] > 0 and len(set(sizes)) == 1
    if is_table or {"columns", "data"} <= row.keys() or (row and all(map(_seems_row, row.values()))):
        return "it is a table in one object; one object a row is needed: with pandas, to_json(..., orient='records')"
    for name, value in row.items():
        if (
            name not in found.values()
            and isinstance(value, list)
            and value
            and all(isinstance(each, Mapping) for each in value)
        ):
            if is_message(value[0]):
                return f'a conversation is in {name!r}: say columns={{{name!r}: "messages"}}'
            return f"{len(value):,} objects are inside {name!r}: write that list alone into a file, or pass the list"
    return ""


def _seems_row(value: Any) -> bool:
    return isinstance(value, Mapping) and holds_rows(find_columns(list(value), {}))


class Refused(ValueError):
    """A row is not valid; the message is the reason under which it is counted, `detail` says more about this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


def clean_row(row: Any, found: Mapping[str, str], changes: Counter) -> dict[str, Any]:
    """The row under our names, without what does not belong into a text.

    Args:
        row: what a reader found.
        found: from `find_columns`.
        changes: counts what had to be changed, by names such as "lone surrogate" or `PLACEHOLDER`.

    Returns:
        `instruction`, `input` ("" if there is none), `output`, and if the row has them `history`
        ([[question, answer], ...]) and `system`. A conversation ends with the last of its answers.

    Raises:
        Refused: it is no valid row.
    """
    try:
        values = {ours: _plain(row[theirs]) for ours, theirs in found.items()}
    except RecursionError:
        raise Refused("nested too deeply") from None
    query, answer = values.get("instruction"), values.get("output")
    messages = values.get("messages")
    if isinstance(query, list) and isinstance(answer, list):
        messages, query, answer = query + answer, None, None
    system, turns = _chat(values.get("history"), "history", NO_PAIRS, changes, has_query=True)
    if messages and not query and not answer:
        words, said = _chat(messages, "messages", NO_CHAT, changes)
        if not said:
            raise Refused(NO_CHAT, "it holds no question with an answer")
        *before, (query, answer) = said
        turns, system = turns + before, "\n".join(filter(None, (system, words)))
    cleaned: dict[str, Any] = {
        "instruction": _needed(query, "instruction", changes),
        "input": _about(values.get("input"), changes),
        "output": _needed(answer, "output", changes),
    }
    if turns:
        cleaned["history"] = [
            [_clean(question, changes), _clean(said, changes, indent=True)] for question, said in turns
        ]
    own = values.get("system")
    if own is not None and not isinstance(own, str):
        raise Refused("system is not text", _not_text("system", own))
    if (own or system) and (system := _clean("\n".join(filter(None, (own, system))), changes)):
        cleaned["system"] = system
    return cleaned


def clean_as_they_are(values: Sequence[Mapping[str, str]], found: Mapping[str, str]) -> list[dict[str, str] | None]:
    """`clean_row` of rows that have the same names and hold nothing but texts, but None for each that it may change or
    refuse. Most rows need nothing done, and to see that of all of them at once takes a fraction of the time.

    Args:
        values: what a reader found.
        found: from `find_columns`.
    """
    if found.keys() - {"input"} != {"instruction", "output"}:
        return [None] * len(values)
    queries, answers = ([value[found[name]] for value in values] for name in ("instruction", "output"))
    inputs = [value[found["input"]] for value in values] if "input" in found else [""] * len(values)
    odd = texts.unclean(queries) | texts.unclean(inputs) | texts.unclean(answers)
    odd |= {place for place, about in enumerate(inputs) if about and _says_none(about)}
    return [
        {"instruction": query, "input": about, "output": answer} if query and answer and place not in odd else None
        for place, (query, about, answer) in enumerate(zip(queries, inputs, answers, strict=True))
    ]


def is_untranslated(row: Mapping[str, Any]) -> bool:
    """Neither question (with its input) nor answer has a Chinese character, and there are words in Latin letters."""
    text = f"{row['instruction']}\n{row['input']}\n{row['output']}"
    return (text.isascii() or not _CHINESE.search(text)) and bool(_LATIN.search(text))


def _plain(value: Any) -> Any:
    """A value without what numpy, pandas and Arrow put around it; None where it is missing."""
    if value is None or type(value) is str:
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    elif hasattr(value, "as_py"):
        value = value.as_py()
    pandas = sys.modules.get("pandas")  # whoever has a value of it has imported it
    if pandas is not None and (value is pandas.NA or value is pandas.NaT):
        return None
    # Tables write a missing value as NaN, the one number that differs from itself.
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return {name: _plain(each) for name, each in value.items()} if isinstance(value, Mapping) else value


def _clean(text: str, changes: Counter, indent: bool = False) -> str:
    """`clean_text`, but bytes that could not be decoded are refused."""
    if not text.isascii() and _LOST_BYTE.search(text):
        raise Refused(UNDECODABLE)
    return texts.clean_text(text, changes, indent)


def _needed(value: Any, name: str, changes: Counter) -> str:
    if value is None:
        raise Refused(f"no {name}")
    if not isinstance(value, str):
        raise Refused(f"{name} is not text", _not_text(name, value))
    if not (text := _clean(value, changes, indent=name == "output")):
        raise Refused(f"no {name}")
    return text


def _not_text(name: str, value: Any) -> str:
    """What a value is that is no text, and how it becomes one."""
    what, how = f"a {type(value).__name__}", "write it as a text"
    if isinstance(value, list):
        what, how = f"a list of {len(value)}", "write one text, or a row for each"
    elif isinstance(value, bytes):
        what, how = "bytes", "decode them first"
    elif isinstance(value, int | float):
        what, how = f"{value} and no text", "put it in quotes"
    return f"{name} is {what}: {how}"


def _about(value: Any, changes: Counter) -> str:
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        changes[NUMBER] += 1
        return str(value)
    if not isinstance(value, str):
        raise Refused("input is not text", _not_text("input", value))
    text = _clean(value, changes, indent=True)
    if text and _says_none(text):
        changes[PLACEHOLDER] += 1
        return ""
    return text


def _says_none(text: str) -> bool:
    return " ".join(text.strip(_AROUND).casefold().split()) in NO_INPUT


def _chat(
    value: Any, name: str, reason: str, changes: Counter, has_query: bool = False
) -> tuple[str, list[tuple[str, str]]]:
    """`read_chat`, with nothing for nothing, and a refusal for what cannot be read."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return "", []
    try:
        return read_chat(value, changes, has_query)
    except ValueError as error:
        raise Refused(reason, f"{name}: {error}") from None
