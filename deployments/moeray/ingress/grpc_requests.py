"""gRPC: bytes that are no message of their method are INVALID_ARGUMENT; gRPC calls them UNKNOWN and fills the log."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from inspect import iscoroutinefunction
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from moeray.ingress.errors import abort

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

_ERROR = {"message": "the request is no message of this method's type, or nests too deep", "param": None, "code": 400}


class _Unreadable:
    """Takes the place of a request; the call is ended before anybody reads it."""


class ReadableRequests(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """The innermost: who may not ask learns nothing of what he sent."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        details: grpc.HandlerCallDetails,
    ) -> Handler | None:  # fmt: skip
        handler = await continuation(details)
        if handler is None or handler.request_streaming:
            return handler
        read = _reading(handler.request_deserializer)
        if handler.response_streaming:
            behaviour: Any = handler.unary_stream
            # gRPC knows two kinds: generators, and coroutines that write (`Watch` of the health service).
            guarded: Any = _unary(behaviour) if iscoroutinefunction(behaviour) else _streaming(behaviour)
            made: Handler = grpc.unary_stream_rpc_method_handler(guarded, read, handler.response_serializer)
        else:
            made = grpc.unary_unary_rpc_method_handler(_unary(handler.unary_unary), read, handler.response_serializer)
        return made


def _reading(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Unreadable()

    return read


def _unary(behaviour: Callable[[Any, Context], Awaitable[Any]]) -> Callable[[Any, Context], Awaitable[Any]]:
    async def answer(request: Any, context: Context) -> Any:
        if isinstance(request, _Unreadable):
            await abort(context, _ERROR)
        return await behaviour(request, context)

    return answer


def _streaming(behaviour: Callable[[Any, Context], AsyncIterator[Any]]) -> Callable[[Any, Context], AsyncIterator[Any]]:
    async def answer(request: Any, context: Context) -> AsyncIterator[Any]:
        if isinstance(request, _Unreadable):
            await abort(context, _ERROR)
        async for message in behaviour(request, context):
            yield message

    return answer
