"""Clients that ask without pause, and the judgement of what they got."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from statistics import median

from chaos.asks import Ask
from chaos.clients import Outcome, http_chunks, perform

LOGPROB_TOLERANCE = 0.05
"""A continued stream computes its keys and values anew, in one pass instead of token by token: bits of bf16 differ."""
RETRY_EVERY_S = 0.25
RETRY_FOR_S = 60.0
REQUEST_PREFIX, WATCHED_PREFIX = "chaos-", "chaos-watched-"
"""How the ids of requests begin, and of those that are watched."""
REPREFILLS = 3


class Load:
    """`num_clients` threads, each with its own order of the asks, from `start` to `stop`.

    Beside them as many as there are streams that flow ask for these and nothing else: stalls are seen in these.
    """

    def __init__(self, asks: Sequence[Ask], endpoints: dict[str, str], num_clients: int, seed: int) -> None:
        self.outcomes: list[Outcome] = []
        self._endpoints = endpoints
        self._ended = threading.Event()
        self._numbers = count(1)
        self._flowing_since: dict[str, float] = {}
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed}/{number}"), asks), name=f"client {number}")
            for number in range(num_clients)
        ]
        flowing = [ask for ask in asks if ask.flows]
        self._threads += [
            threading.Thread(target=self._run, args=(random.Random(f"{seed}/flow {number}"), flowing, f"flow {number}"))
            for number in range(len(flowing))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Lets every client finish what it asks."""
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def have_all_begun_since(self, when: float) -> bool:
        """Whether each watched stream that runs began after that: it went to a shard that was there then."""
        return min(self._flowing_since.values(), default=when) >= when

    def _run(self, rng: random.Random, asks: Sequence[Ask], name: str = "") -> None:
        while not self._ended.is_set():
            for ask in rng.sample(asks, len(asks)):
                if self._ended.is_set():
                    return
                request_id = f"{WATCHED_PREFIX if name else REQUEST_PREFIX}{next(self._numbers)}"
                if name:
                    self._flowing_since[name] = time.monotonic()
                self.outcomes.append(outcome := ask_until_answered(ask, self._endpoints, request_id))
                if outcome.failure:
                    time.sleep(RETRY_EVERY_S)  # as clients do; an error at once must not count a thousand times


def ask_until_answered(ask: Ask, endpoints: dict[str, str], request_id: str) -> Outcome:
    """As a client does whose connection breaks: ask again. What the server answers, good or bad, is final."""
    cuts: list[float] = []
    first = time.monotonic()
    while True:
        outcome = perform(ask, endpoints, request_id)
        outcome.cuts = cuts
        if not outcome.cut or time.monotonic() - first > RETRY_FOR_S:
            return outcome
        cuts.append(outcome.ended)
        time.sleep(RETRY_EVERY_S)


def reprefill_s(asks: Sequence[Ask], endpoints: dict[str, str]) -> float:
    """Median seconds to the first token after the whole text of a stream that flows, alone, with nothing cached.

    It is what a shard does that goes on with such a stream shortly before its end.
    """
    times = []
    for ask in (ask for ask in asks if ask.flows):
        chunks = list(http_chunks(ask, endpoints["http"], {}))
        token_ids = [*chunks[0]["prompt_token_ids"]]
        for chunk in chunks:
            for choice in chunk["choices"]:
                token_ids += choice.get("token_ids") or ()
        body = {"model": ask.body["model"], "prompt": token_ids, "max_tokens": 1, "stream": True, "ignore_eos": True}
        for number in range(REPREFILLS):
            salted = body | {"cache_salt": f"re-prefill {number}", "return_token_ids": True}
            outcome = perform(Ask("re-prefill", "http", salted, path="/v1/completions"), endpoints)
            if outcome.answer is None:
                raise RuntimeError(f"without any fault, {ask.name} again in one pass: {outcome.failure}")
            times.append(outcome.times[0] - outcome.started)
    return median(times)


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
    """Whether the first says anything, and choice by choice the shorter text is how the longer one begins."""
    (ours, theirs) = (dict(json.loads(text)[0]) for text in (one, other))
    pairs = (
        (ours[index][key], theirs[index][key]) for index in ours.keys() & theirs for key in ("reasoning", "content")
    )
    said = any(ours[index][key] for index in ours for key in ("reasoning", "content"))
    return said and all(a.startswith(b) or b.startswith(a) for a, b in pairs)
