"""Flights of several communicators are one flight: ranks are those of the whole, the first failure ends all."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from moeray.transport import mixed as mixed_module
from moeray.transport.communicator import NOBODY, Last, LinkBroken, Message
from moeray.transport.mixed import MixedCommunicator

RANKS = ((0, 2, 5), (0, 1, 3))
"""[part][rank in the part] -> rank of the whole."""


class Clock:
    """Goes on only where a part waits."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(mixed_module, "monotonic", found)
    monkeypatch.setattr(Part, "clock", found, raising=False)
    return found


class Part:
    """A communicator whose flights take `seconds` and end as they are told to."""

    clock: Clock
    device, bucketed = torch.device("cpu"), False

    def __init__(self, seconds: float, end: Last | LinkBroken) -> None:
        self.seconds, self.end = seconds, end
        self.peers = list[int]()
        self.abandoned = 0

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Part:
        self.peers = [rank for _, rank in [*sends, *receives]]
        return self

    def wait(self, timeout_s: float | None) -> Last:
        self.clock.now += self.seconds
        if isinstance(self.end, LinkBroken):
            raise self.end
        return self.end

    def abandon(self) -> None:
        self.abandoned += 1

    def close(self) -> None: ...


def mixed(first: Part, second: Part) -> MixedCommunicator:
    return MixedCommunicator([(first, RANKS[0]), (second, RANKS[1])])


def test_messages_go_to_the_part_that_has_the_peer_under_its_rank_there() -> None:
    first, second = Part(0, NOBODY), Part(0, NOBODY)
    row = torch.zeros(1)
    mixed(first, second).exchange([(row, 5), (row, 1)], [(row, 3), (row, 2)])
    assert (first.peers, second.peers) == ([2, 1], [1, 2])


def test_who_was_waited_for_last_is_named_by_the_rank_of_the_whole() -> None:
    together = mixed(Part(0.0, Last(1, 0.5)), Part(0.2, Last(2, 0.1)))
    assert together.exchange([], []).wait(None) == Last(RANKS[1][2], 0.1)


@pytest.mark.parametrize(("peer", "rank"), [(1, 2), (2, 5), (-1, -1)])
def test_who_is_lost_is_named_by_the_rank_of_the_whole_and_the_others_are_given_up(peer: int, rank: int) -> None:
    first, second = Part(0, LinkBroken(peer, "end of file")), Part(0, NOBODY)
    with pytest.raises(LinkBroken) as caught:
        mixed(first, second).exchange([], []).wait(None)
    assert (caught.value.peer, caught.value.reason) == (rank, "end of file")
    assert second.abandoned == 1


def test_a_part_of_one_peer_that_cannot_tell_is_that_peer() -> None:
    together = MixedCommunicator([(Part(0.0, NOBODY), RANKS[0]), (Part(0.2, NOBODY), (0, 4))])
    assert together.exchange([], []).wait(None) == Last(4, 0.2)
