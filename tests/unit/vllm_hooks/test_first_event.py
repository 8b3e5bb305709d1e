"""A stream that fails at its first step is an error with a status; any other is as it was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from moeray.vllm_hooks.first_event import answered

ERROR = 'data: {"error": {"message": "no", "type": "BadRequestError", "param": "n", "code": 400}}\n\n'


class Stream:
    """Gives its items, raises those that are errors, and knows whether it was closed."""

    def __init__(self, *items: Any) -> None:
        self.items, self.closed, self.made = items, False, 0

    async def events(self) -> AsyncGenerator[Any, None]:
        try:
            for item in self.items:
                self.made += 1
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, asyncio.Event):
                    await item.wait()
                    continue
                yield item
        finally:
            self.closed = True

    async def create(self) -> AsyncGenerator[Any, None]:
        return self.events()


async def test_the_first_event_is_made_before_the_answer_begins_and_no_other() -> None:
    stream = Stream("data: 1", "data: 2")
    answer = await answered(stream.create)()

    assert stream.made == 1
    assert [event async for event in answer] == ["data: 1", "data: 2"]
    assert stream.closed


async def test_an_error_as_the_first_event_is_the_answer() -> None:
    stream = Stream(ERROR, "data: [DONE]")
    answer = await answered(stream.create)()

    assert isinstance(answer, ErrorResponse) and (answer.error.code, answer.error.param) == (400, "n")
    assert stream.closed


async def test_what_follows_a_responses_preamble_decides() -> None:
    created, going = (SimpleNamespace(type=f"response.{name}") for name in ("created", "in_progress"))
    with pytest.raises(ValueError, match="bad"):
        await answered(Stream(created, going, ValueError("bad")).create)()
    item = SimpleNamespace(type="response.output_item.added")
    answer = await answered(Stream(created, going, item).create)()
    assert [event async for event in answer] == [created, going, item]


async def test_a_client_that_leaves_closes_the_stream() -> None:
    stream = Stream("data: 1", "data: 2", "data: 3")
    answer = await answered(stream.create)()
    assert await anext(answer) == "data: 1"
    await answer.aclose()
    assert stream.closed and stream.made == 1


async def test_a_stream_that_waits_for_the_engine_begins_without_its_first_event() -> None:
    engine = asyncio.Event()
    answer = await answered(Stream(engine, "data: 1", "data: 2").create)()
    engine.set()
    assert [event async for event in answer] == ["data: 1", "data: 2"]


async def test_a_client_that_leaves_before_the_first_event_closes_the_stream() -> None:
    stream = Stream(asyncio.Event(), "data: 1")
    answer = await answered(stream.create)()
    reading = asyncio.ensure_future(anext(answer))
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert stream.closed and stream.made == 1


async def test_a_call_that_is_cancelled_while_its_stream_begins_closes_the_stream() -> None:
    stream = Stream(asyncio.Event(), "data: 1")
    call = asyncio.ensure_future(answered(stream.create)())
    while not stream.made:
        await asyncio.sleep(0)
    call.cancel()
    done, _ = await asyncio.wait({call}, timeout=60)
    assert done and call.cancelled() and stream.closed


async def test_an_answer_that_is_no_stream_and_an_empty_stream_are_left_alone() -> None:
    async def whole() -> str:
        return "whole"

    assert await answered(whole)() == "whole"
    assert [event async for event in await answered(Stream().create)()] == []


async def test_a_stream_that_fails_while_it_is_cancelled_is_closed_too() -> None:
    class Sore(Stream):
        async def events(self) -> AsyncGenerator[Any, None]:
            try:
                await asyncio.Event().wait()
                yield ""
            except asyncio.CancelledError:
                raise RuntimeError("not like this") from None
            finally:
                self.closed = True

    stream = Sore()
    begun = await answered(stream.create)()
    await begun.aclose()
    asked = asyncio.create_task(answered(stream.create)())
    await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert stream.closed


async def test_a_second_cancellation_does_not_leave_a_slow_stream_open() -> None:
    may_end = asyncio.Event()

    class Slow(Stream):
        async def events(self) -> AsyncGenerator[Any, None]:
            try:
                await asyncio.Event().wait()
                yield ""
            finally:
                await may_end.wait()
                self.closed = True

    stream = Slow()
    begun = await answered(stream.create)()
    reading = asyncio.ensure_future(anext(begun))
    for _ in range(2):
        await asyncio.sleep(0.01)
        reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    may_end.set()
    async with asyncio.timeout(60):
        while not stream.closed:
            await asyncio.sleep(0.01)


async def test_an_answer_that_nobody_begins_to_read_ends_its_stream() -> None:
    stream = Stream(asyncio.Event(), "data: 1")
    await answered(stream.create)()
    async with asyncio.timeout(60):
        while not stream.closed:
            await asyncio.sleep(0.01)
