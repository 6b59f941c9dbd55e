"""Inference: answers, one at a time or many, fast, and how good they are.

chat.py: a conversation    decoder.py: one token, quickly    batch.py: many questions    scores.py: BLEU, ROUGE, loss
"""

from glmhelpers.inference.batch import answer, answers, compare, is_whole, share_right
from glmhelpers.inference.chat import ChatSession, Generation
from glmhelpers.inference.decoder import Decoder, likely
from glmhelpers.inference.model_state import merged_in_memory
from glmhelpers.inference.scores import (
    COUNT_HEADER,
    count_by_topic,
    evaluate,
    forgotten,
    held_out_loss,
    kept,
    score_texts,
)

__all__ = [
    "COUNT_HEADER",
    "ChatSession",
    "Decoder",
    "Generation",
    "answer",
    "answers",
    "compare",
    "count_by_topic",
    "evaluate",
    "forgotten",
    "held_out_loss",
    "is_whole",
    "kept",
    "likely",
    "merged_in_memory",
    "score_texts",
    "share_right",
]
