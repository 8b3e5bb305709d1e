"""Fetch or recompute: how much of a prompt's KV to bring from which stores (pure).

A fetch is chosen only where it is predicted to end before computing the same tokens would: a hit that is slower than a
miss is a defect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

GAIN = 0.9
"""A fetch must be predicted to take at most this share of the time that it saves: predictions are not exact."""


@dataclass(frozen=True, slots=True)
class Option:
    """A prefix that could be had without computing it.

    Attributes:
        tokens: the prefix ends before this token.
        bytes_from: what must be brought from each store; what is in the engine's own host memory costs nothing here.
    """

    tokens: int
    bytes_from: Mapping[str, int]

    @property
    def source(self) -> str:
        """The farthest store that it needs."""
        return "+".join(self.bytes_from) or "host"


@dataclass(frozen=True, slots=True)
class Choice:
    """What to do about one prompt.

    Attributes:
        option: what to fetch; None: compute.
        fetch_s, compute_s: predicted, of what was chosen or, if nothing was, of the best that was turned down; None if
            unknown.
        reason: one of REASONS.
    """

    option: Option | None
    fetch_s: float | None
    compute_s: float | None
    reason: str


REASONS = {
    "faster": "fetching is predicted to take less time than computing",
    "slower": "computing is predicted to take less time than fetching",
    "nothing": "no store has a usable prefix",
    "unmeasured": "what computing costs here has not been measured yet",
    "resident": "the engine's own host memory has it",
}


def choose(
    options: Sequence[Option],
    num_computed: int,
    compute_s: Callable[[int, int], float | None],
    fetch_s: Mapping[str, Callable[[int], float | None]],
) -> Choice:
    """The option that saves most time.

    Args:
        options: what the stores have; each longer than `num_computed`.
        num_computed: tokens whose KV the engine has on its device.
        compute_s: (start, end) -> predicted seconds to compute these tokens.
        fetch_s: per store, bytes -> predicted seconds to bring them.
    """
    best: tuple[float, Choice] | None = None
    turned_down = Choice(None, None, None, "nothing")
    for option in options:
        compute = compute_s(num_computed, option.tokens)
        if not option.bytes_from:
            candidate = Choice(option, 0.0, compute, "resident")
            saved = compute if compute is not None else float(option.tokens)
        elif compute is None:
            turned_down = Choice(None, None, None, "unmeasured")
            continue
        else:
            fetch = _total(option, fetch_s)
            if fetch is None or fetch > GAIN * compute:
                turned_down = Choice(None, fetch, compute, "slower" if fetch is not None else "unmeasured")
                continue
            candidate, saved = Choice(option, fetch, compute, "faster"), compute - fetch
        if best is None or saved > best[0]:
            best = saved, candidate
    return turned_down if best is None else best[1]


def _total(option: Option, fetch_s: Mapping[str, Callable[[int], float | None]]) -> float | None:
    """Stores are asked one beside the other, but they share the copying: the sum is what is safe to expect."""
    total = 0.0
    for store, num_bytes in option.bytes_from.items():
        if (seconds := fetch_s[store](num_bytes)) is None:
            return None
        total += seconds
    return total
