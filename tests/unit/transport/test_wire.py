"""The bytes on the hop: both ends read what the other wrote."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeray.transport.wire import (
    HEADER,
    HEADER_BYTES,
    MAGIC,
    MAX_STATUS_TEXT,
    STATUS_BYTES,
    Flags,
    Geometry,
    Header,
    Status,
    inline_rows_for,
    read_header,
    read_status,
    write_status,
)

DTYPES = st.sampled_from([torch.bfloat16, torch.float32])
GEOMETRIES = st.builds(Geometry, st.integers(1, 300), st.integers(1, 9), DTYPES, st.integers(1, 12))


@given(
    st.builds(
        Header,
        st.integers(0, 2**40),
        st.integers(0, 2**60),
        st.integers(-1, 200),
        st.integers(0, 999),
        st.just(7),
        st.integers(7, 99),
        st.sampled_from(list(Flags)),
    )
)
def test_a_header_survives_its_words(header: Header) -> None:
    assert Header.from_words(list(header.words())) == header
    block = torch.zeros(HEADER_BYTES + 9, dtype=torch.uint8)
    HEADER.pack_into(memoryview(block.numpy()), 0, *header.words())
    assert read_header(block) == header


@pytest.mark.parametrize(
    "words",
    [
        [0] * 8,
        [MAGIC, 1, 1, 0, -1, 0, 0, 0],
        [MAGIC, 1, 1, 0, 1, -2, 0, 0],
        [MAGIC, 1, 1, 0, 1, 5, 4, 0],
        [MAGIC, 1, 1, 0, 1, 1, 1, 64],
    ],
)
def test_words_that_are_no_header_are_refused(words: list[int]) -> None:
    with pytest.raises(ValueError, match="not a dispatch header"):
        Header.from_words(words)


@given(GEOMETRIES, st.integers(0, 20))
def test_rows_and_ids_of_a_payload_do_not_overlap_and_stay_inside(geometry: Geometry, num_rows: int) -> None:
    payload = torch.zeros(geometry.payload_bytes(num_rows), dtype=torch.uint8)
    x_TB, ids_TK = geometry.payload_views(payload, num_rows, num_rows)
    x_TB.fill_(15)
    ids_TK.fill_(-1)
    assert torch.equal(x_TB, torch.full_like(x_TB, 15))
    ids_TK.fill_(7)
    x_TB.fill_(20)
    assert torch.equal(ids_TK, torch.full_like(ids_TK, 7))


@given(GEOMETRIES, st.sampled_from(list(Status)), st.integers(0, 2**50), st.integers(0, 2**40), st.text(max_size=300))
def test_a_status_survives_any_row_size_and_text(
    geometry: Geometry, status: Status, sequence: int, generation: int, text: str
) -> None:
    reply = torch.zeros(7 + geometry.status_rows * geometry.row_bytes, dtype=torch.uint8)
    write_status(reply[7:], status, sequence, generation, text)
    found = read_status(memoryview(reply.numpy()), 7)
    assert (found.status, found.sequence, found.generation) == (status, sequence, generation)
    cut = text.encode()[:MAX_STATUS_TEXT].decode(errors="replace")
    assert found.text == cut


def test_uninitialised_memory_is_not_taken_for_a_status() -> None:
    with pytest.raises(ValueError, match="status"):
        read_status(b"\0" * STATUS_BYTES)


def test_inline_capacity_is_bounded_on_both_sides() -> None:
    assert inline_rows_for(256, 1 << 16) == 64
    assert inline_rows_for(8192, 1 << 16) == 8
    assert inline_rows_for(400_000, 1 << 16) == 1
