"""How good are the answers? Counts, the loss on held-out rows, and the scores of the published table.

    questions ─► base, tuned ─► right, wrong, empty           by topic: learnt? forgotten?
                            └─► whole, garbled, forgotten     by question: what did training damage?
    held-out rows ─► loss per token ─► perplexity = e^loss    how surprised is the model by the right answer
    answers, references ─► BLEU-4, ROUGE-1, -2, -L            how much do the words overlap

BLEU and ROUGE of Chinese depend on what counts as a word. The authors' evaluation of ChatGLM-6B on ADGEN takes single
characters for BLEU (nltk, smoothing method 3) and the words of jieba for ROUGE (rouge_chinese, F1), averages over
answers, and reports percent. `score_texts` is that recipe, with the same three libraries; only an empty answer, which
stopped the original with an error, scores 0. Data and settings of the published table are in `adgen`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from glmhelpers.inference.batch import Comparison, answers, is_right, is_whole, several, share_right
from glmhelpers.inference.model_state import held_alone
from glmhelpers.utils.types import Model

# Counts ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TopicCount:
    """Right and empty answers to the questions of one topic, base beside tuned."""

    topic: str
    questions: int
    base_right: int
    tuned_right: int
    base_empty: int
    tuned_empty: int

    def __str__(self) -> str:
        return (
            f"{self.topic:20} {self.questions:9} {self.base_right:10} {self.tuned_right:11} "
            f"{self.base_empty:10} {self.tuned_empty:11}"
        )


COUNT_HEADER = f"{'topic':20} {'questions':>9} {'base right':>10} {'tuned right':>11} {'base empty':>10} tuned empty"


def count_by_topic(rows: Sequence[Mapping[str, str]], compared: Sequence[Comparison]) -> list[TopicCount]:
    """Count the right answers (see `inference.is_right`), topic by topic.

    Args:
        rows: `question`, `expect` and `topic`, as in data/held_out.json.
        compared: what `compare` gave for these questions, in the same order.

    Raises:
        ValueError: the two do not belong together.
    """
    _same_questions(rows, compared)
    counts = []
    for topic in dict.fromkeys(row["topic"] for row in rows):
        here = [(row, pair) for row, pair in zip(rows, compared, strict=True) if row["topic"] == topic]
        expected = [row["expect"] for row, _ in here]
        texts = [[pair.base for _, pair in here], [pair.tuned for _, pair in here]]
        right = [round(share_right(side, expected) * len(here)) for side in texts]
        empty = [sum(not text.strip() for text in side) for side in texts]
        counts.append(TopicCount(topic, len(here), *right, *empty))
    return counts


def forgotten(counts: Iterable[TopicCount], allowed: float = 0.15) -> list[str]:
    """Topics in which the tuned model lost more than the share `allowed` of the questions; empty is good.

    A topic has few questions: this names where to look. Whether training was sound is `lora.MAY_LOSE`, over all.
    """
    return [c.topic for c in counts if c.base_right - c.tuned_right > allowed * c.questions]


@dataclass(frozen=True)
class Kept:
    """What training left of what the base knew, question by question; printed, it names each answer that was lost.

    Attributes:
        counted: "whole answers" or "right words", see `kept`.
        questions: how many were asked.
        before, after: how many of them base and tuned model answered so that it counts.
        forgotten: the base's answer counted, and the tuned model's has not even the right words.
        garbled: the base's answer was whole; the tuned model's has the right words and something else.
    """

    counted: str
    questions: int
    before: int
    after: int
    forgotten: tuple[Comparison, ...]
    garbled: tuple[Comparison, ...]

    @property
    def shares(self) -> tuple[float, float]:
        """Before and after as shares (0 to 1) of the questions."""
        return self.before / self.questions, self.after / self.questions

    def __str__(self) -> str:
        lines = [
            f"{self.counted} to {self.questions} questions: {self.before} before, {self.after} after; "
            f"{len(self.forgotten)} forgotten, {len(self.garbled)} garbled"
        ]
        for what, pairs in (("forgotten", self.forgotten), ("garbled", self.garbled)):
            lines += [f"    {what}: {pair.question} {pair.base} -> {pair.tuned}" for pair in pairs]
        return "\n".join(lines)


def kept(rows: Sequence[Mapping[str, str]], compared: Sequence[Comparison], whole: bool = True) -> Kept:
    """What the base knew and the tuned model still knows.

    Args:
        rows: `question`, `expect` and, where a sentence is a right answer too, `answer`, as in data/general.json.
        compared: what `compare` gave for these questions, in the same order.
        whole: count whole answers (`inference.is_whole`). A full-size model words its answers freely, and nearly none
            is one of the references: count the right words (`inference.is_right`) with whole=False, and say so.

    Raises:
        ValueError: no questions, or the two do not belong together.
    """
    _same_questions(rows, compared)
    if not rows:
        raise ValueError("no questions: nothing can be counted")

    def counts(row: Mapping[str, str], text: str) -> bool:
        return is_whole(text, row["expect"], row.get("answer", "")) if whole else is_right(text, row["expect"])

    both = list(zip(rows, compared, strict=True))
    lost = [(row, pair) for row, pair in both if counts(row, pair.base) and not counts(row, pair.tuned)]
    return Kept(
        counted="whole answers" if whole else "right words",
        questions=len(both),
        before=sum(counts(row, pair.base) for row, pair in both),
        after=sum(counts(row, pair.tuned) for row, pair in both),
        forgotten=tuple(pair for row, pair in lost if not is_right(pair.tuned, row["expect"])),
        garbled=tuple(pair for row, pair in lost if is_right(pair.tuned, row["expect"])),
    )


def _same_questions(rows: Sequence[Mapping[str, str]], compared: Sequence[Comparison]) -> None:
    if [row["question"] for row in rows] != [pair.question for pair in compared]:
        raise ValueError("rows and comparisons are not of the same questions in the same order")


# Loss -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean loss over all labelled tokens of held-out rows.

    Attributes:
        loss: nats per token.
        tokens: labelled tokens.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """e^loss: among so many equally likely tokens the model seems to choose."""
        return math.exp(self.loss)

    def __str__(self) -> str:
        return f"loss {self.loss:.3f}, perplexity {self.perplexity:.2f} over {self.tokens} tokens"


@torch.no_grad()
def held_out_loss(model: Model, rows: Sequence[Mapping[str, Any]], collate: Any, batch_size: int = 16) -> HeldOutLoss:
    """The loss on encoded rows, each token counted once however the rows are batched.

    Args:
        model: base, or base with adapter; left in the mode it was in.
        rows: `input_ids` and `labels`, as `encode_file` makes them.
        collate: a RightPadCollator.

    Raises:
        ValueError: there are no rows, or a batch without labels.
        RuntimeError: the model is writing an answer, as in a chat window.
    """
    if not len(rows):
        raise ValueError("no held-out rows: nothing can be measured")
    device = model.get_input_embeddings().weight.device
    total, tokens = 0.0, 0
    with held_alone(model):
        for start in range(0, len(rows), batch_size):
            batch = collate([rows[at] for at in range(start, min(start + batch_size, len(rows)))])
            count = int((batch["labels"][:, 1:] != -100).sum())
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            # Labels stay on the CPU: there their places are found without waiting.
            total += model(**inputs, labels=batch["labels"], return_logits=False).loss.item() * count
            tokens += count
    return HeldOutLoss(total / tokens, tokens)


# The published scores -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Averages over all answers, in percent; empty answers count with 0."""

    bleu4: float
    rouge1: float
    rouge2: float
    rougel: float
    answers: int
    empty: int

    def __str__(self) -> str:
        return (
            f"BLEU-4 {self.bleu4:.2f}   ROUGE-1 {self.rouge1:.2f}   ROUGE-2 {self.rouge2:.2f}   "
            f"ROUGE-L {self.rougel:.2f}   ({self.answers} answers, {self.empty} empty)"
        )


def score_texts(texts: Sequence[str], references: Sequence[str]) -> Scores:
    """Score answers against references by the recipe of the module's docstring.

    Raises:
        TypeError: texts or references are one text, or one of them is none.
        ValueError: none at all, numbers differ, or a reference is empty (its row is named).
    """
    texts, references = several(texts, "texts"), several(references, "references")
    if not texts or len(texts) != len(references):
        raise ValueError(f"{len(texts)} answers and {len(references)} references: as many of each, at least one")
    if empty := [row for row, reference in enumerate(references) if not words(reference)]:
        raise ValueError(f"reference {empty[0]} has no words: it cannot be compared with anything")
    rows = [score_pair(text, reference) for text, reference in zip(texts, references, strict=True)]
    means = [100 * sum(column) / len(rows) for column in zip(*rows, strict=True)]
    bleu4, rouge1, rouge2, rougel = means
    empty_count = sum(not text.strip() for text in texts)
    return Scores(bleu4, rouge1, rouge2, rougel, answers=len(texts), empty=empty_count)


def score_pair(text: str, reference: str) -> tuple[float, float, float, float]:
    """BLEU-4, ROUGE-1, -2 and -L (F1) of one answer, 0 to 1; all 0 for an answer without words."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    if not words(text):
        return 0.0, 0.0, 0.0, 0.0
    bleu = sentence_bleu([list(reference)], list(text), smoothing_function=SmoothingFunction().method3)
    (rouge,) = Rouge().get_scores(" ".join(words(text)), " ".join(words(reference)))
    return float(bleu), *(rouge[name]["f"] for name in ("rouge-1", "rouge-2", "rouge-l"))


def words(text: str) -> list[str]:
    """The words that jieba cuts a text into; none if there is nothing but space and full stops."""
    import jieba

    jieba.setLogLevel("ERROR")
    found = [word for word in jieba.cut(text) if word.strip()]
    return found if any(word.strip(".") for word in found) else []


def evaluate(
    model: nn.Module, tokenizer: Any, rows: Sequence[Mapping[str, str]], seed: int = 0, **settings: Any
) -> tuple[Scores, list[str]]:
    """Answer every row's instruction and score the answers against its output.

    Args:
        rows: `instruction` and `output`.
        seed: of the sampling.
        settings: as for `inference.answers`; greedy if none are given, `adgen.GENERATION` for the published table.

    Returns:
        the scores, and the answers in order.
    """
    torch.manual_seed(seed)
    texts = answers(model, tokenizer, [row["instruction"] for row in rows], **settings)
    return score_texts(texts, [row["output"] for row in rows]), texts
