"""The cache gives back what it was given, for the right row, within its bound."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moeray.engram.hot_rows import HotRows
from moeray.engram.rows import IntArray

VALUE_BYTES, SCALE_BYTES = 16, 2


def content(rows: IntArray) -> tuple[np.ndarray, np.ndarray]:
    values = np.repeat(rows.astype("<i8")[:, None], 2, axis=1).view(np.uint8)
    return values, np.stack([rows % 251, rows % 241], axis=1).astype(np.uint8)


def require_right(hot: HotRows, rows: IntArray) -> IntArray:
    """Those that are not there; the others are as they were given."""
    values = np.zeros((len(rows), VALUE_BYTES), dtype=np.uint8)
    scales = np.zeros((len(rows), SCALE_BYTES), dtype=np.uint8)
    missing = hot.bring(rows, values, scales)
    here = np.setdiff1d(np.arange(len(rows)), missing)
    assert np.array_equal(values[here], content(rows)[0][here])
    assert np.array_equal(scales[here], content(rows)[1][here])
    return missing


@given(st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=40, unique=True), max_size=30), st.integers(1, 3000))
@settings(deadline=None)
def test_a_row_that_is_found_is_as_it_was_kept(steps: list[list[int]], num_bytes: int) -> None:
    hot = HotRows(VALUE_BYTES, SCALE_BYTES, num_bytes)
    for step in steps:
        rows = np.array(sorted(step), dtype=np.int64)
        require_right(hot, rows)
        hot.keep(rows, *content(rows))
    everything = np.arange(61, dtype=np.int64)
    assert len(everything) - len(require_right(hot, everything)) <= hot.num_slots


def test_all_rows_stay_where_there_is_room_for_many_times_as_many() -> None:
    hot = HotRows(VALUE_BYTES, SCALE_BYTES, 1 << 20)
    rows = np.arange(0, 100_000, 100, dtype=np.int64)
    hot.keep(rows, *content(rows))
    assert len(require_right(hot, rows)) == 0
    assert len(hot.missing(rows + 1)) == len(rows)


def test_rows_that_are_asked_for_again_outlive_those_that_are_not() -> None:
    hot = HotRows(VALUE_BYTES, SCALE_BYTES, 1)  # one set
    favourite = np.array([1], dtype=np.int64)
    hot.keep(favourite, *content(favourite))
    for row in range(100, 200):
        assert len(require_right(hot, favourite)) == 0
        other = np.array([row], dtype=np.int64)
        hot.keep(other, *content(other))


def test_memory_is_bounded_by_what_was_asked_for() -> None:
    num_bytes = 1 << 20
    hot = HotRows(256, 8, num_bytes)
    held = (hot._values, hot._scales, hot._rows_SW, hot._used_SW, hot._hands_S)
    assert 0.9 * num_bytes < sum(each.nbytes for each in held) <= num_bytes
