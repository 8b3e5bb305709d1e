"""What can go wrong on the hop. All carry the group, so that membership can act on them."""

from __future__ import annotations

from collections.abc import Sequence

_NO_ANSWER = "no answer"
TOO_SLOW = "too slow: it was waited for most of the time, when all others had answered"


def no_answer(timeout_s: float | None) -> str:
    """The reason of a link that has waited for long enough; None where nobody said how long that is."""
    return f"{_NO_ANSWER} in time" if timeout_s is None else f"{_NO_ANSWER} within {timeout_s:g} s"


class TransportError(RuntimeError):
    """Base of every error of the hop."""


class PeerLost(TransportError):
    """A peer died, hung past the timeout or cut its connection."""

    def __init__(self, group: int, reason: str) -> None:
        super().__init__(f"expert group {group} lost: {reason}")
        self.group = group
        self.reason = reason

    @property
    def is_late(self) -> bool:
        """Whether it is nothing but slow, or gave no sign at all, which may be the same."""
        return self.reason == TOO_SLOW or self.reason.startswith(_NO_ANSWER)


class StaleGeneration(TransportError):
    """A peer is on another generation of the placement."""

    def __init__(self, group: int, ours: int, theirs: int) -> None:
        super().__init__(f"expert group {group} is on generation {theirs}, this shard on {ours}")
        self.group, self.ours, self.theirs = group, ours, theirs


class GroupFailed(TransportError):
    """A group answered, but with an error of its own (bad input, NaN, a missing expert)."""

    def __init__(self, group: int, reason: str) -> None:
        super().__init__(f"expert group {group} failed: {reason}")
        self.group = group
        self.reason = reason


class ExpertsMissing(TransportError):
    """A token goes to experts that no group holds which is there."""

    def __init__(self, layer: int, experts: Sequence[int]) -> None:
        super().__init__(f"layer {layer}: no expert group that is there holds experts {list(experts)}")
        self.layer, self.experts = layer, tuple(experts)


class HandshakeRefused(TransportError):
    """Shard and group do not belong together; names the field and both values."""
