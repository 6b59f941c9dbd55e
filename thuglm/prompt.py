"""How a conversation becomes the text of one prompt, and how an answer is tidied: the published rules.

no history      query

with history    [Round 0]
                问：first question
                答：first answer
                [Round 1]
                问：query
                答：                 <- the model goes on from here
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# The same rules for `tokenizer.apply_chat_template`.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') or message['content'] is not string %}
        {{- raise_exception("Message " ~ loop.index0 ~ " has role '" ~ message['role'] ~ "': ChatGLM knows texts of "
            ~ "'user' and 'assistant' alone, in turns, 'user' first.") }}
    {%- endif %}
{%- endfor %}
{%- if messages | length % 2 == 0 %}
    {{- raise_exception("The last message is an answer, and an answer is no part of a ChatGLM prompt: leave it out, or "
        ~ "pass it to tokenizer(prompt, answer).") }}
{%- elif messages | length == 1 %}
    {{- messages[0]['content'] }}
{%- else %}
    {%- for message in messages %}
        {%- if message['role'] == 'user' %}
            {{- '[Round ' ~ loop.index0 // 2 ~ ']\\n问：' ~ message['content'] ~ '\\n答：' }}
        {%- else %}
            {{- message['content'] ~ '\\n' }}
        {%- endif %}
    {%- endfor %}
{%- endif %}"""


_HALF = re.compile("[\ud800-\udfff]")


def check_text(text: Any, name: str) -> None:
    """Whether a text can be read by a tokenizer.

    Args:
        text: what was given.
        name: what to call it in a message.

    Raises:
        TypeError: it is no text.
        ValueError: it holds half a character (a lone surrogate), as broken JSON escapes and lost bytes leave it.
    """
    if not isinstance(text, str):
        raise TypeError(f"{name} is a {type(text).__name__}; expected text")
    if half := _HALF.search(text):
        raise ValueError(
            f"{name} holds half a character, {half[0]!r}, at place {half.start()} "
            f"({text[max(0, half.start() - 10) : half.end() + 10]!r}): read it again with the right encoding, or put "
            "U+FFFD in its place, as convert_alpaca does, with "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
        )


def as_turns(history: Iterable[Any]) -> list[tuple[str, str]]:
    """A history as (question, answer) turns: of such pairs, of role/content messages, or of both.

    Raises:
        ValueError: names the first element that is neither, or a message without its partner.
    """
    if isinstance(history, list | tuple) and not history:
        return []  # as in most rows; the questions below take longer than the rest of their prompts
    if isinstance(history, str | bytes | Mapping | set | frozenset) or not isinstance(history, Iterable):
        raise ValueError(f"the history is a {type(history).__name__}; expected a list of (question, answer)")
    turns: list[tuple[str, str]] = []
    asked: str | None = None
    for number, turn in enumerate(history):
        wrong = f"turn {number} of the history is {turn!r}; expected (question, answer)"
        if isinstance(turn, Mapping):
            role, text = turn.get("role"), turn.get("content")
            if role not in ("user", "assistant") or not isinstance(text, str) or (role == "user") != (asked is None):
                raise ValueError(f"{wrong}, or in turns {{'role': 'user', ...}} and {{'role': 'assistant', ...}} texts")
            if asked is not None:
                turns.append((asked, text))
            asked = text if role == "user" else None
        elif asked is not None:
            raise ValueError(f"{wrong[: -len('(question, answer)')]}the assistant's answer to the message before it")
        elif not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise ValueError(wrong)
        else:
            turns.append((turn[0], turn[1]))
    if asked is not None:
        raise ValueError(f"the history ends with the question {asked!r}, unanswered: ask it as the query")
    return turns


def chat_prompt(query: str, history: Sequence[Any] = ()) -> str:
    """The published chat prompt for `query` after `history`, see `as_turns`.

    Raises:
        TypeError: the query is no text.
        ValueError: the history cannot be read.
    """
    if not isinstance(query, str):
        raise TypeError(f"the query is a {type(query).__name__}; expected text")
    turns = as_turns(history)
    if not turns:
        return query
    rounds = [f"[Round {i}]\n问：{question}\n答：{answer}\n" for i, (question, answer) in enumerate(turns)]
    return "".join(rounds) + f"[Round {len(turns)}]\n问：{query}\n答："


def process_response(response: str) -> str:
    """Trim an answer and give back the full-width punctuation that the tokenizer's NFKC normalisation took from
    Chinese text: an ASCII `, ! : ; ?` that touches a Chinese character becomes `，！：；？`.

    A character of several byte tokens whose last ones were not written is left out.
    """
    response = response.rstrip("\ufffd").strip().replace("[[训练时间]]", "2023年")
    for ascii_mark, full_width in zip(",!:;?", "，！：；？", strict=True):
        mark = re.escape(ascii_mark)
        response = re.sub(rf"([\u4e00-\u9fff]){mark}", rf"\1{full_width}", response)
        response = re.sub(rf"{mark}([\u4e00-\u9fff])", rf"{full_width}\1", response)
    return response
