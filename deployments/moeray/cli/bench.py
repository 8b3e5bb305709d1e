"""`moeray bench`: load on a server, or on two one after the other, and what its clients saw."""

from __future__ import annotations

import asyncio
import json
import math
import ssl
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeray.cli.chat import Identity
from moeray.cli.errors import CommandError
from moeray.loadtest.arrivals import Lengths, LoadError, Planned, closed, from_trace, open_loop
from moeray.loadtest.drive import TextOf, drive
from moeray.loadtest.outcome import Goals, Outcome, summary
from moeray.loadtest.prompts import Prompts, from_file
from moeray.loadtest.report import html, text
from moeray.loadtest.targets import GrpcTarget, HttpTarget, Target, model_of

PROBE_WORDS = 256
"""Of the request that finds out how many tokens a word has."""
SAY_S = 1.0


@dataclass(frozen=True)
class Load:
    """See `moeray bench --help`."""

    lengths: Lengths
    requests: int = 100
    users: int = 0
    rate: float | None = None
    burstiness: float = 1.0
    trace: Path | None = None
    speed: float = 1.0
    prompts: Path | None = None
    seed: int = 0

    def planned(self) -> Iterable[Planned]:
        """Raises LoadError."""
        if self.trace is not None:
            return from_trace(self.trace, self.speed)
        if self.rate is not None:
            return open_loop(self.requests, self.rate, self.burstiness, self.lengths, self.seed)
        return closed(self.requests, self.lengths, self.seed)


@dataclass(frozen=True)
class Where:
    """Servers.

    Attributes:
        url: of HTTP.
        grpc: host:port, to be asked instead.
        compare: the URL of a second one.
        model: by default the first that each names.
    """

    url: str
    grpc: str | None = None
    compare: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class Kept:
    """Files to write."""

    json: Path | None = None
    html: Path | None = None


def bench(load: Load, where: Where, identity: Identity, goals: Goals, kept: Kept) -> int:
    """0 if every request was answered, else 1.

    Raises:
        CommandError: the load cannot be made (2), nobody answers at the beginning, or a file cannot be written (1).
    """
    try:
        load.planned()
        found = asyncio.run(_all(load, where, identity, goals))
        print(text([(name, numbers) for name, numbers, _ in found]))
        if kept.json is not None:
            plain = {name: numbers for name, numbers, _ in found}
            kept.json.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
        if kept.html is not None:
            page = html([(name, numbers, _points(own)) for name, numbers, own in found], "moeray bench")
            kept.html.write_text(page, encoding="utf-8")
    except LoadError as error:
        raise CommandError(str(error), status=2) from error
    except OSError as error:
        raise CommandError(str(error)) from error
    return 1 if any(numbers["errors"] for _, numbers, _ in found) else 0


async def _all(
    load: Load, where: Where, identity: Identity, goals: Goals
) -> list[tuple[str, dict[str, Any], list[Outcome]]]:
    """Each server in its turn, with the same load."""
    found = []
    async with AsyncExitStack() as stack:
        for url in filter(None, (where.url, where.compare)):
            tls = identity.context() if url.startswith("https:") else None
            model = where.model or await model_of(url, identity.api_key, tls)
            target = _target(url, where.grpc if url == where.url else None, model, identity, tls)
            stack.push_async_callback(target.close)
            text_of = await _text_of(load, target)
            outcomes = await drive(target, load.planned(), text_of, load.users, _Progress(target.name))
            found.append((target.name, summary(outcomes, goals), outcomes))
    return found


def _target(url: str, grpc: str | None, model: str, identity: Identity, tls: ssl.SSLContext | None) -> Target:
    if grpc is None:
        return HttpTarget(url, model, api_key=identity.api_key, tls=tls)
    credentials = identity.credentials() if tls is not None else None
    return GrpcTarget(grpc, model, api_key=identity.api_key, credentials=credentials)


async def _text_of(load: Load, target: Target) -> TextOf:
    """Prompts of a file in turn, or of words, whose tokens the server has counted once.

    Raises:
        OSError: it does not answer that request.
        LoadError: the file cannot be used.
    """
    if load.prompts is not None:
        lines = from_file(load.prompts)
        return lambda each: lines[each.number % len(lines)]
    probe = Outcome(-1, 0.0, 0.0)
    await target.ask(probe, Prompts(load.seed).text(-1, PROBE_WORDS), 1)
    if probe.error:
        raise OSError(f"{target.name}: {probe.error} {probe.detail}".strip())
    prompts = Prompts(load.seed, load.lengths.shared, max(1.0, probe.prompt_tokens) / PROBE_WORDS)
    return lambda each: prompts.text(each.number, each.prompt_tokens, load.lengths.shared)


class _Progress:
    """A line a second on standard error."""

    def __init__(self, name: str) -> None:
        self._name, self._said_s = name, time.monotonic()

    def __call__(self, done: int, failed: int) -> None:
        if time.monotonic() - self._said_s >= SAY_S:
            self._said_s = time.monotonic()
            print(f"{self._name}: {done} done, {failed} failed", file=sys.stderr, flush=True)


def _points(outcomes: Sequence[Outcome]) -> list[tuple[float, float]]:
    """(second of the run, ms to the first token) of each request."""
    began = min((each.sent_s for each in outcomes), default=0.0)
    return [(each.sent_s - began, 1e3 * each.ttft_s) for each in outcomes if not math.isnan(each.ttft_s)]
