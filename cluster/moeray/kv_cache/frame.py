"""A block as it is stored: magic, length, checksum, bytes. What is not exactly that is not a block.

The checksum finds flipped bits and cut values, not forgeries: who can write to the store can write what he likes.
"""

from __future__ import annotations

import struct
import zlib

MAGIC = b"MKV1"
"""Format of the frame; of what is in the block tells the namespace."""
_HEADER = struct.Struct("<4sII")
HEADER_BYTES = _HEADER.size


def header(block: memoryview) -> bytes:
    """What stands before the block's bytes."""
    return _HEADER.pack(MAGIC, block.nbytes, zlib.crc32(block))


def unframed(stored: bytes | bytearray | memoryview, block_bytes: int) -> memoryview | None:
    """The block; None if this is none of this size, or not as it was stored."""
    if len(stored) != HEADER_BYTES + block_bytes:
        return None
    magic, length, checksum = _HEADER.unpack_from(stored)
    block = memoryview(stored)[HEADER_BYTES:]
    if magic != MAGIC or length != block_bytes or checksum != zlib.crc32(block):
        return None
    return block
