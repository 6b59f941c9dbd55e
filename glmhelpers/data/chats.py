"""Conversations as hubs publish them become a system text, turns, and a last question with its answer.

    {"messages": [{"role": "system", "content": S}, {"role": "user", "content": q}, {"role": "assistant", ...}]}
    {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}, ...]}          ShareGPT
    {"conversation": [{"human": q, "assistant": a}, ...]}   [[q, a], ...]                         pairs
                                          |
                                          v
    system S, turns [(q, a), (q, a), ...]      the last turn is the row's instruction and output, the others its history

What stands in no turn (a greeting before the first question, a last question without an answer) is left out and
counted. Calls of tools, pictures and whoever else speaks are refused by name.
"""

import ast
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

GREETING, UNANSWERED = "answers before the first question", "questions at the end without an answer"
LONGEST_LITERAL = 2**20
"""Characters of a list as Python writes it that are looked at."""

_USER = {"user", "human", "prompter", "question"}
_ASSISTANT = {"assistant", "gpt", "chatgpt", "bot", "model", "answer"}
_NAMES = (("role", "content"), ("from", "value"))


def is_message(value: Any) -> bool:
    """Whether an object is one message of a conversation, by its names."""
    return isinstance(value, Mapping) and any({*names} <= value.keys() for names in _NAMES)


def read_chat(value: Any, changes: Counter, has_query: bool = False) -> tuple[str, list[tuple[str, str]]]:
    """(system text, turns) of a list of messages or of pairs, or of a text that spells one.

    Args:
        value: of the column.
        changes: counts what is left out.
        has_query: the row's own question comes behind it, so it must not end with one.

    Raises:
        ValueError: it is none, or one that cannot be learnt; the message says why.
    """
    items = _spelled(value) if isinstance(value, str) else value
    if items is None:
        return "", []
    if not isinstance(items, list | tuple):
        raise ValueError("not a list of messages or pairs")
    system: list[str] = []
    turns: list[tuple[str, str]] = []
    asked: str | None = None
    for item in items:
        for role, text in _said(item):
            if role == "system":
                system.append(text)
            elif role == "user":
                if asked is not None:
                    raise ValueError("two questions in turn")
                asked = text
            elif asked is not None:
                turns.append((asked, text))
                asked = None
            elif turns:
                raise ValueError("two answers in turn")
            else:
                changes[GREETING] += 1
    if asked is not None:
        if has_query:
            raise ValueError("it ends with a question, which has no answer")
        changes[UNANSWERED] += 1
    return "\n".join(system), turns


def _said(item: Any) -> list[tuple[str, str]]:
    """(role, text) of each message in an element of a conversation."""
    if isinstance(item, list | tuple):
        if len(item) != 2 or not all(isinstance(text, str) for text in item):
            raise ValueError("a pair is not two texts")
        return [("user", item[0]), ("assistant", item[1])]
    if not isinstance(item, Mapping):
        raise ValueError("neither messages nor pairs")
    for role, content in _NAMES:
        if role in item and content in item:
            return [(_role(item[role]), _text(item[content], item))]
    said = [
        (_role(name), _text(value, item)) for name, value in item.items() if str(name).lower() in _USER | _ASSISTANT
    ]
    if sorted(role for role, _ in said) != ["assistant", "user"]:
        raise ValueError(f"a message with the names {', '.join(map(repr, item))[:80]}; role and content are needed")
    return sorted(said, reverse=True)


def _role(name: Any) -> str:
    plain = name.strip().lower() if isinstance(name, str) else name
    if plain == "system":
        return "system"
    if plain in _USER or plain in _ASSISTANT:
        return "user" if plain in _USER else "assistant"
    raise ValueError(f"a message of {name!r:.40}, who is neither user, assistant nor system")


def _text(content: Any, message: Mapping[str, Any]) -> str:
    if message.get("tool_calls") or message.get("function_call"):
        raise ValueError("a message that calls tools")
    if isinstance(content, list | tuple):
        parts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        content = "\n".join(parts) if parts and all(isinstance(part, str) for part in parts) else None
    if not isinstance(content, str):
        raise ValueError("a message that is not text")
    return content


def _spelled(text: str) -> Sequence[Any]:
    """A list that stands in a text, as JSON or as Python writes it (tables turn lists into such texts)."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.strip()[: LONGEST_LITERAL + 1])
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError("a text that spells no list") from None
