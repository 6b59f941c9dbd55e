"""Ask the tiny checkpoint many questions at once and count the right answers.

questions --> build_prompt --> left-padded batch --> greedy generate --> text --> compare
                                                                          training rows: equal to `output`
                                                                          held-out rows: contains `expect`
"""

import unicodedata
from collections import defaultdict
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from glmhelpers.tokens.prompts import History, build_prompt
from thuglm import ChatGLMTokenizer

LONGEST_ANSWER = 40


def ask(
    model: PreTrainedModel,
    tokenizer: ChatGLMTokenizer,
    prompts: Sequence[str],
    batch_size: int = 64,
) -> list[str]:
    """Greedy answers to finished prompts, in the order of the prompts.

    Prompts of similar length share a batch, so that little is padded.
    """
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    model.eval()
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        inputs = tokenizer([prompts[i] for i in batch], return_tensors="pt", padding=True)
        with torch.no_grad():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=LONGEST_ANSWER)
        for i, row in zip(batch, ids[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            answers[i] = tokenizer.decode(row, skip_special_tokens=True)
    return answers


def same_text(text: str) -> str:
    """What two equal answers have in common: full-width punctuation becomes ASCII (NFKC), blanks do not count."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def training_accuracy(model, tokenizer, rows: Sequence[dict[str, str]], history: History = ()) -> dict:
    """Share of training rows that are answered word for word, and the first wrong answers.

    Args:
        rows: alpaca rows.
        history: turns that stand before each question.

    Returns:
        {"rows": n, "right": n, "share": 0..1, "wrong": [[question, answer, expected], ...at most 10]}
    """
    prompts = [build_prompt(row["instruction"], history, input=row["input"]) for row in rows]
    answers = ask(model, tokenizer, prompts)
    wrong = [
        [prompt, answer, row["output"]]
        for prompt, answer, row in zip(prompts, answers, rows, strict=True)
        if same_text(answer) != same_text(row["output"])
    ]
    right = len(rows) - len(wrong)
    return {"rows": len(rows), "right": right, "share": right / len(rows), "wrong": wrong[:10]}


def held_out_accuracy(model, tokenizer, rows: Sequence[dict[str, str]], history: History = ()) -> dict:
    """Share of held-out questions whose answer contains what is expected, by topic.

    Returns:
        topic -> {"rows", "right", "share", "wrong": [[question, answer, expected], ...]}
    """
    answers = ask(model, tokenizer, [build_prompt(row["question"], history) for row in rows])
    topics: dict[str, list] = defaultdict(list)
    for row, answer in zip(rows, answers, strict=True):
        topics[row["topic"]].append((same_text(row["expect"]) in same_text(answer), row, answer))
    return {
        topic: {
            "rows": len(results),
            "right": (right := sum(ok for ok, _, _ in results)),
            "share": right / len(results),
            "wrong": [[row["question"], answer, row["expect"]] for ok, row, answer in results if not ok],
        }
        for topic, results in topics.items()
    }
