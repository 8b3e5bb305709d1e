"""What one request's client saw, and what that means for all of them.

Names and definitions are those of `vllm bench serve`: TTFT to the first token, TPOT the mean time of later tokens of
one request, ITL the time between two pieces of a stream, E2E to the last token. What is different: in an open loop
the first and the last also exist from the moment at which the request was due. A client that is late because the
server held it up (or because this program was) must not make the server look better: coordinated omission.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

PERCENTS = (50, 95, 99)


@dataclass(slots=True)
class Outcome:
    """Seconds on one clock. `first_s`: the first token; `pieces_s`: between pieces; `error`: its kind; empty: none."""

    number: int
    due_s: float
    sent_s: float
    first_s: float = math.nan
    last_s: float = math.nan
    prompt_tokens: int = 0
    answer_tokens: int = 0
    pieces_s: list[float] = field(default_factory=list)
    error: str = ""
    detail: str = ""
    text: str = ""

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float:
        """nan of an answer of one token."""
        return (self.last_s - self.first_s) / (self.answer_tokens - 1) if self.answer_tokens > 1 else math.nan

    @property
    def e2e_s(self) -> float:
        return self.last_s - self.sent_s

    @property
    def late_s(self) -> float:
        """By how much it was sent after it was due."""
        return self.sent_s - self.due_s


@dataclass(frozen=True, slots=True)
class Goals:
    """Seconds; None: not asked for."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def met(self, outcome: Outcome) -> bool:
        """By a whole answer, counted from when it was due."""
        late = outcome.late_s
        found = (
            (self.ttft_s, outcome.ttft_s + late), (self.tpot_s, outcome.tpot_s), (self.e2e_s, outcome.e2e_s + late),
        )  # fmt: skip
        return not outcome.error and all(goal is None or math.isnan(value) or value <= goal for goal, value in found)


def summary(outcomes: Sequence[Outcome], goals: Goals) -> dict[str, Any]:
    """Numbers of one run; times in milliseconds."""
    whole = [each for each in outcomes if not each.error]
    began = min((each.sent_s for each in outcomes), default=0.0)
    lasted = max((each.last_s for each in whole), default=began) - began
    found: dict[str, Any] = {
        "requests": len(outcomes),
        "completed": len(whole),
        "errors": dict(Counter(each.error for each in outcomes if each.error)),
        "duration_s": lasted,
        "requests_per_s": _rate(len(whole), lasted),
        "prompt_tokens": sum(each.prompt_tokens for each in whole),
        "answer_tokens": sum(each.answer_tokens for each in whole),
        "answer_tokens_per_s": _rate(sum(each.answer_tokens for each in whole), lasted),
        "total_tokens_per_s": _rate(sum(each.answer_tokens + each.prompt_tokens for each in whole), lasted),
        "goodput_per_s": _rate(sum(goals.met(each) for each in outcomes), lasted),
    }
    times: dict[str, Callable[[Outcome], float]] = {
        "ttft": lambda each: each.ttft_s,
        "tpot": lambda each: each.tpot_s,
        "e2e": lambda each: each.e2e_s,
        "ttft_from_due": lambda each: each.ttft_s + each.late_s,
        "e2e_from_due": lambda each: each.e2e_s + each.late_s,
    }
    for name, of in times.items():
        found[f"{name}_ms"] = spread(1e3 * of(each) for each in whole)
    found["itl_ms"] = spread(1e3 * piece for each in whole for piece in each.pieces_s)
    return found


def spread(values: Iterable[float]) -> dict[str, float | None]:
    """Mean and percentiles by nearest rank; None where there was nothing."""
    known = sorted(value for value in values if not math.isnan(value))
    found: dict[str, float | None] = {"mean": sum(known) / len(known) if known else None}
    for percent in PERCENTS:
        found[f"p{percent}"] = known[max(0, math.ceil(len(known) * percent / 100) - 1)] if known else None
    return found


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
