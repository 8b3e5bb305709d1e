"""Admission: a request takes its place before vLLM's handler begins the response, and gives it back when it has ended.

vLLM calls `AsyncLLM.generate` after rendering and before the first byte of the response, and consumes what it returns
later. The place is therefore taken in the call, and given back when the stream ends, is thrown away unread, or when its
client reads nothing of it for too long: the servers then wait with the next output, which is not asked for.

What must be awaited before a request may begin (`Place.begin`: a quota in another process) cannot be in that call. It
is the first step of the stream; where vLLM answers with a stream, `begun` awaits it before the response has a status.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol, TypeVar

from vllm.exceptions import GracefulHTTPError
from vllm.sampling_params import SamplingParams

T = TypeVar("T")


_PLACES: ContextVar[list[Place]] = ContextVar("places of the call that is being handled")
_PLACE: ContextVar[Place] = ContextVar("place of the request that goes to the pool")


class Refused(GracefulHTTPError):
    """A request that is not served, at least not now: an HTTP status, and gRPC's for it.

    Attributes:
        retry_after_s: when another try is worth it; None if never.
        parameter: field of the request that is to blame, None if none is.
    """

    def __init__(
        self, message: str, status: HTTPStatus, *, retry_after_s: int | None = None, parameter: str | None = None
    ) -> None:
        super().__init__(message, status)
        self.retry_after_s, self.parameter = retry_after_s, parameter


class Overloaded(Refused):
    """More work than can be done in time: HTTP 429, gRPC RESOURCE_EXHAUSTED."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message, HTTPStatus.TOO_MANY_REQUESTS, retry_after_s=retry_after_s)


class NotRead(GracefulHTTPError):
    """A client did not read its stream: HTTP 408, gRPC DEADLINE_EXCEEDED, should it ever read on."""

    def __init__(self, unread_s: float) -> None:
        super().__init__(
            f"nothing of this stream was read for {unread_s:g} s (ingress.max_wait_s)", HTTPStatus.REQUEST_TIMEOUT
        )


@dataclass(frozen=True, slots=True)
class Need:
    """What a request asks for.

    Attributes:
        request_id: the client's or vLLM's; other clients may call theirs the same.
        num_prompt: tokens.
        num_answer: tokens, at most, of each sequence.
        num_sequences: answers wanted (n).
        priority: lower goes first.
        cache_salt: what divides the prefix cache; None: nothing does.
    """

    request_id: str
    num_prompt: int
    num_answer: int
    num_sequences: int = 1
    priority: int = 0
    cache_salt: str | None = None

    @property
    def num_tokens(self) -> int:
        """KV that all its sequences fill; they may run on different shards and then share no prompt."""
        return self.num_sequences * (self.num_prompt + self.num_answer)

    @property
    def num_charged(self) -> int:
        """What its client is charged at most: the prompt counts once."""
        return self.num_prompt + self.num_sequences * self.num_answer


class Place(Protocol):
    """An admitted request's share of what there is.

    Attributes:
        need: as it was admitted: priority and cache salt are those to run it with.
        max_unread_s: its client loses it when it has read nothing for so long.
    """

    @property
    def need(self) -> Need: ...

    @property
    def max_unread_s(self) -> float: ...

    async def begin(self) -> None:
        """Awaited before the request goes to the pool, perhaps more than once; raises Refused if it may not."""
        ...

    def answered(self) -> None:
        """Tokens have come for it, or for one of its sequences; told of each."""
        ...

    def leave(self, error: BaseException | None = None) -> None:
        """Give it back; idempotent. `error` is what ended it, None if nothing did, or nobody began it."""
        ...


def need_of(request_id: str, prompt: Any, params: Any, priority: int) -> Need:
    """Of a rendered prompt (or an EngineCoreRequest) and its parameters."""
    tokens = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else getattr(prompt, "prompt_token_ids", None)
    sampling = params if isinstance(params, SamplingParams) else None
    num_answer, num_sequences = (sampling.max_tokens or 0, sampling.n) if sampling is not None else (0, 1)
    salt = prompt.get("cache_salt") if isinstance(prompt, dict) else None
    return Need(request_id, len(tokens or ()), num_answer, num_sequences, priority, salt)


def with_salt(prompt: Any, salt: str | None) -> Any:
    """The rendered prompt with this `cache_salt`."""
    if salt is None:
        return prompt
    if not isinstance(prompt, dict):
        raise TypeError(f"a prompt that is no rendered one cannot be kept apart: {type(prompt).__name__}")
    return {**prompt, "cache_salt": salt}


def place_being_filled() -> Place | None:
    """In `RequestPool.add`: the place that this request (n > 1: one of its sequences) was admitted to."""
    return _PLACE.get(None)


def begun(create: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """`create`, one of vLLM's handlers: what it returns as a stream has begun, or the refusal is raised."""

    async def create_begun(*args: Any, **kwargs: Any) -> T:
        places: list[Place] = []
        token = _PLACES.set(places)
        try:
            answer = await create(*args, **kwargs)
        finally:
            _PLACES.reset(token)
        if isinstance(answer, AsyncGenerator):
            try:
                for place in places:
                    await place.begin()
            except BaseException as error:
                for place in places:
                    place.leave(error)
                raise
        return answer

    return create_begun


def keep_place(place: Place, outputs: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """`outputs`, after which (read, closed or never begun) the place is given back."""
    if (places := _PLACES.get(None)) is not None:
        places.append(place)
    stream = _until_left(place, outputs)
    weakref.finalize(stream, place.leave).atexit = False  # a generator that was never begun runs no `finally`
    return stream


async def _until_left(place: Place, outputs: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    try:
        await place.begin()
        _PLACE.set(place)  # vLLM adds the request in the first step, in this task
        reader = _Reader(place, outputs)
        async with aclosing(outputs), aclosing(reader):  # closing ours must reach vLLM's, which then aborts the request
            async for output in outputs:
                reader.wait()
                yield output
                reader.came()
    except BaseException as error:
        place.leave(error)
        raise
    place.leave()


class _Reader:
    """Who takes the outputs, watched while one is on its way to it; one timer for the whole stream."""

    def __init__(self, place: Place, outputs: AsyncGenerator[Any, None]) -> None:
        self._place, self._outputs = place, outputs
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None
        self._ending: asyncio.Task[None] | None = None
        self._timer = self._loop.call_later(place.max_unread_s, self._look)

    def wait(self) -> None:
        """An output is handed out now."""
        self._since = self._loop.time()

    def came(self) -> None:
        """The next one is asked for.

        Raises:
            NotRead: too late.
        """
        self._since = None
        if self._ending is not None:
            raise NotRead(self._place.max_unread_s)

    async def aclose(self) -> None:
        """It has ended, or the client is gone; idempotent."""
        self._timer.cancel()
        if self._ending is not None:
            await asyncio.shield(self._ending)  # it tells the pool, whatever becomes of who waits here

    def _look(self) -> None:
        now = self._loop.time()
        left_s = self._place.max_unread_s - (now - self._since if self._since is not None else 0.0)
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look)
            return
        self._place.leave(NotRead(self._place.max_unread_s))
        self._ending = self._loop.create_task(self._outputs.aclose())  # nobody asks it for an output meanwhile
