"""What an attacked server must not do, judged from its answers and from how it stands at the end."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

MAX_GROWTH_BYTES = 512 << 20
MAX_SILENCE_S = 5.0
ANSWER_S = 120.0
"""A case that has no answer by then hangs."""

_FAULTS = ("INTERNAL", "UNKNOWN", "UNAVAILABLE", "DATA_LOSS", "DEADLINE_EXCEEDED")
_TRACES = (b"Traceback (most recent call last)", b'.py", line ', b"site-packages")


@dataclass(frozen=True, slots=True)
class End:
    """How the server stands after the last case.

    Attributes:
        grown_bytes: memory of the ingress, since everything that is allocated once was there.
        silence_s: of the slowest /health.
        left: requests that nobody waits for, by where they are.
        ended: processes that are gone, and how they ended.
    """

    grown_bytes: int = 0
    silence_s: float = 0.0
    left: tuple[tuple[str, int], ...] = ()
    ended: tuple[str, ...] = ()


class Judge:
    """Thread-safe.

    Args:
        secrets: what no answer may hold.
    Attributes:
        counts: (kind, status) -> cases.
        lost: what others saw go wrong meanwhile.
    """

    def __init__(self, secrets: Sequence[bytes]) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.lost: list[str] = []
        self._secrets = secrets
        self._lock = threading.Lock()

    @property
    def num_cases(self) -> int:
        with self._lock:
            return sum(self.counts.values())

    def saw(self, kind: str, status: str, answer: bytes) -> None:
        """Count one case and check its answer.

        Raises:
            AssertionError: the server's fault, something of its inside, or another tenant's secret.
        """
        with self._lock:
            self.counts[kind, status] += 1
        assert not (status.startswith("5") and status != "501"), f"{kind}: {status}: {answer[:500]!r}"
        assert status not in _FAULTS, f"{kind}: {status}: {answer[:500]!r}"
        for trace in _TRACES:
            assert trace not in answer, f"{kind}: {status}: a traceback: {answer[:2000]!r}"
        for secret in self._secrets:
            assert secret not in answer, f"{kind}: another tenant's {secret!r} in {answer[:500]!r}"

    def hung(self, kind: str) -> None:
        """A case got no answer in time.

        Raises:
            AssertionError: always.
        """
        with self._lock:
            self.counts[kind, "hung"] += 1
        raise AssertionError(f"{kind}: no answer within {ANSWER_S:g} s")

    def faults(self, end: End) -> list[str]:
        """What must not have happened, apart from single answers."""
        faults = list(dict.fromkeys(self.lost))
        if end.grown_bytes > MAX_GROWTH_BYTES:
            faults.append(f"memory grew by {end.grown_bytes >> 20} MiB, more than {MAX_GROWTH_BYTES >> 20}")
        if end.silence_s > MAX_SILENCE_S:
            faults.append(f"/health took {end.silence_s:.1f} s, more than {MAX_SILENCE_S:g}")
        faults += [f"{count} requests are left in {where}" for where, count in end.left if count]
        return faults + list(end.ended)
