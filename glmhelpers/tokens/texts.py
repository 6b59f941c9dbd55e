r"""One cleaning for the texts that are learnt and for those that are asked: else the model is asked what it never read.

a row's text ──► convert_alpaca ─┐                    " What is x?\r\n"               ->  "What is x?"
                                 ├──► clean_text      "\n    x = 1\r\n    y = 2 \n"   ->  "    x = 1\n    y = 2"
a question   ──► build_prompt ───┘                    " Paris. "                     ->  "Paris."
"""

import re
from collections import Counter
from collections.abc import Sequence

LINE_END, AROUND = "texts with other line ends", "texts with blanks around them"
SURROGATE, CONTROL = "lone surrogate", "control character"

# Control characters other than tab and newline, and surrogates (halves of a character).
_TROUBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_BLANK = re.compile(r"[\x0b\x0c\x1c-\x1f]")
_HALVES = re.compile(r"[\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]")
_NO_INDENT = re.compile(r"[^ \t\u3000\xa0]")


def clean_text(text: str, changes: Counter | None = None, indent: bool = False) -> str:
    """A text with "\\n" as line end and without blanks around it. Control characters and lone surrogates become U+FFFD.

    Args:
        text: any text.
        changes: counts what was changed, under the four names above; None: nobody wants to know.
        indent: for answers and inputs, which may be code: the blanks before the first line stay if they may be an
            indentation (more than one, a tab, or more lines follow).
    """
    if _TROUBLE.search(text):
        text = _without_trouble(text, Counter() if changes is None else changes)
    body = text.strip()
    if len(body) == len(text):
        return text
    before = text[: text.find(body)] if body else ""
    blanks = _NO_INDENT.split(before)[-1] if indent else ""
    cleaned = blanks + body if len(blanks) > 1 or blanks == "\t" or "\n" in body else body
    if changes is not None:
        changes[AROUND] += cleaned != text
    return cleaned


def unclean(texts: Sequence[str]) -> set[int]:
    """Places of the texts that `clean_text` may change; quicker than to ask it about each."""
    places: set[int] = set()
    if (bare := list(map(str.strip, texts))) != list(texts):
        places = {place for place, text in enumerate(bare) if len(text) != len(texts[place])}
    if _TROUBLE.search("\n".join(texts)):
        places |= {place for place, text in enumerate(texts) if _TROUBLE.search(text)}
    return places


def _without_trouble(text: str, changes: Counter) -> str:
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        changes[LINE_END] += 1
    text = _BLANK.sub(" ", text)
    if _HALVES.search(text):
        # Two halves that belong together are one character.
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        changes[SURROGATE] += whole.count("\ufffd") - text.count("\ufffd")
        text = whole
    text, count = _CONTROL.subn("\ufffd", text)
    changes[CONTROL] += count
    return text
