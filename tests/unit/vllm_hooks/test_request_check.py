"""What is refused before it reaches an engine, and what only some models refuse."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from moeray.tiny import checkpoint_path
from moeray.vllm_hooks.request_check import (
    MAX_BIASES,
    MAX_CHOICES,
    MAX_CONSTRAINT_CHARS,
    MAX_PROMPTS,
    MAX_TEXT_CHARS,
    check_constraint,
    check_encodable,
    check_request,
)
from moeray.vllm_hooks.served_model import Dialect, describe_model

DEEPSEEK_ROLES = describe_model(checkpoint_path()).dialect.roles


def request(role: str = "user", **changes: Any) -> SimpleNamespace:
    fields = {"n": 1, "stop": None, "logit_bias": None, "messages": [{"role": role, "content": "?"}]}
    return SimpleNamespace(**fields | changes)


def test_a_role_that_the_models_encoding_cannot_render_is_named() -> None:
    with pytest.raises(VLLMValidationError, match="role must be one of") as refused:
        check_request(request("critic"), DEEPSEEK_ROLES)
    assert refused.value.parameter == "messages.0.role"


def test_roles_are_the_chat_templates_where_the_model_has_one() -> None:
    check_request(request("critic"), Dialect().roles)


@pytest.mark.parametrize("roles", [DEEPSEEK_ROLES, None])
@pytest.mark.parametrize(
    ("changes", "parameter"), [({"n": 0}, "n"), ({"stop": ""}, "stop"), ({"messages": []}, "messages")]
)
def test_what_no_model_takes_is_refused_for_every_model(
    roles: tuple[str, ...] | None, changes: dict[str, Any], parameter: str
) -> None:
    with pytest.raises(VLLMValidationError) as refused:
        check_request(request(**changes), roles)
    assert refused.value.parameter == parameter


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        ({"model": ""}, "model"),
        ({"n": MAX_CHOICES + 1}, "n"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"prompt": []}, "prompt"),
        ({"input": []}, "input"),
        ({"input": [{"type": "message", "role": "critic", "content": "?"}]}, "input.0.role"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"logit_bias": {"5": math.nan}}, "logit_bias.5"),
        ({"structured_outputs": StructuredOutputsParams(grammar="root ::=")}, "structured_outputs.grammar"),
    ],
)
def test_every_protocols_fields_are_checked_and_named(changes: dict[str, Any], parameter: str) -> None:
    with pytest.raises(VLLMValidationError) as refused:
        check_request(SimpleNamespace(**changes), DEEPSEEK_ROLES)
    assert refused.value.parameter == parameter


def test_the_bound_of_choices_is_in_the_error_and_the_bound_itself_is_taken() -> None:
    check_request(request(n=MAX_CHOICES), None)
    with pytest.raises(VLLMValidationError, match=f"at most {MAX_CHOICES}"):
        check_request(request(n=MAX_CHOICES + 1), None)


def test_what_is_fine_passes() -> None:
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    grammar = StructuredOutputsParams(grammar='root ::= "yes" | "no"')
    check_request(SimpleNamespace(input=[call], n=None, stop=None, structured_outputs=grammar), DEEPSEEK_ROLES)
    check_request(SimpleNamespace(input="", model=None), DEEPSEEK_ROLES)


@pytest.mark.parametrize("field", ["json", "regex", "grammar", "choice", "structural_tag"])
def test_a_constraint_is_compiled_only_if_it_is_short(field: str) -> None:
    at_most = MAX_CONSTRAINT_CHARS
    longest: Any = ["x" * (at_most - 4)] if field == "choice" else "x" * at_most
    check_constraint(StructuredOutputsParams(**{field: longest}))

    longer: Any = ["x" * at_most] if field == "choice" else "x" * (at_most + 1)
    with pytest.raises(VLLMValidationError, match="characters") as refused:
        check_constraint(StructuredOutputsParams(**{field: longer}))
    assert refused.value.parameter == f"structured_outputs.{field}"


LONGEST = "x" * MAX_TEXT_CHARS


@pytest.mark.parametrize(
    ("field", "taken", "refused"),
    [
        ("prompt", LONGEST, LONGEST + "x"),
        ("prompt", [LONGEST], [LONGEST, "x"]),
        ("prompt", ["x"] * MAX_PROMPTS, ["x"] * (MAX_PROMPTS + 1)),
        ("prompt", [[1]] * MAX_PROMPTS, [[1]] * (MAX_PROMPTS + 1)),
        ("prompt", [1] * (MAX_PROMPTS + 1), [LONGEST + "x"]),
        ("input", LONGEST, LONGEST + "x"),
        ("messages", [{"role": "user", "content": LONGEST}], [{"role": "user", "content": LONGEST + "x"}]),
        (
            "messages",
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": LONGEST + "x"}}]}],
            [{"role": "user", "content": [{"type": "text", "text": LONGEST}, {"type": "text", "text": "x"}]}],
        ),
        ("system", LONGEST, LONGEST + "x"),
        ("logit_bias", dict.fromkeys(range(MAX_BIASES), 1.0), dict.fromkeys(range(MAX_BIASES + 1), 1.0)),
        ("tools", [{"description": LONGEST[:-99]}], [{"description": LONGEST}]),
    ],
    ids=range(11),
)
def test_what_a_request_holds_is_bounded_before_anything_is_made_of_it(field: str, taken: Any, refused: Any) -> None:
    check_request(SimpleNamespace(**{field: taken}), DEEPSEEK_ROLES)
    with pytest.raises(VLLMValidationError, match="at most") as error:
        check_request(SimpleNamespace(**{field: refused}), DEEPSEEK_ROLES)
    assert error.value.parameter == field


def test_without_a_constraint_there_is_nothing_to_check() -> None:
    check_constraint(None)


@pytest.mark.parametrize(
    ("params", "more", "parameter"),
    [
        ({"thinking_token_budget": 2**64}, {}, "thinking_token_budget"),
        ({"stop_token_ids": [-(2**63) - 1]}, {}, "stop_token_ids"),
        ({}, {"priority": 2**70}, "priority"),
        ({}, {"session_id": "\ud800"}, "session_id"),
        ({}, {"reasoning_parser_kwargs": {"a": -(2**63) - 1}}, "reasoning_parser_kwargs"),
        ({"stop": ["\udfff"]}, {}, "stop"),
    ],
)
def test_what_the_wire_does_not_have_is_refused_and_its_field_named(
    params: dict[str, Any], more: dict[str, Any], parameter: str
) -> None:
    with pytest.raises(VLLMValidationError, match=r"64 bits|surrogate") as refused:
        check_encodable(SamplingParams(**params), **more)
    assert refused.value.parameter == parameter


def test_the_largest_integers_that_the_wire_has_pass() -> None:
    check_encodable(SamplingParams(thinking_token_budget=2**64 - 1, stop_token_ids=[-(2**63)]), priority=-(2**63))
