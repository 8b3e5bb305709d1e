"""A stream begins when its request has been checked whole, so that one that fails at once has a status of its own.

vLLM checks part of a request (grammars, token ids, lengths) in the first step of its stream: without this, those
errors would come as an event after 200, or end the connection.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import msgspec

WAIT_S = 0.05
"""For the first event. The checks take none of it: they run before the first step can wait for anything. What takes
longer waits for the engine, perhaps in a queue, and its client should have its headers meanwhile."""

_PREAMBLE = ("response.created", "response.in_progress")
"""What /v1/responses says before it asks the engine."""
_ERROR = 'data: {"error":'

_ending: set[asyncio.Future[None]] = set()  # kept, or the loop may drop them


def answered(create: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """`create`, one of vLLM's handlers: a stream that it returns has been checked, or an error is returned."""

    async def create_answered(*args: Any, **kwargs: Any) -> Any:
        answer = await create(*args, **kwargs)
        return await _begun(answer) if isinstance(answer, AsyncGenerator) else answer

    return create_answered


async def _begun(stream: AsyncGenerator[Any, None]) -> Any:
    """The same stream, or the error that it begins with; raises what it raises before its first event."""
    first = asyncio.ensure_future(_first_events(stream))
    try:
        await asyncio.wait({first}, timeout=WAIT_S)
        events = first.result() if first.done() else []
    except BaseException:
        await _end(first, stream)
        raise
    if events and isinstance(events[0], str) and events[0].startswith(_ERROR):
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse

        await stream.aclose()
        return ErrorResponse.model_validate(msgspec.json.decode(events[0].removeprefix("data: ").rstrip()))
    answer = _whole(first, stream)
    weakref.finalize(answer, first.cancel).atexit = False  # nobody may begin to read it
    return answer


async def _first_events(stream: AsyncGenerator[Any, None]) -> list[Any]:
    """The first event that needs the engine, and those before it."""
    events = []
    async for event in stream:
        events.append(event)
        if getattr(event, "type", None) not in _PREAMBLE:
            break
    return events


async def _whole(first: asyncio.Future[list[Any]], stream: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    try:
        for event in await asyncio.shield(first):  # a second cancellation must not meet it while it ends
            yield event
        async for event in stream:
            yield event
    finally:
        await _end(first, stream)


async def _end(first: asyncio.Future[list[Any]], stream: AsyncGenerator[Any, None]) -> None:
    """Goes on by itself if whoever waits for it is cancelled: a stream that still runs cannot be closed."""
    ending = asyncio.ensure_future(_end_whole(first, stream))
    _ending.add(ending)
    ending.add_done_callback(_ending.discard)
    await asyncio.shield(ending)


async def _end_whole(first: asyncio.Future[list[Any]], stream: AsyncGenerator[Any, None]) -> None:
    if not first.done():
        first.cancel()
        await asyncio.wait({first})  # however it ends
        if not first.cancelled():
            first.exception()  # read, or asyncio reports it as lost
    await stream.aclose()
