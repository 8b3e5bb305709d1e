"""Which field of a request an error of vLLM's is about, where vLLM does not say, or says it by another API's name."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from typing import Any

_ALIASES = {
    "max_tokens": ("max_output_tokens", "max_completion_tokens"),
    "logprobs": ("top_logprobs",),
    "stop": ("stop_sequences",),
    "input_text": ("messages", "prompt", "input"),
    "input_tokens": ("messages", "prompt", "input"),
    "response_id": ("previous_response_id",),
    "reasoning_parser_kwargs": ("chat_template_kwargs",),
}
"""vLLM names its sampling parameter, or what it made of the request; the field that sets it has these names."""

_SHAPES: Mapping[str, type | tuple[type, ...]] = {
    "messages": list, "tools": list, "documents": list, "structured_outputs": dict, "response_format": dict,
    "stream_options": dict, "logit_bias": dict, "tool_choice": (str, dict),
}  # fmt: skip

_CONSTRAINTS = ("structured_outputs", "response_format", "text")
_CONVERSATIONS = ("messages", "input")
_BY_MESSAGE = (
    (re.compile(r"grammar|json schema|structured output|constraint|^choice '", re.IGNORECASE), _CONSTRAINTS),
    (re.compile(r"multimodal|image|audio|video|invalid role|allowed domains", re.IGNORECASE), _CONVERSATIONS),
    (re.compile(r"is out of vocabulary"), ("prompt",)),
    (re.compile(r"chat template", re.IGNORECASE), ("chat_template", "chat_template_kwargs")),
    (re.compile(r"^(max_pattern_size|min_count)"), ("repetition_detection",)),
)
"""Messages that do not begin with the name of a field, and the fields that can cause them."""

_FIRST_WORD = re.compile(r"\W*(\w+)")
_CLASS_NAME = re.compile(r"[A-Z]")


def field_of(request: Any, message: str, named: str | None) -> str | None:
    """The field that the client sent and that is to blame; None if the message does not tell.

    Args:
        request: one of vLLM's pydantic requests.
        message: the error's text.
        named: the parameter that vLLM gives, if it does.
    """
    known, sent = type(request).model_fields, request.model_fields_set
    if named is None:
        word = _FIRST_WORD.match(message)
        if word is not None and word[1] in (*known, *_ALIASES):
            named = word[1]
    if named is not None:
        return next((alias for alias in _ALIASES.get(named, ()) if alias in sent), named)
    for pattern, fields in _BY_MESSAGE:
        if pattern.search(message):
            return next((field for field in fields if field in sent), None)
    return None


def misshapen(error: BaseException) -> str | None:
    """The field that is not of its type, where a validator of vLLM's took it for that and broke; None if none is.

    Such a validator has the body in a variable `data`; nothing else tells what it looked at.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        data = frame.f_locals.get("data")
        if isinstance(data, dict):
            for name, kind in _SHAPES.items():
                if name in data and not isinstance(data[name], kind) and (data[name] is not None or name == "messages"):
                    return name
    return None


def clean_path(path: str) -> str:
    """A path in a body as a client knows it, without `body.` and the names of the server's own classes."""
    parts = path.removeprefix("body.").split(".")
    return ".".join(part for part in parts if not _CLASS_NAME.match(part)) or path
