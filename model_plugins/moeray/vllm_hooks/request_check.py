"""What vLLM lets through but must not reach an engine, checked once for every protocol, and naming the field."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import msgspec
from pydantic import TypeAdapter
from vllm.exceptions import VLLMValidationError

MAX_CHOICES = 128
"""Answers to one request (`n`, also the width of a beam search): OpenAI's own bound. Each is a sequence of its own."""

MAX_PROMPTS = 2048
"""Of one completions request; each is a request to the engines."""
MAX_BIASES = 1 << 14
MAX_TEXT_CHARS = 8 << 20
"""Of one field that becomes text of the prompt: a tokenizer takes a second and 120 MiB for each million."""

_FINITE = (
    "temperature",
    "top_p",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "length_penalty",
)
_STOPS = ("stop", "stop_sequences")
_CONVERSATIONS = ("messages", "input")
_BESIDE = ("system", "instructions", "tools", "documents", "chat_template", "chat_template_kwargs")
"""What becomes text of the prompt, too."""

MAX_CONSTRAINT_CHARS = 64 << 10
"""Of a JSON schema, grammar, regex or list of choices. It is compiled in a thread of the shard's engine that cannot be
stopped; its time grows with its length (a schema of 60,000 characters: 3 s; one of 1.1 million: more than 40 s)."""

_JSON = TypeAdapter(Any)
_ENCODER = msgspec.msgpack.Encoder(enc_hook=lambda _: None)


def check_constraint(structured_outputs: Any) -> None:
    """Check vLLM's StructuredOutputsParams, or None.

    Raises:
        VLLMValidationError: too long to be compiled beside other requests.
    """
    for name in ("json", "regex", "choice", "grammar", "structural_tag"):
        value = getattr(structured_outputs, name, None)
        if not value:
            continue
        num_chars = len(value) if isinstance(value, str) else len(json.dumps(value))
        if num_chars > MAX_CONSTRAINT_CHARS:
            raise VLLMValidationError(
                f"the constraint has {num_chars} characters, at most {MAX_CONSTRAINT_CHARS} are taken",
                parameter=f"structured_outputs.{name}",
            )


def check_encodable(params: Any, **more: Any) -> None:
    """Check that vLLM's SamplingParams (or PoolingParams) and what else goes to an engine can; about 10 us.

    Raises:
        VLLMValidationError: an integer of more than 64 bits, or a text with half of a surrogate pair, which JSON can
            write: the wire has neither.
    """
    if _unencodable((params, more)):
        fields = {**more, **{name: getattr(params, name) for name in params.__struct_fields__}}
        name, why = next((name, why) for name, value in fields.items() if (why := _unencodable(value)))
        raise VLLMValidationError(f"{name} has {why}", parameter=name)


def _unencodable(value: Any) -> str:
    try:
        _ENCODER.encode(value)
    except OverflowError:
        return "an integer of more than 64 bits"
    except UnicodeEncodeError:
        return "half of a surrogate pair, which is no character"
    return ""


def check_request(request: Any, roles: tuple[str, ...] | None) -> None:
    """Check a request of chat, completions, responses, Anthropic's messages or tokenize.

    Args:
        request: a field that it does not have is not checked.
        roles: those that the model's chat encoding can render; None where its chat template decides.
    Raises:
        VLLMValidationError: with the field's name and value; becomes HTTP 400 or gRPC INVALID_ARGUMENT.
    """
    if getattr(request, "model", None) == "":
        raise VLLMValidationError("model must name a model; ask for the list of models", parameter="model")
    for name in _FINITE:
        _check_finite(name, getattr(request, name, None))
    n = getattr(request, "n", None)
    if n is not None and not 1 <= n <= MAX_CHOICES:
        bound = "at least 1" if n < 1 else f"at most {MAX_CHOICES}"
        raise VLLMValidationError(f"n must be {bound}", parameter="n", value=n)
    for name in _STOPS:
        stops = getattr(request, name, None)
        if "" in ([stops] if isinstance(stops, str) else stops or []):
            raise VLLMValidationError(f"{name} cannot contain an empty string", parameter=name)
    biases = getattr(request, "logit_bias", None) or {}
    if len(biases) > MAX_BIASES:
        raise VLLMValidationError(f"logit_bias may have at most {MAX_BIASES} tokens", parameter="logit_bias")
    for token, bias in biases.items():
        if not math.isfinite(bias):
            _check_finite("logit_bias", bias, f"logit_bias.{token}")
    if getattr(request, "prompt", None) == []:
        raise VLLMValidationError("prompt must hold at least one text or token", parameter="prompt")
    _check_grammar(request)
    _check_prompts(getattr(request, "prompt", None))
    for name in _BESIDE:
        if value := getattr(request, name, None):
            _check_length(name, len(value if isinstance(value, str) else _JSON.dump_json(value, fallback=str)))
    for name in _CONVERSATIONS:
        messages = getattr(request, name, None)
        if isinstance(messages, list):
            _check_messages(name, messages, roles)
            _check_length(name, sum(map(_num_chars, messages)))
        elif isinstance(messages, str):
            _check_length(name, len(messages))


def _check_finite(name: str, value: float | None, parameter: str | None = None) -> None:
    if value is not None and not math.isfinite(value):
        raise VLLMValidationError(f"{name} must be a finite number", parameter=parameter or name, value=value)


def _check_prompts(prompt: Any) -> None:
    if isinstance(prompt, str):
        _check_length("prompt", len(prompt))
    elif isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > MAX_PROMPTS:
            raise VLLMValidationError(f"prompt may hold at most {MAX_PROMPTS} prompts", parameter="prompt")
        _check_length("prompt", sum(len(each) for each in prompt if isinstance(each, str)))


def _num_chars(message: Any) -> int:
    """Of a message's text: its content, or the texts of its parts. Images and such are not text."""
    content = message.get("content") if isinstance(message, dict) else getattr(message, "content", None)
    if isinstance(content, str):
        return len(content)
    parts = content if isinstance(content, list) else ()
    texts = (part.get("text") if isinstance(part, dict) else getattr(part, "text", None) for part in parts)
    return sum(len(text) for text in texts if isinstance(text, str))


def _check_length(parameter: str, num_chars: int) -> None:
    if num_chars > MAX_TEXT_CHARS:
        raise VLLMValidationError(
            f"{parameter} has {num_chars} characters of text, at most {MAX_TEXT_CHARS} are taken", parameter=parameter
        )


def _check_grammar(request: Any) -> None:
    """vLLM gives a grammar that xgrammar cannot parse to another backend, which an engine may not have: a 500."""
    grammar = getattr(getattr(request, "structured_outputs", None), "grammar", None)
    if not grammar:
        return
    import xgrammar
    from vllm.v1.structured_output.utils import grammar_is_likely_lark

    if grammar_is_likely_lark(grammar):
        return
    try:
        xgrammar.Grammar.from_ebnf(grammar)
    except RuntimeError as error:
        reason = str(error).strip().rpartition("EBNF parser error ")[2]
        raise VLLMValidationError(f"not a grammar in EBNF: {reason}", parameter="structured_outputs.grammar") from error


def _check_messages(field: str, messages: Sequence[Any], roles: tuple[str, ...] | None) -> None:
    if not messages:
        raise VLLMValidationError(f"{field} must hold at least one message", parameter=field)
    if roles is None:
        return
    for index, message in enumerate(messages):
        # An item of a response's input need not be a message, and then has no role.
        role = message.get("role", roles[0]) if isinstance(message, dict) else getattr(message, "role", roles[0])
        if role not in roles:
            raise VLLMValidationError(
                f"role must be one of {', '.join(roles)}", parameter=f"{field}.{index}.role", value=role
            )
