"""An error names the field that the client sent."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from moeray.vllm_hooks.error_fields import clean_path, field_of, misshapen


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(messages=[{"role": "user", "content": "?"}], **fields)


SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}


@pytest.mark.parametrize(
    ("request_", "message", "named", "field"),
    [
        (chat(), "min_tokens must be less than or equal to max_tokens=40, got 50.", None, "min_tokens"),
        (chat(), "top_k must be 0 (disable), or at least 1, got -7.", None, "top_k"),
        (chat(), "stop cannot contain an empty string.", None, "stop"),
        (chat(max_completion_tokens=0), "max_tokens must be at least 1", "max_tokens", "max_completion_tokens"),
        (chat(max_tokens=0), "max_tokens must be at least 1", "max_tokens", "max_tokens"),
        (chat(logprobs=True, top_logprobs=99), "Requested sample logprobs of 99", "logprobs", "top_logprobs"),
        (chat(response_format=SCHEMA), "Grammar error: Invalid type: banana", None, "response_format"),
        (
            chat(structured_outputs={"choice": []}),
            "Choice '[]' cannot be an empty list",
            None,
            "structured_outputs",
        ),
        (chat(), "moeray-tiny is not a multimodal model", None, "messages"),
        (chat(chat_template="x"), "Chat template is passed with request", None, "chat_template"),
        (CompletionRequest(prompt=[5]), "Token id 5 is out of vocabulary", None, "prompt"),
        (ResponsesRequest(input="?", max_output_tokens=0), "max_tokens", "max_tokens", "max_output_tokens"),
        (chat(), "This model's maximum context length is 8192", "input_tokens", "messages"),
        (CompletionRequest(prompt="?"), "too long", "input_text", "prompt"),
        (ResponsesRequest(input="?"), "too long", "input_tokens", "input"),
        (ResponsesRequest(input="?", previous_response_id="x"), "not found", "response_id", "previous_response_id"),
        (chat(), "the moon is not right", None, None),
        (chat(), "Grammar error: no constraint was sent", None, None),
    ],
)
def test_the_field_to_blame_is_one_that_the_client_sent(
    request_: Any, message: str, named: str | None, field: str | None
) -> None:
    assert field_of(request_, message, named) == field


def test_a_path_has_no_names_of_the_servers_classes() -> None:
    assert clean_path("body.max_tokens") == "max_tokens"
    assert clean_path("body.messages.0.ChatCompletionDeveloperMessageParam.content") == "messages.0.content"
    assert clean_path("body") == "body"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"messages": 1}, "messages"),
        ({"messages": None}, "messages"),
        ({"structured_outputs": "x"}, "structured_outputs"),
        ({"structured_outputs": []}, "structured_outputs"),
    ],
)
def test_the_field_at_which_a_validator_broke_is_found_in_its_frame(changes: dict[str, Any], field: str) -> None:
    body = {"messages": [{"role": "user", "content": "?"}], "tools": None, **changes}
    with pytest.raises((TypeError, AttributeError, LookupError)) as broken:
        ChatCompletionRequest.model_validate(body)
    assert misshapen(broken.value) == field


def test_where_all_fields_have_their_type_none_is_blamed() -> None:
    def validator(data: dict[str, Any]) -> None:
        raise TypeError(f"{data} and something else")

    with pytest.raises(TypeError) as broken:
        validator({"messages": [], "tools": [], "model": "m"})
    assert misshapen(broken.value) is None
