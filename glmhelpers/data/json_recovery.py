"""JSON values one by one out of a file of any size, with what is broken skipped and named.

       [ {"instruction": "a", ..} , {"instruction": "say "hi"", ..} , {"instruction": "b", ..} , ]
         └────── a row ────────┘    └─ cannot be parsed ...         ^                        ^
                                          look for the next place that starts as rows do ────┘  a comma too many

A file that is a little broken still holds all its other rows. Python's own parser reads one value at a time from a
window of the text; where it fails, reading goes on at the next `{"instruction":` that stands where a row can start.
Inside a valid string such a text would have backslashes before its quotes, so a whole row is never cut.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

WINDOW = 2**18
"""Characters in memory at one time, for rows of usual size."""
LONGEST_ROW = 2**24
"""Characters after which an unfinished value counts as broken."""
KEYS = ("instruction", "input", "output", "prompt", "response", "history", "system", "messages", "conversations")
"""Names with which a row can start."""

_SPACE = re.compile(r"[ \t\r\n\ufeff\x1e]*")  # the last stands before each value of a JSON text sequence
_COMMA = re.compile(_SPACE.pattern + ",")
_ANY_KEY = re.compile(r'\{\s*+"((?:[^"\\\n]|\\u[0-9a-fA-F]{4}){1,60}+)"\s*+:')


class Twice(dict):
    """An object in which a name stands more than once; as everywhere, the last one counts."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else Twice(found)


DECODER = json.JSONDecoder(object_pairs_hook=_object)
_LENIENT = json.JSONDecoder(object_pairs_hook=_object, strict=False)


@dataclass(slots=True)
class Found:
    """One row as it stands in a file, before anything is asked of it.

    Attributes:
        line: the line on which it begins, from 1 (for parquet and iterables: the number of the row).
        value: what was parsed; None if it is broken.
        broken: why it could not be parsed, "" if it could.
    """

    line: int
    value: Any
    broken: str = ""


@dataclass
class Notes:
    """What a reader saw of a file beside its rows.

    Attributes:
        repairs: what had to be overlooked to read it -> how many times.
        top_level: JSON values that stood in no array.
        not_data: why the file holds no rows at all, "" if it may.
        unit: what `Found.line` counts, "line" or "row".
        foreign: about the first object that has none of our columns.
        hint: what to do about an only object that holds rows in itself.
    """

    repairs: Counter = field(default_factory=Counter)
    top_level: int = 0
    not_data: str = ""
    unit: str = "line"
    foreign: str = ""
    hint: str = ""


class _Window:
    """A text file through a window: `text[pos:]` is what comes next."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.pos, self.ended = file, "", 0, False
        self._line, self._counted = 1, 0

    def fill(self, ahead: int = WINDOW) -> None:
        """Read on if less than half of `ahead` characters are left."""
        if self.ended or len(self.text) - self.pos >= ahead // 2:
            return
        self.line()
        more = self.file.read(ahead)
        self.ended = not more
        self.text, self.pos, self._counted = self.text[self.pos :] + more, 0, 0

    def line(self) -> int:
        """Line number of `pos`."""
        self._line += self.text.count("\n", self._counted, self.pos)
        self._counted = self.pos
        return self._line


def read_json(file: TextIO, notes: Notes) -> Iterator[Found]:
    """Rows of a JSON array, or JSON values that follow each other; repairs are counted in `notes`.

    Yields:
        Each element of the array and each value outside of one; a region that cannot be parsed as one broken row.
    """
    window, in_array, before = _Window(file), False, "start"
    starts = set(KEYS)
    while True:
        window.fill()
        blanks = _SPACE.match(window.text, window.pos)
        window.pos = blanks.end() if blanks else window.pos
        if window.pos == len(window.text):
            if window.ended:
                break
            continue
        sign = window.text[window.pos]
        if sign in ",]}" or (sign == "[" and not in_array):
            window.pos += 1
            _note_sign(sign, before, in_array, notes)
            in_array = sign == "[" or (in_array and sign != "]")
            before = {"[": "start", ",": "comma"}.get(sign, "value")
            continue
        if before == "value" and in_array:
            notes.repairs["comma missing between rows"] += 1
        line = window.line()
        notes.top_level += not in_array
        value, broken = _parse(window, starts, notes)
        # Behind a broken row, the comma was skipped with it.
        before = "start" if broken else "value"
        if isinstance(value, dict) and value:
            name = next(iter(value))
            if name not in starts:
                # As it stands in the file: with its characters, or with escapes for them.
                starts |= {name, json.dumps(name)[1:-1]}
        # What mostly follows needs no look of its own.
        if in_array and not broken and (comma := _COMMA.match(window.text, window.pos)):
            window.pos, before = comma.end(), "comma"
        yield Found(line, value, broken)
    if in_array:
        notes.repairs["no ] at the end"] += 1


def _note_sign(sign: str, before: str, in_array: bool, notes: Notes) -> None:
    if sign == "]" and before == "comma":
        notes.repairs["comma before ]"] += 1
    elif sign == "}" or (sign == "]" and not in_array):
        notes.repairs[f"{sign} that closes nothing"] += 1
    elif sign == "," and (before != "value" or not in_array):
        notes.repairs["comma too many"] += 1


def _parse(window: _Window, starts: set[str], notes: Notes) -> tuple[Any, str]:
    """(value, "") and the window moved behind it; or (None, reason) and the window moved to the next row."""
    ahead = WINDOW
    failure: ValueError | RecursionError | None
    while True:
        try:
            value, end = _decode(window, notes)
        except (ValueError, RecursionError) as error:
            failure = error
        else:
            if end < len(window.text) or window.ended:
                window.pos = end
                return value, ""
            failure = None
        if window.ended or ahead > LONGEST_ROW or (failure and not _may_be_cut(failure, window)):
            break
        if ahead > WINDOW and failure and _next_start(window, starts):
            break
        ahead *= 2
        window.fill(ahead)
    first = window.line()
    if isinstance(failure, json.JSONDecodeError):
        at = first + window.text.count("\n", window.pos, failure.pos)
        reason = failure.msg[0].lower() + failure.msg[1:] + (f" (in line {at})" if at != first else "")
    else:
        reason = "nested too deeply" if isinstance(failure, RecursionError) else str(failure or "too long")
    while not (start := _next_start(window, starts)) and not window.ended:
        window.pos = max(window.pos + 1, len(window.text) - WINDOW // 4)
        window.fill()
    window.pos = start or len(window.text)
    return None, reason


def _may_be_cut(failure: Exception, window: _Window) -> bool:
    """Whether a failure may only mean that the value goes on behind the window."""
    if isinstance(failure, json.JSONDecodeError) and not failure.msg.startswith("Unterminated"):
        return failure.pos > len(window.text) - 20
    return True


def _decode(window: _Window, notes: Notes) -> tuple[Any, int]:
    try:
        return DECODER.raw_decode(window.text, window.pos)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Invalid control character"):
            raise
    decoded = _LENIENT.raw_decode(window.text, window.pos)
    notes.repairs["control character in a string"] += 1
    return decoded


def _next_start(window: _Window, starts: set[str]) -> int | None:
    """Place of the next `{"key":` after the present one, at which a row can start."""
    own = _ANY_KEY.match(window.text, window.pos)
    # The rows of a file start alike: the name with which the broken one starts counts too.
    names = {*starts, own[1]} if own else starts
    known = "|".join(re.escape(name) for name in sorted(names))
    # Where no name is known, any name is better than giving up the rest of the file.
    return _find(window, re.compile(rf'\{{\s*+"(?:{known})"\s*+:')) or _find(window, _ANY_KEY)


def _find(window: _Window, start: re.Pattern) -> int | None:
    for match in start.finditer(window.text, window.pos + 1):
        gap = window.text[max(window.pos, match.start() - 1000) : match.start()]
        before = gap.rstrip()
        if before[-1:] in tuple(",}]") or "\n" in gap[len(before) :]:
            return match.start()
    return None
