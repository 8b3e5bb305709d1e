"""`/v1/files` and `/v1/batches`, as OpenAI's SDKs call them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import msgspec
from fastapi import APIRouter, FastAPI, Form, Request, UploadFile
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field
from vllm.exceptions import VLLMNotFoundError, VLLMValidationError

from moeray.ingress.batches.objects import WINDOW_S, Batch
from moeray.ingress.batches.requests import ENDPOINTS
from moeray.ingress.batches.runner import Answer, Ask
from moeray.ingress.batches.store import BatchStore, NotStored, TooLarge, new_batch_id
from moeray.vllm_hooks.admission import Refused
from moeray.vllm_hooks.openai_app import refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from moeray.config import BatchConfig

OWNER = "tenant"
"""In a request's `state`: whose it is."""
MAX_PAGE = 100


class BatchAsked(BaseModel):
    """Body of POST /v1/batches."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None


def batch_routes(store: BatchStore, limits: BatchConfig, wake: Callable[[], None]) -> APIRouter:
    """Routes over the store; `wake` is called for every new batch."""
    routes = APIRouter(prefix="/v1")

    @routes.post("/files")
    def upload(request: Request, file: UploadFile, purpose: Annotated[str, Form()]) -> dict[str, Any]:
        if purpose != "batch":
            raise VLLMValidationError("purpose must be batch", parameter="purpose", value=purpose)
        name, owner = file.filename or "", owner_of(request)
        try:
            added = store.add_file(
                file.file, filename=name, purpose=purpose, owner=owner, max_bytes=limits.max_file_bytes,
                max_stored_bytes=limits.max_stored_bytes,
            )  # fmt: skip
        except TooLarge as error:
            message = f"{error} (ingress.batches.max_file_bytes and max_stored_bytes); delete files that are not needed"
            raise VLLMValidationError(message, parameter="file") from error
        return added.shown()

    @routes.get("/files")
    def files(request: Request, after: str = "", limit: int = MAX_PAGE) -> dict[str, Any]:
        return _page([stored.shown() for stored in store.files(owner_of(request))], after, limit)

    @routes.get("/files/{id}")
    def file(request: Request, id: str) -> dict[str, Any]:
        with _found("file"):
            return store.file(id, owner_of(request)).shown()

    @routes.get("/files/{id}/content")
    def content(request: Request, id: str) -> FileResponse:
        with _found("file"):
            stored = store.file(id, owner_of(request))
        return FileResponse(store.content(id), media_type="application/octet-stream", filename=stored.filename)

    @routes.delete("/files/{id}")
    def delete(request: Request, id: str) -> dict[str, Any]:
        with _found("file"):
            store.delete_file(id, owner_of(request))
        return {"id": id, "object": "file", "deleted": True}

    @routes.post("/batches")
    def create(request: Request, asked: BatchAsked) -> dict[str, Any]:
        if asked.endpoint not in ENDPOINTS:
            message = f"endpoint must be one of {', '.join(ENDPOINTS)}"
            raise VLLMValidationError(message, parameter="endpoint", value=asked.endpoint)
        if asked.completion_window != "24h":
            message = "completion_window must be 24h"
            raise VLLMValidationError(message, parameter="completion_window", value=asked.completion_window)
        with _found("input_file_id"):
            store.file(asked.input_file_id, owner_of(request))
        now = int(time.time())
        batch = store.put(
            Batch(
                id=new_batch_id(),
                endpoint=asked.endpoint,
                input_file_id=asked.input_file_id,
                created_at=now,
                expires_at=now + WINDOW_S,
                owner=owner_of(request),
                metadata=asked.metadata,
            )
        )
        wake()
        return batch.shown()

    @routes.get("/batches")
    def batches(request: Request, after: str = "", limit: int = 20) -> dict[str, Any]:
        return _page([batch.shown() for batch in store.batches(owner_of(request))], after, limit)

    @routes.get("/batches/{id}")
    def batch(request: Request, id: str) -> dict[str, Any]:
        with _found("batch"):
            return store.batch(id, owner_of(request)).shown()

    @routes.post("/batches/{id}/cancel")
    def cancel(request: Request, id: str) -> dict[str, Any]:
        with _found("batch"):
            if store.batch(id, owner_of(request)).has_ended:
                raise VLLMValidationError("the batch has ended already", parameter="batch_id", value=id)
            store.cancel(id)
            return store.batch(id).shown()

    return routes


def owner_of(request: Request) -> str:
    """The tenant whose request this is; "" where nobody is asked who he is."""
    return str(getattr(request.state, OWNER, ""))


def asks(app: FastAPI, as_owner: Callable[[str], AbstractContextManager[None]] | None = None) -> Ask:
    """Requests to this application without a socket, as from a client of that tenant.

    Args:
        as_owner: what is done inside is that tenant's; Refused when there is no such tenant any more.
    """

    async def ask(url: str, body: dict[str, Any], owner: str) -> Answer:
        try:
            owned = nullcontext() if as_owner is None else as_owner(owner)
        except Refused as error:
            return Answer(int(error.http_status), refusal(error))

        async def own_app(scope: Any, receive: Any, send: Any) -> None:
            with owned:
                await app({**scope, "state": {OWNER: owner}}, receive, send)

        transport = httpx.ASGITransport(own_app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://batch") as client:
            answer = await client.post(url, content=msgspec.json.encode(body), headers=_JSON, timeout=None)
        try:
            content = answer.json()
        except json.JSONDecodeError:
            content = {"error": {"message": answer.text, "type": "InternalServerError", "code": answer.status_code}}
        return Answer(answer.status_code, content, float(answer.headers.get("retry-after", 0)))

    return ask


_JSON = {"content-type": "application/json"}


@contextmanager
def _found(what: str) -> Iterator[None]:
    """Turns NotStored into 404."""
    try:
        yield
    except NotStored as error:
        raise VLLMNotFoundError(f"no {what} of yours has the id {error}") from error


def _page(shown: list[dict[str, Any]], after: str, limit: int) -> dict[str, Any]:
    """OpenAI's list object: those after this id."""
    if not 1 <= limit <= MAX_PAGE:
        raise VLLMValidationError(f"limit must be 1 to {MAX_PAGE}", parameter="limit", value=limit)
    ids = [each["id"] for each in shown]
    if after and after not in ids:
        raise VLLMValidationError("nothing of yours has this id", parameter="after", value=after)
    left = shown[ids.index(after) + 1 :] if after else shown
    page = left[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(left) > limit,
    }
