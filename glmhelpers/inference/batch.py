"""Many questions at once, with and without the adapter. (For one conversation see `chat`.)

    question ─► template ─► tokens [gMASK] <sop> ─► base                ─► answer "before"
                                                └─► base + adapter      ─► answer "after"

One model in memory serves both: PEFT can switch the adapter off for the length of a `with` block.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from glmhelpers.inference.chat import plain_text, plain_turns
from glmhelpers.inference.model_state import held_alone, is_merged
from glmhelpers.tokens.prompts import build_prompt
from thuglm.prompt import process_response


def answer(
    model: Any,
    tokenizer: Any,
    question: str,
    history: Sequence[Any] = (),
    template: str = "chatglm",
    max_new_tokens: int = 48,
    **settings: Any,
) -> str:
    """One answer; greedy unless `do_sample=True` and friends are given.

    Args:
        history: earlier (question, answer) turns.
        max_new_tokens: stop after so many tokens.
        settings: any argument of `generate`.
    """
    return answers(model, tokenizer, [question], history, template, max_new_tokens, **settings)[0]


def answers(
    model: Any,
    tokenizer: Any,
    questions: Sequence[str],
    history: Sequence[Any] = (),
    template: str = "chatglm",
    max_new_tokens: int = 48,
    batch_size: int = 16,
    **settings: Any,
) -> list[str]:
    """An answer to each question, in batches that are padded on the left.

    Raises:
        TypeError: the questions are one text, or one of them is none.
        ValueError: several answers to each question are asked for; or a history that `as_turns` cannot read.
        RuntimeError: the model is writing another answer, as in a chat window.
    """
    prompts = _prompts(tokenizer, several(questions), history, template)
    with held_alone(model):
        return _answers(model, tokenizer, prompts, max_new_tokens, batch_size, **settings)


def several(texts: Iterable[str], name: str = "questions") -> list[str]:
    """The texts as a list.

    Raises:
        TypeError: they are one text, which would be taken letter by letter, or one of them is none; it is named.
    """
    if isinstance(texts, Mapping | set | frozenset) or not isinstance(texts, Iterable):
        raise TypeError(f"{name} is a {type(texts).__name__}: expected a list of texts")
    if isinstance(texts, str | bytes):
        hint = ", or ask with answer(model, tokenizer, question)" if name == "questions" else ""
        raise TypeError(f"{name} is one text: put it in a list{hint}")
    texts = list(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{number}] is {text!r}, a {type(text).__name__}: expected text")
    return texts


def _prompts(tokenizer: Any, questions: Iterable[str], history: Sequence[Any], template: str) -> list[str]:
    said = plain_turns(history, tokenizer)
    return [build_prompt(plain_text(question, tokenizer), said, template) for question in questions]


@torch.no_grad()
def _answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 48, batch_size: int = 16, **settings: Any
) -> list[str]:
    if settings.get("num_return_sequences") not in (None, 1):
        raise ValueError("num_return_sequences: one answer comes back for each question; ask it several times instead")
    texts: list[str] = []
    # The padding rows of the embedding have no text; a random draw could hit one.
    beyond = list(range(len(tokenizer), model.config.vocab_size))
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "suppress_tokens": beyond or None, **settings}
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: at least one question is asked at a time")
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(prompts[start : start + batch_size], padding=True, return_tensors="pt").to(model.device)
        ids = model.generate(**batch, **settings)
        ids = getattr(ids, "sequences", ids)  # return_dict_in_generate
        new = ids[:, batch["input_ids"].shape[1] :].tolist()
        texts += [process_response(tokenizer.decode(row, skip_special_tokens=True)) for row in new]
    return texts


@dataclass(frozen=True)
class Comparison:
    """A question, the base's answer and the tuned model's."""

    question: str
    base: str
    tuned: str


def compare(
    model: PeftModel,
    tokenizer: Any,
    questions: Iterable[str],
    history: Sequence[Any] = (),
    template: str = "chatglm",
    **settings: Any,
) -> list[Comparison]:
    """Answers without and with the adapter, side by side; arguments as for `answers`.

    Raises:
        ValueError: the adapter is merged into the weights, so there is no base to compare with.
        RuntimeError: the model is writing another answer, as in a chat window.
    """
    if is_merged(model):
        raise ValueError("the adapter is merged into the weights now: leave `with merged_in_memory(...)` first")
    questions, both = several(questions), []
    prompts = _prompts(tokenizer, questions, history, template)
    with held_alone(model):
        for context in (model.disable_adapter(), nullcontext()):
            with context:
                both.append(_answers(model, tokenizer, prompts, **settings))
    return [Comparison(*row) for row in zip(questions, *both, strict=True)]


def share_right(texts: Sequence[str], expected: Sequence[str]) -> float:
    """Share (0 to 1) of the answers that are right, see `is_right`; a TypeError for what is no list of texts."""
    texts, expected = several(texts, "texts"), several(expected, "expected")
    return sum(is_right(text, want) for text, want in zip(texts, expected, strict=True)) / max(1, len(texts))


_SUM = re.compile(r"(?:\d+[-+]\d+=)?(-?\d+)\.?")
_NUMBER = r"(?<![\d.,])-?\d+(?:[.,]\d+)*"
_RESULT = re.compile(rf"=\s*({_NUMBER})(?!\d|[.,]\d|\s*[-+*/×÷=])")
_EQUALS = re.compile(r"等于|is equal to|equals")


def is_right(text: str, expected: str) -> bool:
    """Whether an answer holds what is expected, spaces and case aside.

    Of a sum ("3+4=7." or "7") only the result counts, however the answer is worded: a whole number behind an equals
    sign (or 等于, equals), or the answer's last number if it has no such sign. The 7 in 17 or 7.5 is no 7.
    """
    want = "".join(expected.lower().split())
    if result := _SUM.fullmatch(want):
        plain = _EQUALS.sub("=", unicodedata.normalize("NFKC", text).lower()).replace("\u2212", "-")
        found = _RESULT.findall(plain) if "=" in plain else re.findall(_NUMBER, plain)[-1:]
        return result[1] in found
    return want in "".join(text.lower().split())


def is_whole(text: str, *references: str) -> bool:
    """Whether an answer *is* one of the references, spaces, case, full width and the final full stop aside.

    `is_right` looks for the right words and does not see what stands beside them. A damaged answer often still holds
    them: "地球的卫星， a good am language model." is right, and not whole.
    """
    return _bare(text) in {_bare(reference) for reference in references if reference}


def _bare(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".!。")
