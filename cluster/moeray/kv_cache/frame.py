"""A block as it is stored: magic, length, checksum, bytes. What is not exactly that is not a block.

The checksum is of the block and its name: it finds flipped bits, cut values and blocks under another's name, not
forgeries. Who can write to the store can write what he likes.
"""

from __future__ import annotations

import struct
import zlib

MAGIC = b"MKV1"
"""Format of the frame; of what is in the block tells the namespace."""
_HEADER = struct.Struct("<4sII")
HEADER_BYTES = _HEADER.size


def header(name: bytes, block: memoryview) -> bytes:
    """What stands before the block's bytes."""
    return _HEADER.pack(MAGIC, block.nbytes, zlib.crc32(block, zlib.crc32(name)))


def unframed(stored: bytes | bytearray | memoryview, name: bytes, block_bytes: int) -> memoryview | None:
    """The block; None if this is none of this name and size, or not as it was stored."""
    if len(stored) != HEADER_BYTES + block_bytes:
        return None
    magic, length, checksum = _HEADER.unpack_from(stored)
    block = memoryview(stored)[HEADER_BYTES:]
    if magic != MAGIC or length != block_bytes or checksum != zlib.crc32(block, zlib.crc32(name)):
        return None
    return block
