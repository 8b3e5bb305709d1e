"""Refusals of /v1/messages: in Anthropic's form, with Retry-After, and without a traceback in the log for each.

vLLM's routes catch whatever a handler raises, log it as an error of the server with its traceback, and drop all but its
message. A handler that is `told` returns what is no fault of the server; `install` gives the routes our translation of
it. Touch points: `create_messages`, `count_tokens` and `translate_error_response` of vLLM's Anthropic router.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from pydantic import PrivateAttr
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from moeray.vllm_hooks.admission import Refused

if TYPE_CHECKING:
    from fastapi.responses import JSONResponse

_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
}
"""Anthropic's names; other statuses below 500 are `invalid_request_error`, others `api_error`."""


class Told(ErrorResponse):
    """What vLLM's route is given instead of an exception."""

    _retry_after_s: int | None = PrivateAttr(default=None)


def told(create: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """`create`, one of the Anthropic handlers, which returns the errors that are no fault of the server."""

    async def create_told(*args: Any, **kwargs: Any) -> Any:
        try:
            return await create(*args, **kwargs)
        except Exception as error:
            answer = create_error_response(error)
            if answer.error.code >= HTTPStatus.INTERNAL_SERVER_ERROR and not isinstance(error, Refused):
                raise
            made = Told(error=answer.error)
            made._retry_after_s = error.retry_after_s if isinstance(error, Refused) else None
            return made

    return create_told


def install() -> None:
    """Give vLLM's Anthropic routes `anthropic_answer`; idempotent."""
    from vllm.entrypoints.anthropic import api_router

    api_router.translate_error_response = anthropic_answer


def anthropic_answer(response: ErrorResponse) -> JSONResponse:
    """An error as Anthropic's API gives it."""
    from fastapi.responses import JSONResponse

    retry_after_s = response._retry_after_s if isinstance(response, Told) else None
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    status = response.error.code
    kind = _TYPES.get(HTTPStatus(status)) or (
        "api_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    )
    body = {"type": "error", "error": {"type": kind, "message": response.error.message}}
    return JSONResponse(body, status_code=status, headers=headers)
