"""`moeray.v1.Inference`: each call becomes vLLM's own request object and goes to the handler that HTTP uses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import msgspec
from google.protobuf.message import Message
from pydantic import BaseModel, ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeCompletionRequest
from vllm.exceptions import VLLMValidationError

from moeray.ingress.convert import fill, to_json
from moeray.ingress.errors import abort
from moeray.ingress.grpc_arrivals import given_id
from moeray.tenancy import QuotaExceeded
from moeray.v1 import inference_pb2 as pb
from moeray.v1.inference_pb2_grpc import InferenceServicer
from moeray.vllm_hooks.admission import Refused
from moeray.vllm_hooks.error_fields import clean_path
from moeray.vllm_hooks.openai_app import refusal

if TYPE_CHECKING:
    from moeray.vllm_hooks.openai_app import OpenAIApp

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_DATA, _DONE = "data: ", "[DONE]"


class InferenceService(InferenceServicer):
    """Runs on the ingress' event loop, beside HTTP. Cancelled or expired calls are aborted in the engine by vLLM's own
    `generate()`, which is what a cancelled handler stops.
    """

    def __init__(self, openai: OpenAIApp) -> None:
        self._openai = openai

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        models = await self._openai.models.show_available_models()
        return fill(pb.ListModelsResponse(), models.model_dump(exclude_none=True))

    async def Chat(self, request: pb.ChatRequest, context: Context) -> pb.ChatResponse:
        answer = await self._ask(
            self._openai.chat.create_chat_completion, ChatCompletionRequest, request, False, context
        )
        return fill(pb.ChatResponse(), answer.model_dump(exclude_none=True))

    async def ChatStream(self, request: pb.ChatRequest, context: Context) -> AsyncIterator[pb.ChatChunk]:
        chunks = await self._ask(
            self._openai.chat.create_chat_completion, ChatCompletionRequest, request, True, context
        )
        async for data in _events(chunks, context):
            yield fill(pb.ChatChunk(), data)

    async def Complete(self, request: pb.CompletionRequest, context: Context) -> pb.CompletionResponse:
        answer = await self._ask(self._openai.completion.create_completion, CompletionRequest, request, False, context)
        return fill(pb.CompletionResponse(), answer.model_dump(exclude_none=True))

    async def CompleteStream(
        self, request: pb.CompletionRequest, context: Context
    ) -> AsyncIterator[pb.CompletionChunk]:
        chunks = await self._ask(self._openai.completion.create_completion, CompletionRequest, request, True, context)
        async for data in _events(chunks, context):
            yield fill(pb.CompletionChunk(), data)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        model = TokenizeCompletionRequest if request.HasField("prompt") else TokenizeChatRequest
        answer = await self._ask(self._openai.tokens.create_tokenize, model, request, False, context)
        return fill(pb.TokenizeResponse(), answer.model_dump(exclude_none=True))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        answer = await self._ask(self._openai.tokens.create_detokenize, DetokenizeRequest, request, False, context)
        return fill(pb.DetokenizeResponse(), answer.model_dump(exclude_none=True))

    async def _ask(
        self,
        create: Callable[[Any], Awaitable[Any]],
        model: type[BaseModel],
        message: Message,
        stream: bool,
        context: Context,
    ) -> Any:
        """Hand the request to vLLM; every refusal ends the call with its status."""
        try:
            data = {"model": "", **to_json(message)}  # unset is empty, and refused
            if (request_id := given_id(context)) is not None:
                data["request_id"] = request_id
            if stream:
                data["stream"] = True
            else:
                data.pop("stream_options", None)
            answer = await create(model.model_validate(data))
        except ValidationError as error:
            await abort(context, _explain(error))
        except Exception as error:  # noqa: BLE001  as vLLM's own HTTP handlers do: every error gets a status
            await _abort_with(context, error)
        if isinstance(answer, ErrorResponse):
            await abort(context, answer.error.model_dump())
        return answer


async def _events(chunks: AsyncIterator[str], context: Context) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a server-sent event stream; an error event ends the call."""
    try:
        async for event in chunks:
            text = event.removeprefix(_DATA).rstrip()
            if text == _DONE:
                return
            data = msgspec.json.decode(text)
            if "error" in data:
                await abort(context, data["error"])
            yield data
    finally:
        await chunks.aclose()  # type: ignore[attr-defined]


async def _abort_with(context: Context, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, Refused):
        limit = error.__cause__.limit if isinstance(error.__cause__, QuotaExceeded) else ""
        await abort(context, refusal(error)["error"], error.retry_after_s, limit=limit)
    await abort(context, create_error_response(error).error.model_dump())


def _explain(error: ValidationError) -> dict[str, Any]:
    """The first violation, as the OpenAI error object that HTTP gives for it."""
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, VLLMValidationError):
        return {"message": str(cause), "param": cause.parameter, "code": 400}
    from vllm.entrypoints.serve.exception_handling.handlers.validation import clean_loc_for_param

    field = clean_path(clean_loc_for_param(first["loc"]))
    return {"message": f"{field}: {first['msg']}", "param": field, "code": 400}
