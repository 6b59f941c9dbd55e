"""Of equal rows only the first counts, in whatever file it stands.

full.json     1 2 3 4 5 6 7 8 9
part-0.json   1 2 3 4                 all of them stand in full.json: left out
part-1.json             6 7 8 6       the same, and 6 twice

Rows to mix into a training, so that the model keeps what it knew, are none that is taught or asked: `general_rows`.
"""

import random
from collections.abc import Mapping, Sequence

import numpy as np


def repeated(hashes: list[np.ndarray], out: list[np.ndarray]) -> list[np.ndarray]:
    """For each file, which of its rows stand earlier.

    Args:
        hashes: for each file in order, one number for each row; equal rows have equal numbers.
        out: for each file, which rows are left out already (bool): they are not looked at.

    Returns:
        For each file a bool array.
    """
    present = np.flatnonzero(~np.concatenate(out))
    again = np.zeros(sum(map(len, hashes)), bool)
    _, first = np.unique(np.concatenate(hashes)[present], return_index=True)
    again[present] = True
    again[present[first]] = False
    return np.split(again, np.cumsum([len(own) for own in hashes])[:-1])


def general_rows(
    known: Sequence[Mapping[str, str]],
    taught: Sequence[Mapping[str, str]],
    asked: Sequence[Mapping[str, str]],
    count: int,
    seed: int = 0,
) -> list[dict[str, str]]:
    """Rows of what the model knows, to be trained on beside new ones so that it is not forgotten.

    None of them asks what a taught row asks: a new name and the old one would contradict each other. And none has the
    question or the answer of a measured one, so that what is measured was kept and not taught again.

    Args:
        known: `instruction`, `input` and `output`, as in data/alpaca_tiny.json.
        taught: the new rows, in the same form.
        asked: `question`, `expect` and maybe `answer`, as in data/general.json.
        count: how many to draw, without replacement.
        seed: of the draw.

    Raises:
        ValueError: there are fewer.
    """
    new = {(row["instruction"], row.get("input", "")) for row in taught}
    questions = {row["question"] for row in asked}
    answers = {row.get("answer", row["expect"]) for row in asked}
    free = [
        dict(row)
        for row in known
        if (row["instruction"], row.get("input", "")) not in new
        and row["instruction"] not in questions
        and row["output"] not in answers
    ]
    if count > len(free):
        raise ValueError(
            f"{count} general rows are wanted, but of {len(known)} only {len(free)} are neither taught nor asked: "
            "want fewer, or bring more rows"
        )
    return random.Random(seed).sample(free, count)
