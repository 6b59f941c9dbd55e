"""Counts, loss and scores against formulas written out by hand."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmhelpers.inference.batch import Comparison, answers
from glmhelpers.inference.scores import (
    COUNT_HEADER,
    count_by_topic,
    evaluate,
    forgotten,
    held_out_loss,
    kept,
    score_pair,
    score_texts,
    words,
)
from glmhelpers.runtime import find_project
from glmhelpers.tokens.collate import RightPadCollator
from glmhelpers.tokens.encode import encode_example
from tests.helpers.reference import fresh_model, model, tokenizer

DATA = find_project() / "data"
AD = "宽松的阔腿裤这两年真的吸粉不少,明星时尚达人的心头爱。毕竟好穿时尚,谁都能穿出腿长2米的效果"
OTHER = "这款阔腿裤真的好穿,宽松的裤腿时尚显瘦,谁都能穿出腿长的效果。"


# Scores


def f1(hits, found, wanted):
    precision, recall = hits / max(found, 1), hits / max(wanted, 1)
    return 2 * precision * recall / (precision + recall) if hits else 0.0


def ngrams(tokens, n):
    return {tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)}


def longest_common(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        new = [0]
        for at, y in enumerate(b):
            new.append(row[at] + 1 if x == y else max(row[at + 1], new[-1]))
        row = new
    return row[-1]


def rouge_by_hand(text, reference):
    """Sets of n-grams, and the longest common subsequence of words, as F1; a full stop ends a word."""
    got, want = (" ".join(words(side)).replace(".", " ").split() for side in (text, reference))
    sets = [(ngrams(got, n), ngrams(want, n)) for n in (1, 2)]
    return [
        *(f1(len(a & b), len(a), len(b)) for a, b in sets),
        f1(longest_common(got, want), len(got), len(want)),
    ]


def bleu_by_hand(text, reference):
    """Papineni's BLEU-4 over characters; the k-th precision that is 0 becomes 1 / (2^k * its denominator)."""
    logs, zeros = 0.0, 0
    for n in range(1, 5):
        got = [text[at : at + n] for at in range(len(text) - n + 1)]
        hits = sum(min(got.count(gram), _count(reference, gram)) for gram in set(got))
        total = max(1, len(got))
        if n == 1 and not hits:
            return 0.0
        zeros += not hits
        logs += math.log(hits / total if hits else 1 / (2**zeros * total)) / 4
    short = 1.0 if len(text) > len(reference) else math.exp(1 - len(reference) / len(text))
    return short * math.exp(logs)


def _count(text, gram):
    return sum(text[at : at + len(gram)] == gram for at in range(len(text)))


@pytest.mark.parametrize(
    ("text", "reference"),
    [(AD, AD), (OTHER, AD), (AD, OTHER), ("红色", AD), ("的", AD), ("完全不同", OTHER), ("a b c d", "a b c e f")],
)
def test_scores_are_the_formulas(text, reference):
    bleu, *rouge = score_pair(text, reference)
    assert bleu == pytest.approx(bleu_by_hand(text, reference), abs=1e-6)
    assert rouge == pytest.approx(rouge_by_hand(text, reference), abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.text("裤子时尚红色的a ,", min_size=1, max_size=24), st.text("裤子时尚红色的a ,", min_size=1, max_size=24))
def test_scores_are_shares_and_best_for_the_reference_itself(text, reference):
    if not words(text) or not words(reference):
        assert not words(text) or score_pair(text, AD)[0] <= 1
        return
    scores, perfect = score_pair(text, reference), score_pair(reference, reference)
    assert all(0 <= score <= best + 1e-9 for score, best in zip(scores, perfect, strict=True))
    assert scores[1:] == pytest.approx(rouge_by_hand(text, reference), abs=1e-6)


def test_averages_are_over_all_answers_and_empty_ones_count():
    scores = score_texts([AD, "", OTHER, " \n"], [AD] * 4)
    one = score_pair(OTHER, AD)
    assert scores.bleu4 == pytest.approx(100 * (1 + one[0]) / 4)
    assert scores.rouge1 == pytest.approx(100 * (1 + one[1]) / 4, abs=1e-5)
    assert scores.rouge2 == pytest.approx(100 * (1 + one[2]) / 4, abs=1e-5)
    assert scores.rougel == pytest.approx(100 * (1 + one[3]) / 4, abs=1e-5)
    assert (scores.answers, scores.empty) == (4, 2)
    assert "4 answers, 2 empty" in str(scores)


@pytest.mark.parametrize("text", ["", " ", "...", ". .", "\n", "."])
def test_answers_without_words_score_nothing_and_raise_nothing(text):
    assert score_pair(text, AD) == (0, 0, 0, 0)


def test_impossible_scores_are_refused():
    with pytest.raises(ValueError, match="1 answers and 2 references"):
        score_texts(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="0 answers"):
        score_texts([], [])
    with pytest.raises(ValueError, match="reference 1 has no words"):
        score_texts(["a", "b"], ["a", "  "])


def test_evaluate_answers_and_scores(monkeypatch):
    rows = [{"instruction": "你好", "output": AD}, {"instruction": "再见", "output": OTHER}]
    scores, texts = evaluate(model(), tokenizer(), rows, max_new_tokens=8)
    assert texts == answers(model(), tokenizer(), ["你好", "再见"], max_new_tokens=8)
    assert scores == score_texts(texts, [AD, OTHER])
    drawn = [evaluate(model(), tokenizer(), rows, seed, do_sample=True, max_new_tokens=8)[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


# Counts


def test_counts_by_topic():
    rows = [
        {"question": "q1", "expect": "Paris", "topic": "capitals"},
        {"question": "q2", "expect": "7", "topic": "sums"},
        {"question": "q3", "expect": "8", "topic": "sums"},
    ]
    pairs = [Comparison("q1", "paris!", ""), Comparison("q2", "3+4=7.", "7"), Comparison("q3", " ", "9")]
    counts = count_by_topic(rows, pairs)
    assert [(c.topic, c.questions, c.base_right, c.tuned_right, c.base_empty, c.tuned_empty) for c in counts] == [
        ("capitals", 1, 1, 0, 0, 1),
        ("sums", 2, 1, 1, 1, 0),
    ]
    assert forgotten(counts) == ["capitals"]
    assert forgotten(counts, allowed=1.0) == []
    assert len(str(counts[0])) == len(COUNT_HEADER)
    with pytest.raises(ValueError, match="same order"):
        count_by_topic(rows[::-1], pairs)


MOON = {"question": "什么是月亮？", "expect": "卫星", "answer": "地球的卫星。"}
TOKYO = {"question": "Capital of Japan?", "expect": "Tokyo", "answer": "The capital of Japan is Tokyo."}
SUM = {"question": "3+4=?", "expect": "3+4=7."}


def said(*pairs):
    return [Comparison(row["question"], *pair) for row, pair in zip((MOON, TOKYO, SUM), pairs, strict=True)]


def test_a_damaged_answer_is_not_kept():
    """Words that are right do not save an answer with a garbled tail, and each lost one is named."""
    pairs = said(("地球的卫星。", "地球的卫星， a good am language model."), ("tokyo", "tokyo"), ("3+4=7.", "3+4=8."))
    found = kept([MOON, TOKYO, SUM], pairs)
    assert (found.counted, found.before, found.after) == ("whole answers", 3, 1)
    assert found.shares == pytest.approx((1.0, 1 / 3))
    assert found.garbled == (pairs[0],)
    assert found.forgotten == (pairs[2],)
    assert str(found).splitlines() == [
        "whole answers to 3 questions: 3 before, 1 after; 1 forgotten, 1 garbled",
        "    forgotten: 3+4=? 3+4=7. -> 3+4=8.",
        "    garbled: 什么是月亮？ 地球的卫星。 -> 地球的卫星， a good am language model.",
    ]


def test_kept_counts_sentences_too_and_what_was_learnt_on_the_way():
    sentence = "The capital  of japan is Tokyo"
    pairs = said(("太阳", "卫星"), (sentence, sentence + " Tokyo."), ("3+4=9.", "3 + 4 = 7"))
    found = kept([MOON, TOKYO, SUM], pairs)
    assert (found.before, found.after, found.forgotten, found.garbled) == (1, 2, (), (pairs[1],))


def test_free_answers_are_counted_by_their_right_words():
    pairs = said(
        ("月亮是地球的一颗卫星。", "它是卫星，真的。"), ("It is Tokyo, of course", "Kyoto"), ("It is 7", "So it is 7")
    )
    assert kept([MOON, TOKYO, SUM], pairs).before == 0, "no free answer is a reference"
    found = kept([MOON, TOKYO, SUM], pairs, whole=False)
    assert (found.counted, found.before, found.after) == ("right words", 3, 2)
    assert (found.forgotten, found.garbled) == ((pairs[1],), ())


def test_kept_needs_the_questions_that_were_asked():
    with pytest.raises(ValueError, match="same order"):
        kept([TOKYO, MOON, SUM], said(("", ""), ("", ""), ("", "")))
    with pytest.raises(ValueError, match="no questions"):
        kept([], [])


def test_general_questions_are_not_those_of_the_training():
    general = json.loads((DATA / "general.json").read_text(encoding="utf-8"))
    assert len(general) >= 20
    assert all(row.keys() == {"question", "expect", "answer", "topic"} and all(row.values()) for row in general)
    taught = {row["instruction"] for row in json.loads((DATA / "identity.json").read_text(encoding="utf-8"))}
    assert not taught & {row["question"] for row in general}, "what the adapter was shown is no proof"


# Loss


def encoded():
    texts = [("你好", "你好！"), ("晚上睡不着应该怎么办", "早点睡。"), ("a", "b" * 30)]
    return [encode_example(tokenizer(), {"instruction": a, "output": b}) for a, b in texts]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_loss_is_the_mean_over_all_labelled_tokens(batch_size):
    total, tokens = 0.0, 0
    for row in encoded():
        logits = model()(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        labels = torch.tensor(row["labels"])[1:]
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        tokens += int((labels != -100).sum())
    found = held_out_loss(model(), encoded(), RightPadCollator(tokenizer()), batch_size)
    assert found.tokens == tokens
    assert found.loss == pytest.approx(total / tokens, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_loss_leaves_the_mode_as_it_was_and_needs_rows():
    net = fresh_model().train()
    held_out_loss(net, encoded(), RightPadCollator(tokenizer()))
    assert net.training
    with pytest.raises(ValueError, match="no held-out rows"):
        held_out_loss(net, [], RightPadCollator(tokenizer()))
