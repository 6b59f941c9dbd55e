"""Which file holds the rows of smaller ones: at the edges of what counts as a part and as a whole, and by brute force."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from glmhelpers.data.dedupe import rows_in_parts


def left_out(*files: list[int], out: dict[int, set[int]] | None = None) -> list[set[int]]:
    """For each file, the numbers that are left out of it; `out`: file -> places that are out already."""
    hashes = [np.array(file, dtype=np.uint64) for file in files]
    gone = [np.isin(np.arange(len(file)), list((out or {}).get(i, ()))) for i, file in enumerate(files)]
    masks = rows_in_parts(hashes, gone)
    return [set(own[mask].tolist()) for own, mask in zip(hashes, masks, strict=True)]


TWENTY = list(range(20))


def test_a_whole_gives_way_to_its_parts_in_any_order():
    first, second = TWENTY[:9], TWENTY[9:18]
    assert left_out(TWENTY, first, second) == [set(TWENTY[:18]), set(), set()]
    assert left_out(second, first, TWENTY) == [set(), set(), set(TWENTY[:18])]


def test_one_part_is_not_enough():
    assert left_out(TWENTY, TWENTY[:19]) == [set(), set()]


def test_equal_files_are_no_parts_of_each_other():
    assert left_out(TWENTY, TWENTY, TWENTY) == [set(), set(), set()]


def test_nine_tenths_of_a_part_are_in_the_whole():
    first, nearly, half = TWENTY[:10], [*TWENTY[10:19], 99], [*TWENTY[10:18], 98, 99]
    assert left_out(TWENTY, first, nearly)[0] == set(TWENTY[:19])
    assert left_out(TWENTY, first, half)[0] == set()


def test_the_parts_hold_half_of_the_whole():
    assert left_out(TWENTY, TWENTY[:5], TWENTY[5:10])[0] == set(TWENTY[:10])
    assert left_out(TWENTY, TWENTY[:5], TWENTY[5:9])[0] == set()


def test_a_row_that_is_out_of_a_part_stays_in_the_whole():
    # Row 3 of the first part was refused for another reason after it had been read.
    assert left_out(TWENTY, TWENTY[:10], TWENTY[10:], out={1: {3}})[0] == set(TWENTY) - {3}


few = st.lists(st.integers(0, 11), max_size=12)


@given(st.lists(few, min_size=1, max_size=6))
def test_every_row_stays_somewhere(files):
    masks = left_out(*files)
    kept = [set(file) - mask for file, mask in zip(files, masks, strict=True)]
    assert set().union(*kept) == set().union(*map(set, files))
    for file, mask in zip(files, masks, strict=True):
        smaller = [set(other) for other in files if 0 < len(other) < len(file)]
        assert not mask or len(smaller) >= 2
        assert mask <= set().union(*smaller)
