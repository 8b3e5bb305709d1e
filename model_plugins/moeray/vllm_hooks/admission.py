"""Admission: a request takes its place before vLLM's handler begins the response, and gives it back when it has ended.

vLLM calls `AsyncLLM.generate` after rendering and before the first byte of the response, and consumes what it returns
later. The place is therefore taken in the call, and given back when the stream ends, is thrown away unread, or when its
client reads nothing of it for too long: the servers then wait with the next output, which is not asked for.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol, TypeVar

from vllm.exceptions import GracefulHTTPError
from vllm.sampling_params import SamplingParams

T = TypeVar("T")


class Overloaded(GracefulHTTPError):
    """More work than can be done in time: HTTP 429, gRPC RESOURCE_EXHAUSTED.

    Attributes:
        retry_after_s: when another try is worth it.
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message, HTTPStatus.TOO_MANY_REQUESTS)
        self.retry_after_s = retry_after_s


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
        request_id: the client's or vLLM's, as the engine-core request carries it in `external_req_id`.
        num_prompt: tokens.
        num_answer: tokens, at most, of each sequence.
        num_sequences: answers wanted (n).
        priority: lower goes first.
    """

    request_id: str
    num_prompt: int
    num_answer: int
    num_sequences: int = 1
    priority: int = 0

    @property
    def num_tokens(self) -> int:
        """KV that all its sequences fill; they may run on different shards and then share no prompt."""
        return self.num_sequences * (self.num_prompt + self.num_answer)


class Place(Protocol):
    """An admitted request's share of what there is.

    Attributes:
        max_unread_s: its client loses it when it has read nothing for so long.
    """

    @property
    def max_unread_s(self) -> float: ...

    def leave(self) -> None:
        """Give it back; idempotent."""
        ...


def need_of(request_id: str, prompt: Any, params: Any, priority: int) -> Need:
    """Of a rendered prompt (or an EngineCoreRequest) and its parameters."""
    tokens = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else getattr(prompt, "prompt_token_ids", None)
    sampling = params if isinstance(params, SamplingParams) else None
    num_answer, num_sequences = (sampling.max_tokens or 0, sampling.n) if sampling is not None else (0, 1)
    return Need(request_id, len(tokens or ()), num_answer, num_sequences, priority)


def keep_place(place: Place, outputs: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """`outputs`, after which (read, closed or never begun) the place is given back."""
    stream = _until_left(place, outputs)
    weakref.finalize(stream, place.leave).atexit = False  # a generator that was never begun runs no `finally`
    return stream


async def _until_left(place: Place, outputs: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    reader = _Reader(place, outputs)
    try:
        async with aclosing(outputs), aclosing(reader):  # closing ours must reach vLLM's, which then aborts the request
            async for output in outputs:
                reader.wait()
                yield output
                reader.came()
    finally:
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
            await self._ending

    def _look(self) -> None:
        now = self._loop.time()
        left_s = self._place.max_unread_s - (now - self._since if self._since is not None else 0.0)
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look)
            return
        self._place.leave()
        self._ending = self._loop.create_task(self._outputs.aclose())  # nobody asks it for an output meanwhile
