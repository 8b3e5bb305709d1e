"""Layout of the bytes on the hop. Both ends compute it from the same few numbers; nothing is negotiated per call.

A dispatch to one group is one message: header, then the rows of x and of ids that the group gets.

    header (8 x int64) | x: rows x B | pad to 64 | ids: rows x K x int32 | pad to 64

Between CPUs it is exactly as long as that (`EXACT`). Where the host must not know how many rows there are (a device),
it is a block of fixed size with room for `inline_rows`; if more rows may have to go, the header says `LARGE`, the room
stays empty and the rows come in a second message of exactly known size (same layout, without header).

The reply is `status_rows + reply_pairs` rows of D: the status lies in the first rows, so that the rows of all groups
form one matrix that a single gather can read.

    status (5 x int64, then UTF-8 text), STATUS_BYTES rounded up to whole rows | rows_PD

Suffixes: D hidden, K experts per token, P (token, k) pairs, B bytes of one dispatched row (see rows.py).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeray.config import RowFormatName
from moeray.transport.memory import aligned
from moeray.transport.rows import RowFormat, row_format

MAGIC = 0x6D6F65726179  # "moeray"
HEADER_WORDS = 8
HEADER = struct.Struct(f"={HEADER_WORDS}q")
HEADER_BYTES = HEADER.size
MAX_INLINE_ROWS = 64
STATUS = struct.Struct("=5q")
STATUS_BYTES = 256
MAX_STATUS_TEXT = STATUS_BYTES - STATUS.size


class Flags(IntFlag):
    """What a dispatch's header can say beside its numbers."""

    NONE = 0
    LARGE = 1  # no inline rows: an exact second message follows
    PROBE = 2  # no rows at all: prove the path, compute nothing
    EXACT = 4  # the rows follow the header at once, as many as there are


LEGAL_FLAGS = frozenset(map(int, Flags)) | {0}
ROWS_WORD, PAIRS_WORD = 4, 5
"""Positions of the header's words that a device fills in by itself."""


class Status(IntEnum):
    """How a group's reply begins."""

    OK = 0
    FAILED = 1
    STALE = 2


class Header(NamedTuple):
    """One dispatch to one group.

    Attributes:
        num_pairs: (token, expert) pairs of this group: rows of its answer.
        reply_pairs: rows that the reply has room for; above num_pairs where sizes are bucketed.
    """

    generation: int
    sequence: int
    layer: int
    num_rows: int
    num_pairs: int
    reply_pairs: int
    flags: int  # of `Flags`

    def words(self) -> tuple[int, ...]:
        return (MAGIC, *self)

    @classmethod
    def from_words(cls, words: Sequence[int]) -> Header:
        """Read the words of a received header.

        Raises:
            ValueError: not a header of ours, or impossible numbers.
        """
        magic, *rest = words
        header = cls(*rest)
        is_possible = header.num_rows >= 0 and 0 <= header.num_pairs <= header.reply_pairs
        if magic != MAGIC or not is_possible or header.flags not in LEGAL_FLAGS:
            raise ValueError(f"not a dispatch header: {list(words)}")
        return header


@dataclass(frozen=True)
class Geometry:
    """Sizes in bytes that follow from the model, the inline capacity and the format of dispatched rows.

    Attributes:
        row_bytes: of one answered row.
        dispatched: the format of dispatched rows.
    """

    hidden_size: int
    top_k: int
    dtype: torch.dtype
    inline_rows: int
    dispatch_format: RowFormatName = "plain"

    @cached_property
    def row_bytes(self) -> int:
        return self.hidden_size * self.dtype.itemsize

    @cached_property
    def dispatched(self) -> RowFormat:
        return row_format(self.dispatch_format, self.hidden_size, self.dtype)

    @cached_property
    def status_rows(self) -> int:
        """Rows of D that the status takes, at least one."""
        return -(-STATUS_BYTES // self.row_bytes)

    @cached_property
    def block_bytes(self) -> int:
        return HEADER_BYTES + self.payload_bytes(self.inline_rows)

    def ids_offset(self, num_rows: int) -> int:
        """Where the ids begin in a payload of `num_rows` rows."""
        return aligned(num_rows * self.dispatched.row_bytes)

    def payload_bytes(self, num_rows: int) -> int:
        return self.ids_offset(num_rows) + aligned(num_rows * self.top_k * 4)

    def message_bytes(self, num_rows: int) -> int:
        """Of an exact message."""
        return HEADER_BYTES + self.payload_bytes(num_rows)

    def payload_views(self, payload: Tensor, capacity: int, num_rows: int) -> tuple[Tensor, Tensor]:
        """The first `num_rows` rows (x_TB uint8, ids_TK) of a uint8 payload laid out for `capacity` rows; no copy."""
        row_bytes, ids_begin = self.dispatched.row_bytes, self.ids_offset(capacity)
        ids_bytes = payload[ids_begin : ids_begin + num_rows * self.top_k * 4]
        return (
            payload[: num_rows * row_bytes].view(num_rows, row_bytes),
            ids_bytes.view(torch.int32).view(num_rows, self.top_k),
        )

    def message_room(self, max_tokens: int, num_groups: int) -> int:
        """Bytes that the exact messages of one dispatch take at most."""
        return num_groups * HEADER_BYTES + self.payload_room(max_tokens, num_groups)

    def payload_room(self, max_tokens: int, num_groups: int) -> int:
        """Bytes that the payloads of one dispatch take at most: every token goes to as many groups as it can."""
        num_rows = max_tokens * min(num_groups, self.top_k)
        return aligned(num_rows * (self.dispatched.row_bytes + 4 * self.top_k)) + 2 * num_groups * aligned(1)

    def reply_room(self, max_tokens: int, num_groups: int) -> int:
        """Rows that the replies to one dispatch take at most, buckets included: see `bucket_pairs`."""
        bucketed = num_groups * self.bucket_pairs(min(max_tokens, self.inline_rows))
        return num_groups * self.status_rows + max(max_tokens * self.top_k, bucketed)

    def bucket_pairs(self, num_tokens: int) -> int:
        """Pairs that every group's reply has room for where sizes must not follow the routing: a power of two of T."""
        return self.top_k << max(0, num_tokens - 1).bit_length()


def inline_rows_for(row_bytes: int, inline_bytes: int) -> int:
    """Rows that fit into about `inline_bytes`, between 1 and MAX_INLINE_ROWS."""
    return max(1, min(MAX_INLINE_ROWS, inline_bytes // row_bytes))


def read_header(block: Tensor) -> Header:
    """The header of a received block (uint8, any device).

    Raises:
        ValueError: see `Header.from_words`.
    """
    head = block if block.is_cpu else block[:HEADER_BYTES].cpu()
    return Header.from_words(HEADER.unpack_from(head.numpy().data))


def write_status(reply: Tensor, status: Status, sequence: int, generation: int, text: str = "") -> None:
    """Write a reply's status into its first bytes (uint8, any device)."""
    encoded = text.encode()[:MAX_STATUS_TEXT]
    head = STATUS.pack(MAGIC, sequence, generation, status, len(encoded)) + encoded
    if reply.is_cpu:
        reply.numpy().data[: len(head)] = head
    else:
        reply[: len(head)].copy_(torch.frombuffer(bytearray(head), dtype=torch.uint8))


@dataclass(frozen=True, slots=True)
class ReplyStatus:
    """What a reply begins with."""

    status: Status
    sequence: int
    generation: int
    text: str


def read_status(replies: Any, begin: int = 0) -> ReplyStatus:
    """Read the beginning of a reply.

    Args:
        replies: buffer of bytes.
        begin: where the reply begins; STATUS_BYTES of it are there.
    Raises:
        ValueError: not a status of ours.
    """
    magic, sequence, generation, status, length = STATUS.unpack_from(replies, begin)
    if magic != MAGIC or not 0 <= length <= MAX_STATUS_TEXT:
        raise ValueError("the reply does not begin with a status")
    begin += STATUS.size
    text = bytes(replies[begin : begin + length]).decode(errors="replace") if length else ""
    return ReplyStatus(Status(status), sequence, generation, text)
