"""Texts to ids and back, many in one call; and which texts come back as others.

    "x³ and a<n>b"  ──► ids ──►  "x3 and a\\nb"        the tokenizer reads ³ as 3, and <n> as a line end
                    learnt as       written by the model

The model can only learn the text on the right. Width (，and ,) and blanks are passed over here: answers get them back,
or nobody sees them. Decoding every text would take longer than encoding it: so each character is tried once, alone,
and only texts with one that is changed, or that acts on its neighbours, are decoded.
"""

import unicodedata
from collections.abc import Sequence
from typing import Any

# Full-width and half-width forms -> the usual ones.
_WIDTH = {code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFF01, 0xFFEF)}
# Combining marks and joiners, which act on what stands before them; so do Korean letters, and half-width voice marks.
_ACTS = ("Mn", "Mc", "Me", "Cf", "Lm")
_KOREAN_LETTERS = range(0x1100, 0x1200)


def text_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts without special tokens: `tokenizer.encode(text, add_special_tokens=False)` of each, but faster.

    ChatGLM's tokenizer hands a text to SentencePiece as a whole if no special token is written in it, and most of its
    time goes into preparing the call. So such texts go to SentencePiece directly, many in one call.
    """
    if not hasattr(tokenizer, "sp_model"):
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    special = {*tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder}
    starts = {token[0] for token in special}
    plain = [not (any(x in text for x in starts) and any(token in text for token in special)) for text in texts]
    spaced = [
        # Most texts have no run of spaces, and looking for 79 kinds of them takes longer than the encoding.
        tokenizer.encode_whitespace(text) if "  " in text else text.replace("\n", "<n>").replace("\t", "<|tab|>")
        for text, is_plain in zip(texts, plain, strict=True)
        if is_plain
    ]
    fast = iter(tokenizer.sp_model.encode(spaced) if spaced else [])
    return [
        next(fast) if is_plain else tokenizer.encode(text, add_special_tokens=False)
        for text, is_plain in zip(texts, plain, strict=True)
    ]


class RoundTrip:
    """Finds the texts that a tokenizer does not give back as they were; keeps what it learns of characters."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tried: set[str] = set()
        self.safe: set[str] = set()

    def changed(self, texts: Sequence[str], ids: Sequence[list[int]]) -> list[tuple[str, str]]:
        """(text, what comes back) of those that change, beyond width and blanks.

        Args:
            texts: any.
            ids: of each text, from `text_ids`.

        A tokenizer without a way back is not asked.
        """
        if not hasattr(self.tokenizer, "decode"):
            return []
        self._try({character for text in texts if not self.tried.issuperset(text) for character in text} - self.tried)
        doubtful = [
            (text, own)
            for text, own in zip(texts, ids, strict=True)
            if ("<" in text and ">" in text) or not self.safe.issuperset(text)
        ]
        back = self._texts([own for _, own in doubtful])
        return [(text, other) for (text, _), other in zip(doubtful, back, strict=True) if _same(text) != _same(other)]

    def _try(self, characters: set[str]) -> None:
        new = sorted(characters)
        self.tried |= characters
        between = [f"x{character}x" for character in new]
        back = self._texts(text_ids(self.tokenizer, between))
        for character, text, other in zip(new, between, back, strict=True):
            alone = unicodedata.category(character) not in _ACTS and ord(character) not in _KOREAN_LETTERS
            if alone and _same(text) == _same(other):
                self.safe.add(character)

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
