"""Texts to ids and back, many in one call; and which texts come back as others.

    "x³ and a<n>b"  ──► ids ──►  "x3 and a\\nb"        the tokenizer reads ³ as 3, and <n> as a line end
                    learnt as       written by the model

The model can only learn the text on the right. Width (，and ,) and blanks are passed over here: answers get them back,
or nobody sees them. Decoding every text would take longer than encoding it: so each character is tried once, alone,
and only texts with one that is changed, or that acts on its neighbours, are decoded.
"""

import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

# Full-width and half-width forms -> the usual ones.
_WIDTH = {code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFF01, 0xFFEF)}
# Combining marks and joiners, which act on what stands before them; so do Korean letters, and half-width voice marks.
_ACTS = ("Mn", "Mc", "Me", "Cf", "Lm")
BETWEEN = "\n"
"""Stands between texts in one string; a line end comes back as it was."""
_KOREAN_LETTERS = range(0x1100, 0x1200)


def text_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts without special tokens: `tokenizer.encode(text, add_special_tokens=False)` of each, but faster where
    it is ChatGLM's own tokenizer, which takes many texts in one call.
    """
    if hasattr(tokenizer, "text_ids"):
        return tokenizer.text_ids(texts)
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


class RoundTrip:
    """Finds the texts that a tokenizer does not give back as they were; keeps what it learns of characters."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # By code point: 0 not tried yet, 1 changed or acting on its neighbours, 2 safe.
        self.known = np.zeros(sys.maxunicode + 1, np.uint8)
        self.known[ord(BETWEEN)] = 2

    def changed(self, texts: Sequence[str], ids: Sequence[list[int]]) -> list[tuple[str, str]]:
        """(text, what comes back) of those that change, beyond width and blanks.

        Args:
            texts: any.
            ids: of each text, from `text_ids`.

        A tokenizer without a way back is not asked.
        """
        if not hasattr(self.tokenizer, "decode"):
            return []
        # All texts as one row of code points: to ask each character in a loop takes longer than to encode it.
        points = np.frombuffer(BETWEEN.join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
        known = self.known[points]
        if not known.all():
            self._try(np.unique(points[known == 0]))
            known = self.known[points]
        ends = np.cumsum([len(text) + 1 for text in texts])
        marked = {int(place) for place in np.searchsorted(ends, np.flatnonzero(known == 1), "right")}
        doubtful = [
            (text, own)
            for place, (text, own) in enumerate(zip(texts, ids, strict=True))
            if place in marked or ("<" in text and ">" in text)
        ]
        back = self._texts([own for _, own in doubtful])
        return [(text, other) for (text, _), other in zip(doubtful, back, strict=True) if _same(text) != _same(other)]

    def _try(self, points: np.ndarray) -> None:
        between = [f"x{chr(point)}x" for point in points]
        back = self._texts(text_ids(self.tokenizer, between))
        for point, text, other in zip(points, between, back, strict=True):
            alone = unicodedata.category(chr(point)) not in _ACTS and point not in _KOREAN_LETTERS
            self.known[point] = 2 if alone and _same(text) == _same(other) else 1

    def _texts(self, ids: Sequence[list[int]]) -> list[str]:
        model = getattr(self.tokenizer, "sp_model", None)
        if model is None or any(max(own, default=0) >= model.get_piece_size() for own in ids):
            return [self.tokenizer.decode(own) for own in ids]
        back = model.decode(list(ids)) if ids else []
        return [self.tokenizer.decode_whitespace(text) if "<" in text else text for text in back]


def _same(text: str) -> str:
    """The text without what does not count: width and blanks."""
    return "".join(text.translate(_WIDTH).split())


def around_difference(before: str, after: str, most: int = 40) -> tuple[str, str]:
    """Two texts from a little before the place where they differ in more than width and blanks; `most` characters."""
    (own, places), (other, others) = _counting(before), _counting(after)
    same = next((at for at, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(len(own), len(other)))
    starts = [max(0, (at[same] if same < len(at) else len(at)) - most // 4) for at in (places, others)]
    return before[starts[0] :][:most], after[starts[1] :][:most]


def _counting(text: str) -> tuple[list[str], list[int]]:
    """The characters that count, and their places."""
    kept = [(_same(character), place) for place, character in enumerate(text) if _same(character)]
    return [character for character, _ in kept], [place for _, place in kept]
