"""What vLLM lets through but must not reach an engine, checked once for HTTP and gRPC, and naming the field."""

from __future__ import annotations

import math
from typing import Any

from vllm.exceptions import VLLMValidationError

_FINITE = (
    "temperature",
    "top_p",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "length_penalty",
)


def check_request(request: Any, roles: tuple[str, ...] | None) -> None:
    """Check a ChatCompletionRequest or CompletionRequest.

    Args:
        roles: those that the model's chat encoding can render; None where its chat template decides.
    Raises:
        VLLMValidationError: with the field's name and value; becomes HTTP 400 or gRPC INVALID_ARGUMENT.
    """
    for name in _FINITE:
        value = getattr(request, name, None)
        if value is not None and not math.isfinite(value):
            raise VLLMValidationError(f"{name} must be a finite number", parameter=name, value=value)
    if request.n is not None and request.n < 1:
        raise VLLMValidationError("n must be at least 1", parameter="n", value=request.n)
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if "" in stops:
        raise VLLMValidationError("stop cannot contain an empty string", parameter="stop")
    for token, bias in (request.logit_bias or {}).items():
        if not math.isfinite(bias):
            raise VLLMValidationError("logit_bias must be a finite number", parameter=f"logit_bias.{token}", value=bias)
    if hasattr(request, "messages"):
        _check_messages(request.messages, roles)


def _check_messages(messages: list[Any], roles: tuple[str, ...] | None) -> None:
    if not messages:
        raise VLLMValidationError("messages must hold at least one message", parameter="messages")
    for index, message in enumerate(messages if roles is not None else ()):
        role = message.get("role")
        if roles is not None and role not in roles:
            raise VLLMValidationError(
                f"role must be one of {', '.join(roles)}", parameter=f"messages.{index}.role", value=role
            )
