"""Clients that ask without pause, and the judgement of what they got."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from chaos.asks import Ask
from chaos.clients import Outcome, perform

LOGPROB_TOLERANCE = 0.05
"""A continued stream computes its keys and values anew, in one pass instead of token by token: bits of bf16 differ."""
NUM_FLOWING = 2
RETRY_EVERY_S = 0.25
RETRY_FOR_S = 60.0


class Load:
    """`num_clients` threads, each with its own order of the asks, from `start` to `stop`.

    Beside them NUM_FLOWING ask for streams that flow and nothing else: stalls are seen in these.
    """

    def __init__(self, asks: Sequence[Ask], endpoints: dict[str, str], num_clients: int, seed: int) -> None:
        self.outcomes: list[Outcome] = []
        self._endpoints = endpoints
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed}/{number}"), asks), name=f"client {number}")
            for number in range(num_clients)
        ]
        flowing = [ask for ask in asks if ask.flows]
        self._threads += [
            threading.Thread(target=self._run, args=(random.Random(f"{seed}/flow {number}"), flowing))
            for number in range(NUM_FLOWING if flowing else 0)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Lets every client finish what it asks."""
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _run(self, rng: random.Random, asks: Sequence[Ask]) -> None:
        while not self._ended.is_set():
            for ask in rng.sample(asks, len(asks)):
                if self._ended.is_set():
                    return
                self.outcomes.append(outcome := ask_until_answered(ask, self._endpoints))
                if outcome.failure:
                    time.sleep(RETRY_EVERY_S)  # as clients do; an error at once must not count a thousand times


def ask_until_answered(ask: Ask, endpoints: dict[str, str]) -> Outcome:
    """As a client does whose connection breaks: ask again. What the server answers, good or bad, is final."""
    cuts, first = 0, time.monotonic()
    while True:
        outcome = perform(ask, endpoints)
        outcome.cuts = cuts
        if not outcome.cut or time.monotonic() - first > RETRY_FOR_S:
            return outcome
        cuts += 1
        time.sleep(RETRY_EVERY_S)


def reference(asks: Sequence[Ask], endpoints: dict[str, str], num_clients: int) -> dict[str, Outcome]:
    """Every ask once, as many at a time as under load, with nothing injected.

    Raises:
        RuntimeError: one of them failed.
    """
    with ThreadPoolExecutor(num_clients) as pool:
        outcomes = list(pool.map(lambda ask: perform(ask, endpoints), asks))
    for outcome in outcomes:
        if outcome.answer is None:
            raise RuntimeError(f"without any fault, {outcome.ask.name}: {outcome.failure}")
    return {outcome.ask.name: outcome for outcome in outcomes}


def what_is_wrong(outcome: Outcome, right: Mapping[str, Outcome]) -> str:
    """Empty if the answer is the fault-free run's, byte for byte; log-probabilities within LOGPROB_TOLERANCE.

    Of two aborted streams one must be a beginning of the other; their chunks' borders are not compared.
    """
    if outcome.answer is None:
        return ""
    expected = right[outcome.ask.name]
    if outcome.ask.abort_after is not None:
        return "" if _agree(outcome.answer, expected.answer or "[[]]") else f"aborted after {outcome.answer}"
    if outcome.answer != expected.answer:
        return f"expected {expected.answer}, got {outcome.answer}"
    pairs = zip(outcome.logprobs, expected.logprobs, strict=True)
    worst = max((abs(one - other) for one, other in pairs), default=0.0)
    return f"a log-probability is off by {worst:.3f}" if worst > LOGPROB_TOLERANCE else ""


def _agree(one: str, other: str) -> bool:
    """Whether, choice by choice, the shorter text is how the longer one begins."""
    (ours, theirs) = (dict(json.loads(text)[0]) for text in (one, other))
    pairs = (
        (ours[index][key], theirs[index][key]) for index in ours.keys() & theirs for key in ("reasoning", "content")
    )
    return all(a.startswith(b) or b.startswith(a) for a, b in pairs)
