"""The replica's end of a shard process: what its events say is known while they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

from moeray.attention_shard.child import ShardProcess
from moeray.attention_shard.spec import Event, encode_event


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_how_long_a_layer_call_waits_is_known_until_it_ends() -> None:
    events = asyncio.StreamReader()

    async def wait() -> int:
        return 3

    child = ShardProcess(SimpleNamespace(wait=wait), events)  # type: ignore[arg-type]
    ended = asyncio.create_task(child.ended(lambda *_: None))
    assert child.waits_s == 0
    events.feed_data(encode_event(Event("waiting", "s0")))
    await until(lambda: child.waits_s > 0.05)
    events.feed_data(encode_event(Event("resumed", "s0")))
    await until(lambda: child.waits_s == 0)
    events.feed_data(encode_event(Event("lost", "s0", text="its engine was killed")))
    events.feed_eof()
    assert await asyncio.wait_for(ended, 60) == "its engine was killed"
