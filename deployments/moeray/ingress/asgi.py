"""Plain ASGI: the names of its parts, and an answer of JSON."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


async def answer_json(
    send: Send, status: int, content: Any, *headers: tuple[bytes, bytes], retry_after_s: float | None = None
) -> None:
    """The whole answer.

    Args:
        retry_after_s: when another try is worth it; None says nothing of it.
    """
    body = msgspec.json.encode(content)
    told = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    if retry_after_s is not None:
        told.append((b"retry-after", str(retry_after_s).encode()))
    await send({"type": "http.response.start", "status": int(status), "headers": told})
    await send({"type": "http.response.body", "body": body})
