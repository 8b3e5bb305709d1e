"""HTTP: nothing without a tenant. Plain ASGI, so that streams pass untouched. Probes are answered before it."""

from __future__ import annotations

from moeray.ingress.asgi import App, Message, Receive, Scope, Send, answer_json
from moeray.ingress.batches.api import OWNER
from moeray.ingress.certificates import TLS_PEER
from moeray.ingress.tenants.call import Call
from moeray.ingress.tenants.tenants import Tenants
from moeray.vllm_hooks.admission import Refused
from moeray.vllm_hooks.openai_app import refusal


class HttpDoor:
    """An ASGI application in front of another one."""

    def __init__(self, app: App, tenants: Tenants) -> None:
        self._app, self._tenants = app, tenants

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there is no WebSocket route; should there be one, it is not open by mistake
            await send({"type": "websocket.close", "code": 1008})
            return
        state = scope.setdefault("state", {})
        headers = ((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"])
        try:
            call = self._tenants.call(headers, state.get(TLS_PEER, ()), "http")
        except Refused as error:
            challenge = (b"www-authenticate", b"Bearer")
            await answer_json(send, error.http_status, refusal(error), challenge, retry_after_s=error.retry_after_s)
            return
        state[OWNER] = call.tenant.name
        with call.handled():
            await self._app(scope, receive, _with_limits(call, send))


def _with_limits(call: Call, send: Send) -> Send:
    async def send_with_limits(message: Message) -> None:
        if message["type"] == "http.response.start":
            limits = [(name.encode(), value.encode()) for name, value in call.rate_limits().items()]
            message["headers"] = [*message.get("headers", ()), *limits]
        await send(message)

    return send_with_limits
