"""The load itself: every request at its moment, all of them watched to their end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from moeray.loadtest.arrivals import Planned
from moeray.loadtest.outcome import Outcome
from moeray.loadtest.targets import Target

Say = Callable[[int, int], None]
"""`say(done, failed)` after each request."""
TextOf = Callable[[Planned], str]


async def drive(target: Target, planned: Iterable[Planned], text_of: TextOf, users: int, say: Say) -> list[Outcome]:
    """All of them.

    Args:
        users: at most so many at once; what is due meanwhile waits, and is late. 0: as many as are due.
    """
    began = time.perf_counter()
    places = asyncio.Semaphore(users) if users else None
    outcomes: list[Outcome] = []
    failed = 0

    async def one(each: Planned) -> None:
        nonlocal failed
        due_s = began + each.due_s if each.due_s is not None else time.perf_counter()
        outcome = Outcome(each.number, due_s, due_s)
        try:
            await target.ask(outcome, text_of(each), each.answer_tokens)
        finally:
            if places is not None:
                places.release()
        outcomes.append(outcome)
        failed += bool(outcome.error)
        say(len(outcomes), failed)

    async with asyncio.TaskGroup() as group:
        for each in planned:
            if each.due_s is not None and (wait_s := began + each.due_s - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            if places is not None:
                await places.acquire()
            group.create_task(one(each))
            await asyncio.sleep(0)  # it is sent before the next one is thought of
    return sorted(outcomes, key=lambda each: each.number)
