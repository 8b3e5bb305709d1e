"""What is not exactly what was sent is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeray.engram import row_wire
from moeray.engram.row_wire import ANSWER_HEAD, REQUEST_HEAD, WireError

ROWS = st.lists(st.lists(st.integers(0, 2**62), max_size=20), min_size=1, max_size=4)


def split(sent: bytes, num_layers: int) -> tuple[bytes, bytes]:
    head, body = sent[: REQUEST_HEAD.size], sent[REQUEST_HEAD.size :]
    assert row_wire.body_bytes(head, num_layers) == len(body)
    return head, body


@given(ROWS, st.integers(0, 2**63))
def test_a_request_arrives_as_it_was_sent(layers: list[list[int]], number: int) -> None:
    sent = row_wire.request(number, [np.array(rows, dtype=np.int64) for rows in layers])
    arrived, rows_by_layer = row_wire.requested(*split(sent, len(layers)))
    assert arrived == number
    assert [rows.tolist() for rows in rows_by_layer] == layers


@given(ROWS, st.data())
@settings(max_examples=200)
def test_no_flipped_bit_of_a_request_brings_other_rows(layers: list[list[int]], data: st.DataObject) -> None:
    sent = bytearray(row_wire.request(7, [np.array(rows, dtype=np.int64) for rows in layers]))
    sent[data.draw(st.integers(0, len(sent) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        length = row_wire.body_bytes(sent[: REQUEST_HEAD.size], len(layers))
        body = sent[REQUEST_HEAD.size :]
        if length != len(body):
            return  # the server waits for bytes that do not come, or takes them for the next head
        number, rows_by_layer = row_wire.requested(sent[: REQUEST_HEAD.size], body)
    except WireError:
        return
    assert number != 7  # which the client will not take for its answer
    assert [rows.tolist() for rows in rows_by_layer] == layers


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (REQUEST_HEAD.pack(b"HTTP", 1, 2, 1, 0, 0), "not a request of protocol"),
        (REQUEST_HEAD.pack(row_wire.MAGIC, 2, 2, 1, 0, 0), "not a request of protocol"),
        (REQUEST_HEAD.pack(row_wire.MAGIC, 1, 3, 1, 0, 0), "of 3 layers"),
        (REQUEST_HEAD.pack(row_wire.MAGIC, 1, 2, 1, row_wire.MAX_ROWS + 1, 0), "rows of 2 layers"),
    ],
)
def test_a_head_that_promises_the_impossible_is_refused_before_memory_is_taken(head: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        row_wire.body_bytes(head, 2)


def test_counts_that_are_not_the_heads_are_refused() -> None:
    import zlib

    body = np.array([3, 0], dtype="<u4").tobytes() + np.arange(2, dtype="<i8").tobytes()
    with pytest.raises(WireError, match="damaged"):
        row_wire.requested(REQUEST_HEAD.pack(row_wire.MAGIC, 1, 2, 1, 2, zlib.crc32(body)), body)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ((b"HTTP", 1, row_wire.ROWS, 5, 10), "does not speak"),
        ((row_wire.MAGIC, 1, row_wire.ROWS, 4, 10), "answer 4 of kind 0 to request 5"),
        ((row_wire.MAGIC, 1, 2, 5, 10), "of kind 2"),
        ((row_wire.MAGIC, 1, row_wire.ROWS, 5, 11), "11 bytes where 10 were expected"),
        ((row_wire.MAGIC, 1, row_wire.REFUSED, 5, 1 << 40), "were expected"),
    ],
)
def test_an_answer_to_something_else_is_refused(fields: tuple[bytes, int, int, int, int], reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        row_wire.refused_bytes(ANSWER_HEAD.pack(*fields), 5, 10)


def test_a_refusal_says_how_long_it_is() -> None:
    sent = row_wire.refusal(5, "x" * 5000)
    length = row_wire.refused_bytes(sent[: ANSWER_HEAD.size], 5, 10)
    assert length == row_wire.MAX_REFUSAL_BYTES == len(sent) - ANSWER_HEAD.size - row_wire.CHECKSUM.size
