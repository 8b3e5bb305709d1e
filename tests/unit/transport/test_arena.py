"""The arena: both ends see the same bytes, nobody can resize it, and messages outside it are refused."""

from __future__ import annotations

import os

import pytest
import torch

from moeray.transport.arena import Arena


def test_what_one_end_writes_the_other_reads() -> None:
    ours = Arena.create(10_000)
    theirs = Arena.join(os.dup(ours.descriptor))
    first, second = ours.take(100), ours.take(1000)
    second.copy_(torch.arange(1000, dtype=torch.int64).to(torch.uint8))
    seen = theirs.view(ours.offset_of(second[10:]), 990)
    assert torch.equal(seen, second[10:])
    theirs.view(ours.offset_of(first), 100).fill_(7)
    assert (first == 7).all() and second.data_ptr() % 64 == 0


def test_memory_outlives_the_descriptor() -> None:
    arena = Arena.create(5000)
    room = arena.take(5000)
    arena.close()
    arena.close()
    del arena
    assert room.fill_(3).sum().item() == 15_000


def test_more_than_there_is_is_refused_with_the_arithmetic() -> None:
    arena = Arena.create(4096)
    arena.take(4000)
    with pytest.raises(MemoryError, match=r"4032 \+ 65 = 4097 bytes of an arena of 4096"):
        arena.take(65)


@pytest.mark.parametrize(("offset", "num_bytes"), [(-1, 5), (0, -5), (4090, 7), (2**62, 2**62), (5000, 0)])
def test_a_message_outside_the_arena_is_refused(offset: int, num_bytes: int) -> None:
    with pytest.raises(ValueError, match="in an arena of 4096 bytes"):
        Arena.create(4096).view(offset, num_bytes)


def test_nobody_can_resize_it_and_what_could_be_resized_is_refused() -> None:
    arena = Arena.create(8192)
    for size in (4096, 16384):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.descriptor, size)
    open_file = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(open_file, 4096)
    with pytest.raises(ValueError, match="not sealed"):
        Arena.join(open_file)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(open_file)


def test_pages_are_committed_when_they_are_written() -> None:
    arena = Arena.create(1 << 30)
    arena.take(1 << 30)[: 1 << 20].fill_(1)
    committed = os.fstat(arena.descriptor).st_blocks * 512
    assert 1 << 20 <= committed < 1 << 22
