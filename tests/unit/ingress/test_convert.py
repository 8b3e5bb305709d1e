"""Between moeray.v1 messages and OpenAI JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st
from vllm.entrypoints.generate.base.protocol import DeltaMessage, StreamOptions
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
    ChatMessage,
)
from vllm.entrypoints.openai.completion.protocol import (
    CompletionRequest,
    CompletionResponse,
    CompletionResponseChoice,
)
from vllm.entrypoints.serve.tokenize.protocol import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
    TokenizeResponse,
)

from moeray.ingress.convert import fill, to_json
from moeray.v1 import inference_pb2 as pb

_text = st.text(max_size=12)
_finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | _finite | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=8,
)
_object = st.dictionaries(_text, _json, max_size=4)


def _optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


_function = st.fixed_dictionaries(
    {"name": st.text(min_size=1, max_size=5)}, optional={"parameters": _object, "strict": st.booleans()}
)
_tool_call = st.fixed_dictionaries(
    {"id": st.text(min_size=1, max_size=5), "type": st.just("function")},
    optional={
        "function": st.fixed_dictionaries(
            {"name": st.text(min_size=1, max_size=5), "arguments": st.text(min_size=1, max_size=5)}
        )
    },
)
_message = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"])},
    optional={
        "content": _text,
        "name": _text,
        "reasoning": _text,
        "tool_calls": st.lists(_tool_call, min_size=1, max_size=2),
    },
)
_chat = st.fixed_dictionaries(
    {"messages": st.lists(_message, max_size=3)},
    optional={
        "model": st.text(min_size=1, max_size=5),
        "max_tokens": st.integers(-(2**63), 2**63 - 1),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "n": st.integers(-(2**31), 2**31 - 1),
        "temperature": _finite,
        "top_p": _finite,
        "logprobs": st.booleans(),
        "stop": st.lists(_text, min_size=1, max_size=3),
        "logit_bias": st.dictionaries(_text, _finite, min_size=1, max_size=3),
        "stream_options": _optional(include_usage=st.booleans()),
        "tools": st.lists(
            st.fixed_dictionaries({"type": st.just("function"), "function": _function}), min_size=1, max_size=2
        ),
        "response_format": st.fixed_dictionaries({"type": st.just("json_object")}),
        "chat_template_kwargs": _object,
    },
)


@given(_chat)
def test_a_chat_request_survives_the_way_to_proto_and_back(data: dict[str, Any]) -> None:
    wire = fill(pb.ChatRequest(), data).SerializeToString()

    assert to_json(pb.ChatRequest.FromString(wire)) == data


@given(_chat)
def test_only_what_was_set_is_in_the_json(data: dict[str, Any]) -> None:
    assert to_json(fill(pb.ChatRequest(), data)).keys() == data.keys()


def test_an_unset_field_is_absent_and_a_set_zero_is_there() -> None:
    assert to_json(pb.ChatRequest()) == {"messages": []}
    assert to_json(pb.ChatRequest(temperature=0, max_tokens=0, logprobs=False)) == {
        "messages": [],
        "temperature": 0,
        "max_tokens": 0,
        "logprobs": False,
    }


def test_nan_stays_nan_so_that_the_check_can_name_it() -> None:
    assert math.isnan(to_json(pb.ChatRequest(temperature=math.nan))["temperature"])


def test_content_parts_become_the_list_form_of_content() -> None:
    parts = [pb.ContentPart(type="text", text="a"), pb.ContentPart(type="image_url", image_url=pb.ImageUrl(url="u"))]
    message = pb.ChatMessage(role="user", content_parts=parts)

    assert to_json(message)["content"] == [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": "u"}},
    ]


def test_tool_choice_is_a_word_or_a_function() -> None:
    named = pb.ToolChoice(function=pb.NamedFunction(name="f"))

    assert to_json(pb.ChatRequest(tool_choice=pb.ToolChoice(mode="required")))["tool_choice"] == "required"
    assert to_json(pb.ChatRequest(tool_choice=named))["tool_choice"] == {"type": "function", "function": {"name": "f"}}


def test_a_prompt_is_text_several_texts_or_token_ids() -> None:
    assert to_json(pb.CompletionRequest(prompt=["a"]))["prompt"] == "a"
    assert to_json(pb.CompletionRequest(prompt=["a", "b"]))["prompt"] == ["a", "b"]
    assert to_json(pb.CompletionRequest(prompt_token_ids=pb.TokenIds(ids=[1, 2])))["prompt"] == [1, 2]


def test_schema_numbers_that_are_whole_come_back_as_integers() -> None:
    tool = pb.Tool(function=pb.FunctionDefinition(name="f"))
    tool.function.parameters.update({"properties": {"n": {"minimum": 1, "multipleOf": 0.5}}})

    minimum = to_json(tool)["function"]["parameters"]["properties"]["n"]
    assert minimum == {"minimum": 1, "multipleOf": 0.5} and isinstance(minimum["minimum"], int)


_answers: list[tuple[Message, dict[str, Any]]] = [
    (
        pb.ChatResponse(),
        {
            "id": "c",
            "created": 5,
            "model": "m",
            "choices": [
                {
                    "index": 0,
                    "message": {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                    },
                    "finish_reason": "tool_calls",
                    "stop_reason": 7,
                    "logprobs": {
                        "content": [
                            {
                                "token": "a",
                                "logprob": -0.5,
                                "bytes": b"a",
                                "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": b"\xff"}],
                            }
                        ]
                    },
                }
            ],
            "usage": {
                "prompt_tokens": 1,
                "completion_tokens": 2,
                "total_tokens": 3,
                "prompt_tokens_details": {"cached_tokens": 1},
            },
        },
    ),
    (
        pb.ChatChunk(),
        {"id": "c", "created": 5, "model": "m", "choices": [{"delta": {"content": "x"}, "stop_reason": "end"}]},
    ),
    (
        pb.CompletionResponse(),
        {
            "id": "c",
            "choices": [
                {"text": "t", "logprobs": {"tokens": ["a"], "token_logprobs": [None, -1], "top_logprobs": [{"a": -1}]}}
            ],
        },
    ),
]


def test_answers_are_carried_whole() -> None:
    for message, data in _answers:
        carried = to_json(type(message).FromString(fill(message, data).SerializeToString()))
        assert _without_zeros(carried) == _without_zeros(data)


def test_equal_schemas_become_equal_json_text_whatever_order_a_client_has_sent_them_in() -> None:
    names = [f"p{number}" for number in range(20)]
    texts = set()
    for order in (names, names[::-1]):
        request = pb.ChatRequest()
        tool = request.tools.add()
        tool.function.parameters.update({name: {"type": "string", "title": name} for name in order})
        texts.add(json.dumps(to_json(pb.ChatRequest.FromString(request.SerializeToString()))))
    assert len(texts) == 1


def test_bytes_of_a_token_may_be_given_as_openais_list() -> None:
    answer = fill(pb.TokenLogprob(), {"token": "é", "bytes": [195, 169]})
    assert answer.bytes == b"\xc3\xa9"


def test_nulls_and_unknown_keys_are_left_out() -> None:
    assert fill(pb.ChatChunk(), {"id": "c", "usage": None, "metrics": {"x": 1}}) == pb.ChatChunk(id="c")


def _without_zeros(data: Any) -> Any:
    """proto3 scalars without presence have no wire form for zero."""
    if isinstance(data, dict):
        return {
            key: _without_zeros(value) for key, value in data.items() if value not in (0, "") or isinstance(value, bool)
        }
    return [_without_zeros(item) for item in data] if isinstance(data, list) else data


def test_logprobs_of_a_prompt_are_by_position_and_the_first_has_none() -> None:
    logprobs = [None, {3: {"logprob": -1.5, "rank": 2, "decoded_token": "a"}, 4: {"logprob": -0.5, "rank": 1}}]
    answer = fill(pb.ChatResponse(), {"prompt_logprobs": logprobs})
    first, second = answer.prompt_logprobs
    assert not first.tokens
    assert [(t.token_id, t.logprob, t.rank, t.decoded_token) for t in second.tokens] == [
        (3, -1.5, 2, "a"),
        (4, -0.5, 1, ""),
    ]


def test_the_first_token_of_an_echo_has_no_alternatives() -> None:
    logprobs = {"tokens": ["a", "b"], "token_logprobs": [None, -1], "top_logprobs": [None, {"b": -1}]}
    filled = fill(pb.CompletionLogprobs(), logprobs)
    assert [dict(each) for each in filled.top_logprobs] == [{}, {"b": -1}]


def test_several_prompts_may_be_token_ids() -> None:
    prompts = [pb.TokenIds(ids=[1, 2]), pb.TokenIds(ids=[3])]
    assert to_json(pb.CompletionRequest(prompts_token_ids=prompts))["prompt"] == [[1, 2], [3]]


def test_a_schema_given_as_text_stays_text_and_so_keeps_its_order() -> None:
    text = '{"properties": {"b": {}, "a": {}}}'
    outputs = pb.StructuredOutputs()
    outputs.json.string_value = text
    assert to_json(outputs)["json"] == text


# What vLLM takes or gives, and the proto leaves out.
_LEFT_OUT = {
    "object", "stream", "service_tier", "metrics", "routed_experts", "routed_experts_prompt_start", "chat_template",
    "media_io_kwargs", "mm_processor_kwargs", "mm_payload", "return_mm_kwargs", "return_token_offsets",
    "kv_transfer_params", "ec_transfer_params", "prompt_embeds", "suffix", "refusal", "annotations", "audio",
    "function_call",
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ChatCompletionRequest, pb.ChatRequest),
        (CompletionRequest, pb.CompletionRequest),
        (ChatCompletionResponse, pb.ChatResponse),
        (ChatCompletionResponseChoice, pb.ChatChoice),
        (ChatMessage, pb.ChatMessage),
        (ChatCompletionStreamResponse, pb.ChatChunk),
        (ChatCompletionResponseStreamChoice, pb.ChatChunkChoice),
        (DeltaMessage, pb.ChatDelta),
        (CompletionResponse, pb.CompletionResponse),
        (CompletionResponseChoice, pb.CompletionChoice),
        (StreamOptions, pb.StreamOptions),
        (TokenizeChatRequest, pb.TokenizeRequest),
        (TokenizeCompletionRequest, pb.TokenizeRequest),
        (TokenizeResponse, pb.TokenizeResponse),
        (DetokenizeRequest, pb.DetokenizeRequest),
    ],
)
def test_the_proto_has_every_field_of_vllms_that_means_something_here(model: Any, message: Any) -> None:
    missing = model.model_fields.keys() - message.DESCRIPTOR.fields_by_name.keys()
    assert missing <= _LEFT_OUT, missing - _LEFT_OUT
