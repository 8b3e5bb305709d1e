"""gRPC: no method but health checks without a tenant."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
from grpc_health.v1 import health

from moeray.ingress.errors import abort
from moeray.vllm_hooks.admission import Refused
from moeray.vllm_hooks.openai_app import refusal

if TYPE_CHECKING:
    from moeray.ingress.tenants.call import Call
    from moeray.ingress.tenants.tenants import Tenants

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

PUBLIC_SERVICE = f"/{health.SERVICE_NAME}/"
_PEER_NAMES = ("x509_subject_alternative_name", "x509_common_name")


class GrpcDoor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Runs each call as its tenant's."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        details: grpc.HandlerCallDetails,
    ) -> Handler | None:  # fmt: skip
        handler = await continuation(details)
        if handler is None or details.method.startswith(PUBLIC_SERVICE):
            return handler
        asks, answers = (
            "stream" if streaming else "unary" for streaming in (handler.request_streaming, handler.response_streaming)
        )
        kind = f"{asks}_{answers}"
        behaviour = getattr(handler, kind)
        guarded = self._streaming(behaviour) if handler.response_streaming else self._unary(behaviour)
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        made: Handler = make(guarded, handler.request_deserializer, handler.response_serializer)
        return made

    def _unary(self, behaviour: Callable[[Any, Context], Awaitable[Any]]) -> Callable[[Any, Context], Awaitable[Any]]:
        async def guarded(request: Any, context: Context) -> Any:
            call = await self._call(context)
            with call.handled():
                answer = await behaviour(request, context)
                _tell_limits(call, context)
                return answer

        return guarded

    def _streaming(
        self, behaviour: Callable[[Any, Context], AsyncIterator[Any]]
    ) -> Callable[[Any, Context], AsyncIterator[Any]]:
        async def guarded(request: Any, context: Context) -> AsyncIterator[Any]:
            call = await self._call(context)
            with call.handled():
                async for message in behaviour(request, context):
                    yield message
                _tell_limits(call, context)

        return guarded

    async def _call(self, context: Context) -> Call:
        headers = [(name, value) for name, value in context.invocation_metadata() or () if isinstance(value, str)]
        identity = context.auth_context()
        names = [name.decode() for key in _PEER_NAMES for name in identity.get(key, ())]
        try:
            return self._tenants.call(headers, names, "grpc")
        except Refused as error:
            await abort(context, refusal(error)["error"], error.retry_after_s)


def _tell_limits(call: Call, context: Context) -> None:
    if limits := call.rate_limits():
        context.set_trailing_metadata((*(context.trailing_metadata() or ()), *limits.items()))
