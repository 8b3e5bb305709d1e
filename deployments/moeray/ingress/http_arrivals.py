"""HTTP requests at the door: counted, named, refused once the ingress has stopped taking them. Plain ASGI."""

from __future__ import annotations

from uuid import uuid4

from moeray.ingress.arrivals import Arrival, Arrivals, checked_request_id
from moeray.ingress.asgi import App, Message, Receive, Scope, Send, answer_json
from moeray.ingress.errors import REQUEST_ID
from moeray.vllm_hooks.admission import Refused
from moeray.vllm_hooks.openai_app import SERVED_PATHS, refusal

ALIVE_PATHS = ("/health", "/healthz", "/livez")
READY_PATHS = ("/ready", "/readyz")
PROBE_PATHS = frozenset({*ALIVE_PATHS, *READY_PATHS})
BATCH_PATHS = ("/v1/batches", "/v1/files")
GIVEN_UP = "499"
"""Of a request whose client went before it was answered at all, as web servers count it."""


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
        arrival = Arrival("http", _endpoint(scope["path"]), GIVEN_UP)
        if scope["path"] in PROBE_PATHS:
            await self._answer(self._probed, scope, receive, send, arrival)
            return
        with self._arrivals.counted(arrival):
            await self._answer(self._taking, scope, receive, send, arrival)

    async def _answer(self, app: App, scope: Scope, receive: Receive, send: Send, arrival: Arrival) -> None:
        request_id = uuid4().hex
        try:
            if (given := _given_id(scope)) is not None:
                request_id = checked_request_id(given)
            await app(scope, receive, self._named(send, request_id, arrival))
        except Refused as error:
            told = self._named(send, request_id, arrival)
            await answer_json(told, error.http_status, refusal(error), retry_after_s=error.retry_after_s)

    async def _taking(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._arrivals.taken():
            await self._app(scope, receive, send)

    def _named(self, send: Send, request_id: str, arrival: Arrival) -> Send:
        """`send` that puts the request's name on the answer, and ends the connection if the ingress leaves."""

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                arrival.code = str(message["status"])
                added = [(REQUEST_ID.encode(), request_id.encode())]
                if self._arrivals.is_leaving:
                    added.append((b"connection", b"close"))
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        return send_named


def _endpoint(path: str) -> str:
    """A path that is served, without the ids in it; there are endless others."""
    if path in SERVED_PATHS:
        return path
    return next((each for each in BATCH_PATHS if path == each or path.startswith(f"{each}/")), "(other)")


def _given_id(scope: Scope) -> str | None:
    name = REQUEST_ID.encode()
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)
