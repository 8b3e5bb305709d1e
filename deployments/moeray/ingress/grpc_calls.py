"""What stands around gRPC calls: a context manager for each, whatever kind of call it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from inspect import iscoroutinefunction
from typing import Any, TypeAlias

import grpc

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class AroundCalls(grpc.aio.ServerInterceptor, ABC):  # type: ignore[misc]
    """Enters `around` before the call's behaviour begins, and leaves it after the last message or the error."""

    @abstractmethod
    def around(self, method: str, request: Any, context: Context) -> AbstractAsyncContextManager[None]: ...

    def is_for(self, method: str, handler: Handler) -> bool:
        """Whether calls of this method (/service/name) concern it."""
        return True

    def reading(self, deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        """What makes the request of its bytes."""
        return deserialize

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        details: grpc.HandlerCallDetails,
    ) -> Handler | None:  # fmt: skip
        handler = await continuation(details)
        if handler is None or not self.is_for(details.method, handler):
            return handler
        ends = (handler.request_streaming, handler.response_streaming)
        kind = "_".join("stream" if streaming else "unary" for streaming in ends)
        behaviour = getattr(handler, kind)
        # Streams are generators, or coroutines that write (`Watch` of the health service).
        yields = handler.response_streaming and not iscoroutinefunction(behaviour)
        wrapped = (self._yielding if yields else self._returning)(details.method, behaviour)
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        made: Handler = make(wrapped, self.reading(handler.request_deserializer), handler.response_serializer)
        return made

    def _returning(
        self, method: str, behaviour: Callable[[Any, Context], Awaitable[Any]]
    ) -> Callable[[Any, Context], Any]:
        async def answer(request: Any, context: Context) -> Any:
            async with self.around(method, request, context):
                return await behaviour(request, context)

        return answer

    def _yielding(
        self, method: str, behaviour: Callable[[Any, Context], AsyncIterator[Any]]
    ) -> Callable[[Any, Context], Any]:
        async def answer(request: Any, context: Context) -> AsyncIterator[Any]:
            async with self.around(method, request, context):
                async for message in behaviour(request, context):
                    yield message

        return answer
