"""What routing by cached prefix is worth: chats over two shards, beside round robin, with the same shards and clients.

    python benchmarks/routing.py [--quick] [--json FILE]

Two ingresses share two shard processes; one chooses as the product does, one takes turns. Each in its turn serves the
same work with words of its own: USERS people who talk to an assistant with a system prompt in common, TURNS each, who
wait for an answer before they go on, CLIENTS of them at a time. A turn repeats all before it.

`ttft_ratio` is the median over rounds of the routed time to the first token over round robin's (below 1 is better);
`cached` the share of all prompt tokens that an engine had in its cache.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import doors
import records
import uvloop
from callers import Answer, Caller, chat
from doors import Door
from records import Record, percentile

from moeray.tiny import checkpoint_path

MODEL = "moeray-tiny"
PREFIX, ROUND_ROBIN = "prefix", "round robin"
USERS, CLIENTS, TURNS = 12, 4, 4
SYSTEM_WORDS, TURN_WORDS = 160, 60
ANSWER_TOKENS = 8
_WORDS = Path(__file__).read_text(encoding="utf-8").split()[:120]


@dataclass(frozen=True)
class Window:
    """One door's turn: seconds and tokens of each request, the first turn of each user apart."""

    first: list[float]
    later: list[float]
    cached: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds (a minute) instead of eight")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the records there")
    options = parser.parse_args()
    rounds = 2 if options.quick else 8
    found = uvloop.run(measure(rounds))
    if options.json:
        records.write(options.json, found, rounds=rounds)


async def measure(rounds: int) -> list[Record]:
    log = Path(tempfile.gettempdir()) / "moeray-bench-routing.log"
    print(f"what the servers print: {log}", flush=True)
    windows: dict[str, list[Window]] = {PREFIX: [], ROUND_ROBIN: []}
    with contextlib.ExitStack() as stack:
        asked = stack.enter_context(doors.routed(checkpoint_path(), MODEL, list(windows), log))
        await asyncio.to_thread(doors.settle, asked)
        numbers = itertools.count()
        for door in asked:
            await _window(door, next(numbers))
        for number in range(rounds):
            for door in asked if number % 2 == 0 else reversed(asked):
                windows[door.name].append(await _window(door, next(numbers)))
            print(f"round {number + 1} of {rounds}", flush=True)
    found = records_of(windows)
    print("\n".join(map(json.dumps, found)), flush=True)
    return found


async def _window(door: Door, number: int) -> Window:
    """All users have all their turns."""
    system = _text(f"system {number}", SYSTEM_WORDS)
    users = iter(range(USERS))
    found: list[list[Answer]] = []
    prompts: list[int] = []
    callers = [await door.caller() for _ in range(CLIENTS)]
    try:
        async with asyncio.TaskGroup() as group:
            for caller in callers:
                group.create_task(_serve(caller, users, system, number, found, prompts))
    finally:
        for caller in callers:
            await caller.close()
    cached = sum(each.cached for answers in found for each in answers)
    return Window(
        [answers[0].ttft_s for answers in found],
        [each.ttft_s for answers in found for each in answers[1:]],
        cached / sum(prompts),
    )


async def _serve(
    caller: Caller, users: Iterator[int], system: str, number: int, found: list[list[Answer]], prompts: list[int]
) -> None:
    """One client: user after user, turn after turn."""
    for user in users:
        messages = [{"role": "system", "content": system}]
        answers = []
        for turn in range(TURNS):
            messages.append({"role": "user", "content": _text(f"{number} {user} {turn}", TURN_WORDS)})
            body: dict[str, Any] = chat(MODEL, 0) | {"messages": messages, "max_tokens": ANSWER_TOKENS}
            answers.append(await caller.ask(body))
            prompts.append(answers[-1].prompt)
            messages = [*messages, {"role": "assistant", "content": _text(f"answer {turn}", ANSWER_TOKENS)}]
        found.append(answers)


def _text(seed: str, num_words: int) -> str:
    """The same words for the same seed, that begin like nobody else's."""
    return f"{seed}: " + " ".join(random.Random(seed).choices(_WORDS, k=num_words))  # noqa: S311 - no secret


def records_of(windows: dict[str, list[Window]]) -> list[Record]:
    """One record per way to choose; `later`: a user's turns after the first."""
    found = []
    for name, own in windows.items():
        later = [1e3 * each for window in own for each in window.later]
        pairs = list(zip(own, windows[ROUND_ROBIN], strict=True))
        ratios = [statistics.median(a.later) / statistics.median(b.later) for a, b in pairs]
        tails = [percentile(a.later, 95) / percentile(b.later, 95) for a, b in pairs]
        found.append({
            "routing": name,
            "first_ttft_p50_ms": round(1e3 * statistics.median(each for window in own for each in window.first), 1),
            "later_ttft_p50_ms": round(percentile(later, 50), 1),
            "later_ttft_p95_ms": round(percentile(later, 95), 1),
            "ttft_ratio": records.spread(ratios),
            "ttft_p95_ratio": records.spread(tails),
            "cached": round(statistics.median(each.cached for each in own), 3),
            "requests": sum(len(window.first) + len(window.later) for window in own),
        })  # fmt: skip
    return found


if __name__ == "__main__":
    main()
