"""HTTP requests at the door: counted, named, refused once the ingress has stopped taking them. Plain ASGI."""

from __future__ import annotations

from uuid import uuid4

from moeray.ingress.arrivals import Arrivals, checked_request_id
from moeray.ingress.asgi import App, Message, Receive, Scope, Send, answer_json
from moeray.ingress.errors import REQUEST_ID
from moeray.vllm_hooks.admission import Refused
from moeray.vllm_hooks.openai_app import refusal

ALIVE_PATHS = ("/health", "/healthz", "/livez")
READY_PATHS = ("/ready", "/readyz")
PROBE_PATHS = frozenset({*ALIVE_PATHS, *READY_PATHS})


class HttpArrivals:
    """Stands before everything else that looks at a request.

    Args:
        app: answers requests.
        probed: answers those of PROBE_PATHS, which need no credential and never wait for anybody.
    """

    def __init__(self, app: App, probed: App, arrivals: Arrivals) -> None:
        self._app, self._probed, self._arrivals = app, probed, arrivals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid4().hex
        try:
            if (given := _given_id(scope)) is not None:
                request_id = checked_request_id(given)
            named = self._named(send, request_id)
            if scope["path"] in PROBE_PATHS:
                await self._probed(scope, receive, named)
                return
            with self._arrivals.taken():
                await self._app(scope, receive, named)
        except Refused as error:
            told = self._named(send, request_id)
            await answer_json(told, error.http_status, refusal(error), retry_after_s=error.retry_after_s)

    def _named(self, send: Send, request_id: str) -> Send:
        """`send` that puts the request's name on the answer, and ends the connection if the ingress leaves."""

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(REQUEST_ID.encode(), request_id.encode())]
                if self._arrivals.is_leaving:
                    added.append((b"connection", b"close"))
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        return send_named


def _given_id(scope: Scope) -> str | None:
    name = REQUEST_ID.encode()
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)
