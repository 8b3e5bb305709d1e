"""The OpenAI SDK against the real front over a real engine."""

from __future__ import annotations

from typing import Any

import pytest
from front_process import MODEL, Ingress, ShardProcess, chat, until
from openai import OpenAI

ASK: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What is an expert group?"}],
    "temperature": 0,
    "max_tokens": 8,
    "extra_body": {"chat_template_kwargs": {"thinking": False}, "ignore_eos": True},
}


@pytest.fixture(scope="module")
def client(ingress: Ingress) -> OpenAI:
    return OpenAI(base_url=f"{ingress.http}/v1", api_key="none", max_retries=0, timeout=60)


def test_the_served_model_is_listed_by_its_name(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert "/" not in str(model.model_extra)  # no path of ours


def test_a_stream_gives_the_text_of_the_whole_answer_token_by_token(client: OpenAI) -> None:
    whole = client.chat.completions.create(**ASK)
    chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))

    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) >= 8
    streamed = chunks[-1].usage
    assert whole.usage is not None and whole.usage.completion_tokens == 8 and streamed is not None
    assert (streamed.prompt_tokens, streamed.completion_tokens) == (whole.usage.prompt_tokens, 8)


def test_logprobs_have_the_asked_alternatives_and_the_chosen_token_is_the_best(client: OpenAI) -> None:
    answer = client.chat.completions.create(**ASK, logprobs=True, top_logprobs=3)

    tokens = answer.choices[0].logprobs
    assert tokens is not None and tokens.content is not None and len(tokens.content) == 8
    for token in tokens.content:
        assert len(token.top_logprobs) >= 3
        assert token.logprob == max(each.logprob for each in token.top_logprobs)


def test_n_choices_of_one_seed_are_the_same_on_a_second_try(client: OpenAI) -> None:
    ask = ASK | {"temperature": 1.0, "seed": 7, "n": 3}
    first, second = (client.chat.completions.create(**ask).choices for _ in range(2))

    assert [choice.index for choice in first] == [0, 1, 2]
    assert [choice.message.content for choice in first] == [choice.message.content for choice in second]


def test_a_stop_string_ends_the_answer_before_it(client: OpenAI) -> None:
    completion = {
        "model": MODEL,
        "prompt": "moeray is",
        "temperature": 0,
        "max_tokens": 24,
        "extra_body": {"ignore_eos": True},
    }
    text = client.completions.create(**completion).choices[0].text
    stop = text[len(text) // 2 :][:3]

    choice = client.completions.create(**completion, stop=[stop]).choices[0]

    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")


def test_tools_are_rendered_into_the_prompt(client: OpenAI) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    without = client.chat.completions.create(**ASK).usage
    with_tools = client.chat.completions.create(**ASK, tools=[tool]).usage

    assert without is not None and with_tools is not None
    assert with_tools.prompt_tokens > without.prompt_tokens + 20


def test_a_json_schema_holds_the_answer_to_it(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    ask = ASK | {"max_tokens": 40, "extra_body": {"chat_template_kwargs": {"thinking": False}}}
    answer = client.chat.completions.create(
        **ask, response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    )

    text = (answer.choices[0].message.content or "").replace(" ", "").replace("\n", "")
    assert text in ('{"ok":true}', '{"ok":false}') or answer.choices[0].finish_reason == "length"
    assert text.startswith("{")


def test_a_client_that_leaves_stops_its_request_in_the_engine(client: OpenAI, shared_shard: ShardProcess) -> None:
    ask = ASK | {"max_tokens": 3000}
    stream = client.chat.completions.create(**ask, stream=True)
    for _ in range(3):
        next(stream)
    assert shared_shard.info().num_running == 1

    stream.close()

    until(lambda: shared_shard.info().num_running == 0 and shared_shard.info().num_requests == 0)


def test_a_client_that_leaves_a_whole_answer_stops_it_too(ingress: Ingress, shared_shard: ShardProcess) -> None:
    with pytest.raises(TimeoutError):
        ingress.post("/v1/chat/completions", chat(max_tokens=3000, ignore_eos=True), timeout_s=1.5)

    until(lambda: shared_shard.info().num_running == 0 and shared_shard.info().num_requests == 0)
