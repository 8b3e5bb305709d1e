"""What a client of /v1/messages is told when its request is refused, and what the log says of it."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.anthropic import api_router
from vllm.exceptions import VLLMValidationError

from moeray.vllm_hooks import anthropic_errors
from moeray.vllm_hooks.admission import Overloaded, Refused
from moeray.vllm_hooks.anthropic_errors import told

ASK = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "?"}]}
PATHS = ["/v1/messages", "/v1/messages/count_tokens"]


def client(error: Exception) -> TestClient:
    async def fail(*_: Any) -> Any:
        raise error

    anthropic_errors.install()
    app = FastAPI()
    api_router.attach_router(app)
    app.state.anthropic_serving_messages = SimpleNamespace(create_messages=told(fail), count_tokens=told(fail))
    app.state.enable_server_load_tracking = False
    return TestClient(app)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return caplog


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("error", "status", "kind", "retry_after"),
    [
        (Overloaded("too much", 7), 429, "rate_limit_error", "7"),
        (Refused("none", HTTPStatus.SERVICE_UNAVAILABLE, retry_after_s=1), 503, "overloaded_error", "1"),
        (Refused("not yours", HTTPStatus.FORBIDDEN), 403, "permission_error", None),
        (VLLMValidationError("top_p is wrong"), 400, "invalid_request_error", None),
    ],
)
def test_a_refusal_has_anthropics_form_and_retry_after_and_no_traceback_in_the_log(
    logged: pytest.LogCaptureFixture, path: str, error: Exception, status: int, kind: str, retry_after: str | None
) -> None:
    answer = client(error).post(path, json=ASK)

    assert (answer.status_code, answer.headers.get("retry-after")) == (status, retry_after)
    assert answer.json() == {"type": "error", "error": {"type": kind, "message": str(error)}}
    assert [record for record in logged.records if record.exc_info] == []


def test_an_error_of_the_server_keeps_its_traceback_in_the_log(logged: pytest.LogCaptureFixture) -> None:
    answer = client(RuntimeError("broken")).post(PATHS[0], json=ASK)

    assert answer.status_code == 500 and answer.json()["error"]["type"] == "api_error"
    assert any(record.exc_info for record in logged.records)


def test_what_a_handler_gives_passes_as_it_is() -> None:
    async def create(request: str) -> str:
        return request.upper()

    assert asyncio.run(told(create)("a")) == "A"


def test_touch_point_anthropics_routes_translate_what_their_handlers_return() -> None:
    for route in (api_router.create_messages, api_router.count_tokens):
        source = inspect.getsource(inspect.unwrap(route))
        assert "isinstance(generator, ErrorResponse)" in source or "isinstance(response, ErrorResponse)" in source
        assert "return translate_error_response(" in source
    answer = anthropic_errors.anthropic_answer(anthropic_errors.create_error_response("no"))
    assert json.loads(bytes(answer.body))["type"] == "error"
