"""gRPC: what a call's message may be. Bytes that are no message of their method are INVALID_ARGUMENT (gRPC calls them
UNKNOWN and fills the log), and the messages of all calls in hand have a bound together.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from moeray.ingress.body_shape import MAX_OBJECTS, message_excess
from moeray.ingress.errors import abort
from moeray.ingress.grpc_calls import AroundCalls, Context, Handler

_UNREADABLE = {
    "message": "the request is no message of this method's type, or nests too deep",
    "param": None,
    "code": 400,
}


@dataclass(frozen=True, slots=True)
class _Refused:
    """Takes the place of a request; the call is ended, with this error, before anybody reads it."""

    error: Mapping[str, Any]


class MessageBudget:
    """Bytes of the messages of calls in hand. A message counts from when it is whole until its call has ended, however
    it ends: its call's task says so.

    Args:
        max_bytes: `ingress.max_bodies_bytes`.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.held_bytes = 0

    def take(self, num_bytes: int) -> bool:
        """For the call of this task; False if it would be too much."""
        if self.held_bytes + num_bytes > self._max_bytes:
            return False
        self.held_bytes += num_bytes
        call = asyncio.current_task()
        assert call is not None
        call.add_done_callback(lambda _: self._give_back(num_bytes))
        return True

    def _give_back(self, num_bytes: int) -> None:
        self.held_bytes -= num_bytes

    @property
    def refusal(self) -> dict[str, Any]:
        text = f"the messages of all calls in hand exceed {self._max_bytes} bytes (ingress.max_bodies_bytes)"
        return {"message": text, "param": None, "code": 429}


class ReadableRequests(AroundCalls):
    """The innermost: who may not ask learns nothing of what he sent."""

    def __init__(self, budget: MessageBudget) -> None:
        self._budget = budget

    def is_for(self, _: str, handler: Handler) -> bool:
        return not handler.request_streaming

    def reading(self, deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        def read(data: bytes) -> Any:
            if not self._budget.take(len(data)):
                return _Refused(self._budget.refusal)
            try:
                request = deserialize(data)
            except DecodeError:
                return _Refused(_UNREADABLE)
            if len(data) > MAX_OBJECTS and (excess := message_excess(request)):  # each takes a byte at least
                return _Refused({"message": f"the request {excess}", "param": None, "code": 400})
            return request

        return read

    @asynccontextmanager
    async def around(self, _: str, request: Any, context: Context) -> AsyncIterator[None]:
        if isinstance(request, _Refused):
            await abort(context, request.error)
        yield
