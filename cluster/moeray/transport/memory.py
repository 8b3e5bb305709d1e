"""Memory that messages lie in: allocated once per transport, never per call.

Where the two ends share memory, a message that lies in it is not copied at all: see `arena.py`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

ALIGNMENT = 64


class MessageMemory(Protocol):
    """Hands out room while a transport is built."""

    def take(self, num_bytes: int) -> Tensor:
        """`num_bytes` of zeroed uint8, 64-byte aligned; lives as long as a reference to it does.

        Raises:
            MemoryError: less is left, with the arithmetic.
        """
        ...


class PrivateMemory:
    """Of this process, on any device. On a CPU the system commits pages only when they are written."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def take(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)


class ReservedMemory:
    """Memory that was set aside before it was known how much is needed; what does not fit is allocated."""

    def __init__(self, reserved: Tensor) -> None:
        """Args: reserved: uint8; used from its beginning by every new `ReservedMemory`."""
        self._reserved = reserved
        self._taken = 0

    def take(self, num_bytes: int) -> Tensor:
        begin, end = self._taken, self._taken + num_bytes
        if end > len(self._reserved):
            return torch.zeros(num_bytes, dtype=torch.uint8, device=self._reserved.device)
        self._taken = aligned(end)
        return self._reserved[begin:end].zero_()


def aligned(num_bytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
