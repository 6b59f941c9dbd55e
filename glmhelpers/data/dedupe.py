"""A file that holds the rows of several smaller files must not count twice.

    full.json     1 2 3 4 5 6 7 8 9      rows 1 to 8 are in the parts: they count there
    part-0.json   1 2 3 4
    part-1.json             6 7 8        (row 5 was broken there, so it counts in full.json)

The files are recognised by what is in them, not by their names. Two equal copies are not a whole and its part: which
of them to keep is for `dedupe` to say.
"""

import numpy as np

PART = 0.9
"""A smaller file is a part if this share of its rows is in the larger one."""
COVERED = 0.5
"""A file is a whole if its parts hold this share of its rows."""


def rows_in_parts(hashes: list[np.ndarray], out: list[np.ndarray]) -> list[np.ndarray]:
    """For each file, which of its rows are in its parts.

    Args:
        hashes: for each file, one number for each row; equal rows have equal numbers.
        out: for each file, which rows are left out already (bool).

    Returns:
        For each file a bool array; all False unless the file is a whole with at least two parts.
    """
    present = [own[~gone] for own, gone in zip(hashes, out, strict=True)]
    shared = _shared(present)
    answer = []
    for place, own in enumerate(hashes):
        mask = np.zeros(len(own), bool)
        if shared[place] >= COVERED * len(present[place]) > 0:
            smaller = [other for other in present if 0 < len(other) < len(present[place])]
            parts = [other for other in smaller if np.isin(other, present[place]).mean() >= PART]
            if len(parts) >= 2:
                covered = np.isin(own, np.concatenate(parts))
                if covered.mean() >= COVERED:
                    mask = covered
        answer.append(mask)
    return answer


def _shared(files: list[np.ndarray]) -> list[int]:
    """For each file, how many of its rows are in other files too: few files need the closer look."""
    distinct = [np.unique(own) for own in files]
    numbers, counts = np.unique(np.concatenate(distinct), return_counts=True)
    return [int(np.isin(own, numbers[counts > 1]).sum()) for own in files]
