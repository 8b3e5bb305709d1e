"""What row servers and their clients say to each other, after a hello in JSON (`transport.handshake`'s messages).

    client -> server  request head, counts uint32 [L], rows int64 [sum of counts], ascending within a layer
    server -> client  answer head; for each layer the rows' values, then their scales; crc32 of that (uint32)
                      or: answer head of kind REFUSED, text in UTF-8, crc32 of it

All numbers are little-endian. A request's checksum covers its counts and rows: a bit that flips on the way must not
bring other rows. Both ends know the answer's length from the request, so a head that says another one ends the link.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moeray.engram.rows import IntArray
from moeray.engram.tables import TableSet

PROTOCOL = 1
MAGIC = b"MROW"
REQUEST_HEAD = struct.Struct("<4sHHQII")
"""Magic, protocol, number of layers, request number, rows in all, crc32."""
ANSWER_HEAD = struct.Struct("<4sHHQQ")
"""Magic, protocol, kind, request number, bytes that follow before the checksum."""
CHECKSUM = struct.Struct("<I")
ROWS, REFUSED = 0, 1
MAX_ROWS = 1 << 22
"""Of one request: a chunk of 40,000 tokens with 48 distinct rows each."""
MAX_REFUSAL_BYTES = 1000
MAX_LAYERS = 1024


class WireError(ValueError):
    """What came is not this protocol, or not what was sent."""


@dataclass(frozen=True, slots=True)
class RowHello:
    """What both ends must agree on, and who speaks.

    Attributes:
        content: see `TableSet`.
        server: number of the server that speaks or is spoken to.
    """

    sender: str
    content: str
    server: int
    num_servers: int
    copies: int
    num_columns: int
    row_bytes: tuple[tuple[int, int], ...]
    protocol: int = PROTOCOL

    @classmethod
    def of(cls, sender: str, tables: TableSet, server: int, num_servers: int, copies: int) -> RowHello:
        row_bytes = tuple((table.values.row_bytes, table.scale_bytes) for table in tables.tables)
        return cls(sender, tables.content, server, num_servers, copies, tables.num_columns, row_bytes)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def disagreement(self, theirs: dict[str, Any]) -> str | None:
        """The first field of the other end's hello that is not as here, with both values."""
        names = {"content": "checkpoint"}
        ours = self.to_json()
        ours["row_bytes"] = [list(each) for each in self.row_bytes]
        for key in ("protocol", "content", "server", "num_servers", "copies", "num_columns", "row_bytes"):
            if theirs.get(key) != ours[key]:
                return f"{names.get(key, key)} is {str(theirs.get(key))[:100]} there and {ours[key]} here"
        return None


def request(number: int, rows_by_layer: Sequence[IntArray]) -> bytes:
    """One request, ready to be sent.

    Args:
        rows_by_layer: [L] of int64 [N], ascending, each row once.
    """
    counts = np.array([len(rows) for rows in rows_by_layer], dtype="<u4")
    body = counts.tobytes() + np.concatenate(rows_by_layer).astype("<i8", copy=False).tobytes()
    head = REQUEST_HEAD.pack(MAGIC, PROTOCOL, len(counts), number, int(counts.sum()), zlib.crc32(body))
    return head + body


def body_bytes(head: bytes | bytearray, num_layers: int) -> int:
    """Length of a request's counts and rows.

    Raises:
        WireError: not a request for so many layers, or longer than may be.
    """
    magic, protocol, layers, _, num_rows, _ = REQUEST_HEAD.unpack(head)
    if magic != MAGIC or protocol != PROTOCOL:
        raise WireError(f"not a request of protocol {PROTOCOL}")
    if layers != num_layers or num_rows > MAX_ROWS:
        raise WireError(f"a request for {num_rows} rows of {layers} layers; {MAX_ROWS} of {num_layers} are legal")
    return 4 * int(layers) + 8 * int(num_rows)


def requested(head: bytes | bytearray, body: bytes | bytearray) -> tuple[int, list[IntArray]]:
    """Request number, and the rows of each layer.

    Raises:
        WireError: not as it was sent.
    """
    _, _, layers, number, num_rows, checksum = REQUEST_HEAD.unpack(head)
    counts = np.frombuffer(body, dtype="<u4", count=layers)
    if zlib.crc32(body) != checksum or int(counts.sum(dtype=np.int64)) != num_rows:
        raise WireError("a request that is damaged")
    rows = np.frombuffer(body, dtype="<i8", offset=4 * layers).astype(np.int64, copy=False)
    return int(number), np.split(rows, np.cumsum(counts[:-1], dtype=np.int64))


def refusal(number: int, reason: str) -> bytes:
    """The answer to a request that cannot be served."""
    text = reason.encode()[:MAX_REFUSAL_BYTES]
    return ANSWER_HEAD.pack(MAGIC, PROTOCOL, REFUSED, number, len(text)) + text + CHECKSUM.pack(zlib.crc32(text))


def answer_head(number: int, num_bytes: int) -> bytes:
    """What stands before the rows."""
    return ANSWER_HEAD.pack(MAGIC, PROTOCOL, ROWS, number, num_bytes)


def refused_bytes(head: bytes | bytearray, number: int, num_bytes: int) -> int:
    """0 if rows follow; else the length of the reason why not.

    Raises:
        WireError: not the answer to this request.
    """
    magic, protocol, kind, theirs, length = ANSWER_HEAD.unpack(head)
    if magic != MAGIC or protocol != PROTOCOL:
        raise WireError(f"it does not speak protocol {PROTOCOL}")
    if theirs != number or kind not in (ROWS, REFUSED):
        raise WireError(f"answer {theirs} of kind {kind} to request {number}")
    if kind == ROWS and length == num_bytes:
        return 0
    if kind == REFUSED and 0 < length <= MAX_REFUSAL_BYTES:
        return int(length)
    raise WireError(f"an answer of {length} bytes where {num_bytes} were expected")
