"""One function turns a question into the text that the model reads: for data, training, evaluation and chat.

    instruction + input          history                     prompt
    +-------------------+   +------------------+   template  +-----------------------------+
    | Name three fruits | + | (question,answer)| ----------> | [Round 0]\\n问：..\\n答：..    |
    | (input, if any)   |   | (question,answer)|             | [Round 1]\\n问：Name three ... |
    +-------------------+   +------------------+             | 答：                         |
                                                             +-----------------------------+

A model answers well only to prompts of the shape it was trained on. So the name of the template is written
into the token file and beside the adapter, and whoever chats with the adapter asks for the same name here.

- "chatglm": the published chat format. A first question stands bare; with history, turns are numbered rounds.
- "alpaca": the format of the 2023 notebook this course grew from, `Instruction: ..\\nInput: ..\\nAnswer: `.
"""

from collections.abc import Callable, Sequence
from typing import Any

from glmhelpers.tokens.texts import clean_text
from thuglm.prompt import as_turns, chat_prompt

History = Sequence[Any]


def build_prompt(
    query: str, history: History = (), template: str = "chatglm", input: str = "", system: str = ""
) -> str:
    """The text that stands before the model's answer; every text in it is cleaned as `convert_alpaca` cleans rows.

    Args:
        query: the question or instruction.
        history: earlier turns, oldest first: (question, answer), or role/content messages.
        template: a key of TEMPLATES.
        input: text that the instruction is about; "" if there is none.
        system: words that hold for the whole conversation; they stand on lines of their own at the top.

    Returns:
        The prompt, without [gMASK] and <sop>: the tokenizer adds these.

    Raises:
        TypeError: the query, the input or the system is no text.
        ValueError: the template has no such name, or a turn of the history cannot be read.
    """
    if template not in TEMPLATES:
        raise ValueError(f"no template is called {template!r}; use one of {sorted(TEMPLATES)}")
    turns = [(clean_text(question), clean_text(answer, indent=True)) for question, answer in as_turns(history)]
    prompt = TEMPLATES[template](_text(query, "query"), turns, _text(input, "input", indent=True))
    return f"{system}\n{prompt}" if (system := _text(system, "system")) else prompt


def with_input(query: str, input: str = "") -> str:
    """A query and the text it is about, as one question."""
    return f"{query}\n{input}" if input else query


def _text(text: str, name: str, indent: bool = False) -> str:
    if not isinstance(text, str):
        raise TypeError(f"the {name} is a {type(text).__name__}; expected text")
    return clean_text(text, indent=indent)


def _chatglm(query: str, history: History, input: str) -> str:
    return chat_prompt(with_input(query, input), history)


def _alpaca(query: str, history: History, input: str) -> str:
    turns = "".join(f"Instruction: {asked}\nAnswer: {answer}\n\n" for asked, answer in history)
    middle = f"\nInput: {input}" if input else ""
    return f"{turns}Instruction: {query}{middle}\nAnswer: "


TEMPLATES: dict[str, Callable[[str, History, str], str]] = {"chatglm": _chatglm, "alpaca": _alpaca}
"""Name of a template -> function(query, history, input) that writes the prompt."""
