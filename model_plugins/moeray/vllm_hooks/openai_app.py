"""vLLM's OpenAI application over a front, with only the routes that mean something behind a pool of shards.

vLLM's own serving handlers render, parse and answer; HTTP and gRPC both call the ones returned here, each behind the
same check of the request (`request_check`). Touch points: `build_app`, `init_app_state`, the names of the handlers on
`app.state`, and the argument namespace of `vllm serve`.
"""

from __future__ import annotations

import logging
import traceback
from argparse import Namespace
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from vllm.exceptions import VLLMValidationError

from moeray.vllm_hooks import anthropic_errors
from moeray.vllm_hooks.admission import Refused, begun
from moeray.vllm_hooks.anthropic_errors import anthropic_answer, told
from moeray.vllm_hooks.engine_core import FrontLLM
from moeray.vllm_hooks.error_fields import clean_path, field_of, misshapen
from moeray.vllm_hooks.first_event import answered
from moeray.vllm_hooks.request_check import check_request

if TYPE_CHECKING:
    from fastapi import FastAPI, Request
    from vllm.engine.arg_utils import AsyncEngineArgs

    from moeray.vllm_hooks.served_model import Dialect

_NO_LOCAL_FILES = "allowed-local-media-path"
"""vLLM's word for a `file:` URL, which is a RuntimeError."""

TASKS: tuple[Literal["generate"]] = ("generate",)

SERVED_PATHS = frozenset(
    {
        "/v1/models",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/detokenize",
        "/version",
        "/metrics",
        "/openapi.json",
        "/docs",
    }
)
"""Everything else that vLLM mounts is left out: it steers one local engine (sleep, profile, elastic scaling, raw token
ids, KV hand-over) or another product's protocol, and would bypass the pool or the checks."""


@dataclass(frozen=True, slots=True)
class OpenAIApp:
    """vLLM's application and the handlers behind it.

    Attributes:
        chat: `create_chat_completion(request, raw_request)` of OpenAIServingChat, checked.
        completion: the same for completions.
        tokens: `create_tokenize(request, raw_request)` and `create_detokenize` of ServingTokenization, checked.
        models: OpenAIServingModels.
    """

    app: FastAPI
    chat: Any
    completion: Any
    tokens: Any
    models: Any


@contextmanager
def root_logger_kept() -> Iterator[None]:
    """Keep what may be logged: what vLLM imports for SageMaker lets nobody in the process warn any more."""
    root = logging.getLogger()
    known: list[logging.Logger | logging.Handler] = [root, *root.handlers]
    levels = [(each, each.level) for each in known]
    try:
        yield
    finally:
        for each, level in levels:
            each.setLevel(level)


async def build_openai_app(front: FrontLLM, engine_args: AsyncEngineArgs, *, dialect: Dialect) -> OpenAIApp:
    """Assemble vLLM's application for `front`.

    Args:
        engine_args: what the front was built from; model and served name are read from it.
        dialect: the parsers of tool calls and thoughts, and the roles that a chat may have.
    """
    from fastapi.exceptions import RequestValidationError
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.serve.exception_handling.handlers.http import http_exception_handler

    arguments = _serve_arguments(engine_args, dialect)
    with root_logger_kept():
        app = build_app(arguments, TASKS, front.model_config)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in SERVED_PATHS]
    app.exception_handler(Refused)(_refuse)
    app.exception_handler(RequestValidationError)(_explain)
    for kind in (AttributeError, LookupError, TypeError):
        app.exception_handler(kind)(_refuse_body)
    for status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):  # vLLM has it for other errors
        app.exception_handler(int(status))(http_exception_handler)
    app.router.redirect_slashes = False  # a redirect goes to whatever host the client has named
    app.middleware_stack = None  # vLLM's bootstrap has built it already, without our handlers
    # /v1/models shows it as `root`: a path of ours is nobody's business.
    arguments.model = (arguments.served_model_name or [arguments.model])[0]
    await init_app_state(front, app.state, arguments, TASKS)
    state, roles = app.state, dialect.roles
    for handler, method in (
        (state.openai_serving_chat, "create_chat_completion"),
        (state.openai_serving_completion, "create_completion"),
        (state.openai_serving_responses, "create_responses"),
        # What `create_messages` asks: it makes a chat of the messages.
        (state.anthropic_serving_messages, "create_chat_completion"),
    ):
        setattr(handler, method, _named(answered(begun(_checked(getattr(handler, method), roles)))))
    for handler, method in (
        (state.serving_tokenization, "create_tokenize"),
        (state.serving_tokenization, "create_detokenize"),
    ):
        setattr(handler, method, _named(_checked(getattr(handler, method), roles)))
    messages = state.anthropic_serving_messages
    for method in ("create_messages", "count_tokens"):
        setattr(messages, method, told(_named(_checked(getattr(messages, method), roles))))
    anthropic_errors.install()
    return OpenAIApp(
        app,
        state.openai_serving_chat,
        state.openai_serving_completion,
        state.serving_tokenization,
        state.openai_serving_models,
    )


def _serve_arguments(engine_args: AsyncEngineArgs, dialect: Dialect) -> Namespace:
    """The namespace of `vllm serve` with its own defaults, for this model."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    line = ["--model", str(engine_args.model), "--disable-log-stats", "--enable-prompt-tokens-details"]
    if engine_args.served_model_name:
        names = engine_args.served_model_name
        line += ["--served-model-name", *([names] if isinstance(names, str) else names)]
    if dialect.tool_parser:
        line += ["--enable-auto-tool-choice", "--tool-call-parser", dialect.tool_parser]
    if dialect.reasoning_parser:
        line += ["--reasoning-parser", dialect.reasoning_parser]
    arguments: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(line)
    if dialect.reasoning_parser:
        # `vllm serve` copies it there while it builds the engine's configuration; the serving classes read it there.
        arguments.structured_outputs_config.reasoning_parser = dialect.reasoning_parser
    return arguments


def _checked(create: Callable[..., Awaitable[Any]], roles: tuple[str, ...] | None) -> Callable[..., Awaitable[Any]]:
    async def create_checked(request: Any, raw_request: Any = None) -> Any:
        check_request(request, roles)
        return await create(request, raw_request)

    return create_checked


def _named(create: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """`create`, whose errors name the field that is to blame where that can be told."""
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    async def create_named(request: Any, raw_request: Any = None) -> Any:
        try:
            answer = await create(request, raw_request)
        except VLLMValidationError as error:
            error.parameter = field_of(request, str(error), error.parameter)
            raise
        except ValueError as error:  # vLLM's older way to say the same
            field = field_of(request, str(error), None)
            raise VLLMValidationError(str(error), parameter=field) from error
        except RuntimeError as error:
            if _NO_LOCAL_FILES not in str(error):
                raise
            raise VLLMValidationError("files of the server are not read", parameter="messages") from error
        if isinstance(answer, ErrorResponse) and answer.error.code == HTTPStatus.BAD_REQUEST:
            answer.error.param = field_of(request, answer.error.message, answer.error.param)
        return answer

    return create_named


async def _refuse(_: Request, error: Refused) -> Any:
    from fastapi.responses import JSONResponse

    body = refusal(error)
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return JSONResponse(body, status_code=error.http_status, headers=headers)


def refusal(error: Refused) -> dict[str, Any]:
    """The body of the answer, in OpenAI's form."""
    from vllm.entrypoints.serve import create_error_response

    body = create_error_response(error)
    body.error.param = error.parameter
    return body.model_dump()


async def _explain(request: Request, error: Any) -> Any:
    """A body of the wrong shape: vLLM's answer, with the path as the client knows it and in the form of its API."""
    from fastapi.responses import JSONResponse
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse
    from vllm.entrypoints.serve.exception_handling.handlers.validation import validation_exception_handler

    answer = await validation_exception_handler(request, error)
    body = msgspec.json.decode(answer.body)
    if body["error"]["param"]:
        body["error"]["param"] = clean_path(body["error"]["param"])
    if request.url.path.startswith("/v1/messages"):
        return anthropic_answer(ErrorResponse.model_validate(body))
    return JSONResponse(body, status_code=answer.status_code)


async def _refuse_body(request: Request, error: Exception) -> Any:
    """vLLM's validators take some fields for what they should be: what breaks while a body is read is its fault."""
    from fastapi.exceptions import RequestValidationError
    from vllm.entrypoints.serve.exception_handling.handlers.exception import exception_handler

    if "solve_dependencies" not in (frame.name for frame in traceback.extract_tb(error.__traceback__)):
        if isinstance(error, TypeError):  # vLLM has a translation
            return await exception_handler(request, error)
        raise error
    field = misshapen(error)
    said = "has a value of the wrong type" if field else "a field has a value of the wrong type"
    detail = {"type": "type", "loc": ("body", field) if field else ("body",), "msg": said}
    return await _explain(request, RequestValidationError([detail]))
