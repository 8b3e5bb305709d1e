"""Memory that one attention shard shares with the expert groups of its node.

It is an anonymous file (memfd): no name, no entry under /dev/shm, no share of that mount's limit, and gone with the
last process that maps it, however that process ends. It is sealed against resizing, so that no peer can make an access
fault; pages are committed when they are first written. Blocks, payloads and replies of all groups lie in one arena:
the shard's gather reads the rows where a group wrote them.

Only groups of the same cluster get the descriptor. They are trusted not to write elsewhere in it: rows that are wrong
are as wrong as rows that a group computed wrongly.
"""

from __future__ import annotations

import fcntl
import mmap
import os

import torch
from torch import Tensor

from moeray.transport.memory import aligned

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
PAGE = mmap.PAGESIZE
MAX_VIEWS = 256


class Arena:
    """One mapped region; a `MessageMemory`."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        """Map an open memfd and take the descriptor over."""
        self._descriptor = descriptor
        self._bytes = torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)
        self._begin = self._bytes.data_ptr()
        self._taken = 0
        self._num_bytes = num_bytes
        self._views: dict[tuple[int, int], Tensor] = {}

    @classmethod
    def create(cls, num_bytes: int) -> Arena:
        """Raises OSError: no memfd on this system, or no descriptor left."""
        num_bytes = max(PAGE, num_bytes)
        descriptor = os.memfd_create("moeray-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, num_bytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
            return cls(descriptor, num_bytes)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def join(cls, descriptor: int) -> Arena:
        """Map an arena that another process created.

        Raises:
            ValueError: its creator could still resize it under us.
            OSError: not a memfd, or it cannot be mapped.
        """
        try:
            if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS != SEALS:
                raise ValueError("the shared memory is not sealed")
            return cls(descriptor, os.fstat(descriptor).st_size)
        except BaseException:
            os.close(descriptor)
            raise

    @property
    def descriptor(self) -> int:
        """To be sent to a group."""
        return self._descriptor

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def take(self, num_bytes: int) -> Tensor:
        begin, end = self._taken, self._taken + num_bytes
        if end > self.num_bytes:
            raise MemoryError(f"{begin} + {num_bytes} = {end} bytes of an arena of {self.num_bytes}")
        self._taken = aligned(end)
        return self._bytes[begin:end]

    def offset_of(self, message: Tensor) -> int:
        """Where a message that was cut out of `take` begins."""
        return message.data_ptr() - self._begin

    def view(self, offset: int, num_bytes: int) -> Tensor:
        """The other end's message. Decoding asks for the same few again and again, so they are kept.

        Raises:
            ValueError: not inside the arena.
        """
        kept = self._views.get((offset, num_bytes))
        if kept is not None:
            return kept
        if min(offset, num_bytes) < 0 or offset + num_bytes > self.num_bytes:
            raise ValueError(f"a message at {offset} + {num_bytes} in an arena of {self.num_bytes} bytes")
        if len(self._views) >= MAX_VIEWS:
            self._views.clear()
        view = self._views[offset, num_bytes] = self._bytes[offset : offset + num_bytes]
        return view

    def close(self) -> None:
        """Let go of the descriptor; the memory itself goes with the last tensor that lies in it. Idempotent."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
