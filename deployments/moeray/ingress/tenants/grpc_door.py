"""gRPC: no method but health checks without a tenant."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from grpc_health.v1 import health

from moeray.ingress.errors import abort
from moeray.ingress.grpc_calls import AroundCalls, Context, Handler
from moeray.vllm_hooks.admission import Refused
from moeray.vllm_hooks.openai_app import refusal

if TYPE_CHECKING:
    from moeray.ingress.tenants.call import Call
    from moeray.ingress.tenants.tenants import Tenants

PUBLIC_SERVICE = f"/{health.SERVICE_NAME}/"
_PEER_NAMES = ("x509_subject_alternative_name", "x509_common_name")


class GrpcDoor(AroundCalls):
    """Runs each call as its tenant's."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants

    def is_for(self, method: str, _: Handler) -> bool:
        return not method.startswith(PUBLIC_SERVICE)

    @asynccontextmanager
    async def around(self, method: str, request: Any, context: Context) -> AsyncIterator[None]:
        call = await self._call(context)
        with call.handled():
            yield
            _tell_limits(call, context)

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
