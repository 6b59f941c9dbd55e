"""Of equal rows only the first counts, in whatever file it stands.

full.json     1 2 3 4 5 6 7 8 9
part-0.json   1 2 3 4                 all of them stand in full.json: left out
part-1.json             6 7 8 6       the same, and 6 twice
"""

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
