"""HTTP: how large and how slow a request's body may be; an ASGI application in front of another one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from moeray.config import IngressConfig
from moeray.ingress.asgi import App, Message, Receive, Scope, Send, answer_json
from moeray.ingress.body_shape import json_excess

UPLOAD_MARGIN_BYTES = 64 << 10
"""A form is so much larger than its file."""


class BadBody(Exception):
    """A body that is not taken, and the status of the answer."""

    def __init__(self, status: HTTPStatus, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after_s = status, message, retry_after_s


class HttpLimits:
    """Bounds of one ingress' request bodies.

    A form (a file of the batch API, which is spooled to disk) streams through; any other body is read whole first.
    """

    def __init__(self, app: App, limits: IngressConfig) -> None:
        self._app, self._limits = app, limits
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Of the bodies of requests in hand."""
        return self._held_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = _bodily(scope["headers"])
        if not headers:
            await self._app(scope, receive, send)
            return
        try:
            is_form = headers.get(b"content-type", b"").lower().startswith(b"multipart/")
            most = max(self._limits.max_body_bytes, self._form_bytes if is_form else 0)
            _check_head(headers, most)
            deadline = asyncio.get_running_loop().time() + self._limits.body_timeout_s
            if is_form:
                await self._stream(scope, receive, send, most, deadline)
                return
            with self._hold() as hold:
                chunks = [chunk async for chunk in self._chunks(receive, most, deadline, hold)]
                body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
                del chunks
                if excess := json_excess(body):
                    raise BadBody(HTTPStatus.BAD_REQUEST, f"the body {excess}")
                await self._app(scope, _replay(body, receive), send)
        except ConnectionResetError:
            return
        except BadBody as error:
            await refuse(error, send)

    @property
    def _form_bytes(self) -> int:
        batches = self._limits.batches
        return batches.max_file_bytes + UPLOAD_MARGIN_BYTES if batches.directory else 0

    async def _chunks(self, receive: Receive, most: int, deadline: float, hold: Callable[[int], None]) -> Any:
        """The body as it comes.

        Raises:
            BadBody: too large, too slow, or too much beside other bodies.
            ConnectionResetError: its client has gone.
        """
        size, more = 0, True
        while more:
            message = await _in_time(receive, deadline, self._limits.body_timeout_s)
            if message["type"] == "http.disconnect":
                raise ConnectionResetError
            chunk: bytes = message.get("body", b"")
            more = message.get("more_body", False)
            size += len(chunk)
            if size > most:
                raise _too_large(most)
            hold(len(chunk))
            yield chunk

    @contextmanager
    def _hold(self) -> Iterator[Callable[[int], None]]:
        held = 0

        def hold(num_bytes: int) -> None:
            nonlocal held
            if self._held_bytes + num_bytes > self._limits.max_bodies_bytes:
                most = self._limits.max_bodies_bytes
                text = f"the bodies of all requests in hand exceed {most} bytes (ingress.max_bodies_bytes)"
                raise BadBody(HTTPStatus.SERVICE_UNAVAILABLE, text, retry_after_s=1)
            held += num_bytes
            self._held_bytes += num_bytes

        try:
            yield hold
        finally:
            self._held_bytes -= held

    async def _stream(self, scope: Scope, receive: Receive, send: Send, most: int, deadline: float) -> None:
        """Hand the chunks on; a refusal takes the place of the application's answer."""
        chunks = self._chunks(receive, most, deadline, lambda _: None)
        refused: BadBody | None = None

        async def next_chunk() -> Message:
            nonlocal refused
            try:
                return {"type": "http.request", "body": await anext(chunks), "more_body": True}
            except StopAsyncIteration:
                return {"type": "http.request", "body": b"", "more_body": False}
            except BadBody as error:
                refused = error
            except ConnectionResetError:
                pass
            return {"type": "http.disconnect"}

        async def send_unless_refused(message: Message) -> None:
            if refused is None:
                await send(message)

        try:
            await self._app(scope, next_chunk, send_unless_refused)
        except Exception:
            if refused is None:
                raise
        if refused is not None:
            raise refused


async def refuse(error: BadBody, send: Send) -> None:
    """Answer with OpenAI's error object."""
    kind = "ServiceUnavailable" if error.status >= 500 else "BadRequestError"
    content = {"error": {"message": error.message, "type": kind, "param": None, "code": int(error.status)}}
    headers = []
    if error.status == HTTPStatus.UNSUPPORTED_MEDIA_TYPE:
        headers.append((b"accept-encoding", b"identity"))
    if error.status == HTTPStatus.REQUEST_TIMEOUT:
        headers.append((b"connection", b"close"))
    await answer_json(send, error.status, content, *headers, retry_after_s=error.retry_after_s)


def _bodily(headers: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """What is said about the body; empty if there is none. HTTP gives it a length, or sends it in chunks."""
    said = {name: value for name, value in headers if name.startswith((b"content-", b"transfer-"))}
    return said if b"content-length" in said or b"transfer-encoding" in said else {}


def _check_head(headers: dict[bytes, bytes], most: int) -> None:
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding != b"identity":
        raise BadBody(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "content-encoding: only identity is taken")
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length[:20]) > most:
        raise _too_large(most)


def _too_large(most: int) -> BadBody:
    return BadBody(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body has more than {most} bytes (ingress.max_body_bytes)")


async def _in_time(receive: Receive, deadline: float, timeout_s: float) -> Message:
    try:
        async with asyncio.timeout_at(deadline):
            return await receive()
    except TimeoutError:
        text = f"the body was not complete after {timeout_s:g} s (ingress.body_timeout_s)"
        raise BadBody(HTTPStatus.REQUEST_TIMEOUT, text) from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one message, then what else comes (that the client has gone)."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay
