"""gRPC calls at the door: counted and named. A server that stops takes none by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias
from uuid import uuid4

import grpc

from moeray.ingress.arrivals import Arrivals, checked_request_id
from moeray.ingress.errors import REQUEST_ID, abort
from moeray.vllm_hooks.admission import Refused
from moeray.vllm_hooks.openai_app import refusal

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class GrpcArrivals(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Stands before everything else that looks at a call of `service`, which has no client streams."""

    def __init__(self, service: str, arrivals: Arrivals) -> None:
        self._prefix, self._arrivals = f"/{service}/", arrivals

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        details: grpc.HandlerCallDetails,
    ) -> Handler | None:  # fmt: skip
        handler = await continuation(details)
        if handler is None or not details.method.startswith(self._prefix):
            return handler
        serializers = (handler.request_deserializer, handler.response_serializer)
        made: Handler
        if handler.response_streaming:
            made = grpc.unary_stream_rpc_method_handler(self._streaming(handler.unary_stream), *serializers)
        else:
            made = grpc.unary_unary_rpc_method_handler(self._unary(handler.unary_unary), *serializers)
        return made

    def _unary(self, behaviour: Callable[[Any, Context], Awaitable[Any]]) -> Callable[[Any, Context], Awaitable[Any]]:
        async def counted(request: Any, context: Context) -> Any:
            await _name(context)
            with self._arrivals.taken():
                return await behaviour(request, context)

        return counted

    def _streaming(
        self, behaviour: Callable[[Any, Context], AsyncIterator[Any]]
    ) -> Callable[[Any, Context], AsyncIterator[Any]]:
        async def counted(request: Any, context: Context) -> AsyncIterator[Any]:
            await _name(context)
            with self._arrivals.taken():
                async for message in behaviour(request, context):
                    yield message

        return counted


def given_id(context: Context) -> str | None:
    """What the client calls this call, None if nothing."""
    return next((value for name, value in context.invocation_metadata() or () if name == REQUEST_ID), None)


async def _name(context: Context) -> None:
    """Every answer carries the call's name, in its trailing metadata: sent first, it would forbid the client's gRPC to
    try again by itself.
    """
    try:
        given = given_id(context)
        context.set_trailing_metadata(((REQUEST_ID, uuid4().hex if given is None else checked_request_id(given)),))
    except Refused as error:
        await abort(context, refusal(error)["error"])
