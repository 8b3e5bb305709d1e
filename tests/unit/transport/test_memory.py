"""Memory for messages: zeroed, aligned, and taken from what was set aside as long as that lasts."""

from __future__ import annotations

import torch

from moeray.transport.memory import ALIGNMENT, PrivateMemory, ReservedMemory


def test_room_is_zeroed_and_apart_from_other_room() -> None:
    for memory in (PrivateMemory(torch.device("cpu")), ReservedMemory(torch.full((1000,), 9, dtype=torch.uint8))):
        first, second = memory.take(100), memory.take(50)
        assert not first.any() and not second.any()
        first.fill_(1)
        assert not second.any()


def test_reserved_room_is_used_from_its_beginning_and_by_every_new_transport_again() -> None:
    reserved = torch.zeros(4 * ALIGNMENT, dtype=torch.uint8)
    for _ in range(2):
        memory = ReservedMemory(reserved)
        assert memory.take(ALIGNMENT + 1).data_ptr() == reserved.data_ptr()
        assert memory.take(ALIGNMENT).data_ptr() == reserved.data_ptr() + 2 * ALIGNMENT


def test_what_does_not_fit_is_allocated() -> None:
    reserved = torch.zeros(100, dtype=torch.uint8)
    room = ReservedMemory(reserved).take(101)
    assert len(room) == 101
    assert not reserved.data_ptr() <= room.data_ptr() < reserved.data_ptr() + 100
