"""What the API does, feature by feature: asked over HTTP by a real SDK and over gRPC, and what must hold of the answer.

The table in docs/api.md is written from this (`make api-docs`); the tests hold it to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from answers import Answer
from conformance.clients import Clients
from front_process import MODEL, chat

from moeray.tiny.dialogues import TIME_TOOL, WEATHER_TOOL

Holds = Callable[[Any], None]
Way = Callable[[Clients], Any]


@dataclass(frozen=True)
class Feature:
    """One row.

    Attributes:
        http, grpc: how it is asked, or why it cannot be.
        holds: raises AssertionError unless the answer, of either, is what it must be.
    """

    section: str
    name: str
    http: Way | str
    grpc: Way | str
    holds: Holds


HTTP_ONLY = "an HTTP protocol of its own; Chat has what it asks for"
ANSWER = "An expert group is a process that owns a slice of every layer's routed experts."
TOOLS = [WEATHER_TOOL, TIME_TOOL]
WEATHER = [{"role": "user", "content": "What's the weather like in Lisbon?"}]
THINK: dict[str, Any] = {"chat_template_kwargs": {"thinking": True}, "max_tokens": 60}
COMPLETION: dict[str, Any] = {
    "model": MODEL, "prompt": "moeray is", "temperature": 0, "max_tokens": 8, "ignore_eos": True
}  # fmt: skip
THOUGHT: dict[str, Any] = {"prompt": "What is an expert group?</think>", "ignore_eos": False}
"""Where a model thinks, a constraint holds from the end of its thought on; a completion's prompt says where that is."""
SCHEMA = {"enum": ["small", "large"]}
OF_THE_SCHEMA = '"(small|large)"'


def _chats(section: str, *rows: tuple[str, dict[str, Any], Holds], stream: bool = False) -> list[Feature]:
    return [
        Feature(
            section,
            name,
            lambda clients, ask=ask: clients.chat(chat(**ask), stream=stream),
            lambda clients, ask=ask: clients.grpc_chat(chat(**ask), stream=stream),
            holds,
        )
        for name, ask, holds in rows
    ]


def _completions(*rows: tuple[str, dict[str, Any], Holds], stream: bool = False) -> list[Feature]:
    return [
        Feature(
            "Completions",
            name,
            lambda clients, ask=ask: clients.complete(COMPLETION | ask, stream=stream),
            lambda clients, ask=ask: clients.grpc_complete(COMPLETION | ask, stream=stream),
            holds,
        )
        for name, ask, holds in rows
    ]


# ---- what must hold


def says(text: str) -> Holds:
    def holds(answer: Answer) -> None:
        assert answer.choices[0].text == text, answer

    return holds


def all_hold(*each: Holds) -> Holds:
    def holds(answer: Any) -> None:
        for one in each:
            one(answer)

    return holds


def is_not(text: str) -> Holds:
    def holds(answer: Answer) -> None:
        assert answer.choices[0].text not in ("", text), answer

    return holds


def matches(pattern: str) -> Holds:
    def holds(answer: Answer) -> None:
        assert re.fullmatch(pattern, answer.choices[0].text), answer.choices[0].text

    return holds


def finishes(reason: str, tokens: int | None = None) -> Holds:
    def holds(answer: Answer) -> None:
        assert answer.choices[0].finish == reason, answer
        assert tokens is None or (answer.usage is not None and answer.usage["completion_tokens"] == tokens), (
            answer.usage
        )

    return holds


def calls(*expected: tuple[str, str]) -> Holds:
    """(function, city) of each call, in order."""

    def holds(answer: Answer) -> None:
        found = answer.choices[0].tool_calls
        assert [(call["name"], json.loads(call["arguments"])["city"]) for _, call in sorted(found.items())] == list(
            expected
        ), found

    return holds


def thinks(reasoning: str) -> Holds:
    def holds(answer: Answer) -> None:
        assert answer.choices[0].reasoning == reasoning, answer

    return holds


def in_pieces(answer: Answer) -> None:
    assert len(answer.messages) >= 8, len(answer.messages)


def _few(answer: Answer) -> None:
    assert len(answer.messages) <= 4, len(answer.messages)


def _stopped_at(answer: Answer, text: str) -> None:
    assert answer.choices[0].stop == text, answer


def _call_in_deltas(answer: Answer) -> None:
    deltas = [m for m in answer.messages if any(c["delta"].get("tool_calls") for c in m.get("choices", ()))]
    assert len(deltas) >= 3, deltas


def _reasoning_tokens(answer: Answer, number: int) -> None:
    assert answer.usage is not None
    assert answer.usage["completion_tokens_details"]["reasoning_tokens"] == number, answer.usage


def _echoed(answer: Answer) -> None:
    choice = answer.choices[0]
    assert choice.text.startswith("moeray is") and "".join(choice.tokens).startswith("moeray is"), choice


def usage(**expected: int) -> Holds:
    def holds(answer: Answer) -> None:
        assert answer.usage is not None
        assert {key: answer.usage[key] for key in expected} == expected, answer.usage

    return holds


def has(key: str, expected: Any) -> Holds:
    """In the first message, or in its first choice."""

    def holds(answer: Answer) -> None:
        message = answer.messages[0]
        found = message[key] if key in message else message["choices"][0][key]
        assert found == expected, found

    return holds


def _usage_in_every_chunk(answer: Answer) -> None:
    counts = [message["usage"]["completion_tokens"] for message in answer.messages if message.get("choices")]
    assert counts == sorted(counts) and counts[-1] == 19, counts


def _no_usage(answer: Answer) -> None:
    assert answer.usage is None, answer.usage


def _logprobs(number: int, alternatives: int) -> Holds:
    def holds(answer: Answer) -> None:
        tokens = [
            t for m in answer.messages for c in m["choices"] for t in (c.get("logprobs") or {}).get("content", ())
        ]
        assert len(tokens) == number and all(token["logprob"] <= 0 for token in tokens), tokens
        assert all(len(token["top_logprobs"]) >= alternatives for token in tokens)
        assert "".join(token["token"] for token in tokens) == answer.choices[0].text

    return holds


def _prompt_logprobs(answer: Answer) -> None:
    positions = answer.messages[0]["prompt_logprobs"]
    assert answer.usage is not None and len(positions) == answer.usage["prompt_tokens"]
    assert not positions[0] and all(positions[1:]), positions


def _choices(number: int, *, equal: bool = False) -> Holds:
    def holds(answer: Answer) -> None:
        assert sorted(answer.choices) == list(range(number))
        texts = {choice.text for choice in answer.choices.values()}
        assert (len(texts) == 1) == equal, texts

    return holds


_SEEDED: dict[str, Any] = {"temperature": 2.0, "seed": 7, "max_tokens": 16, "ignore_eos": True}
_OPEN = {"messages": [{"role": "user", "content": "Of zebras, rivers and nothing else"}], **_SEEDED}
"""A question that the bundled model has no answer to: what it says depends on the draw."""


def same_twice() -> Feature:
    def both(answers: tuple[Answer, Answer, Answer]) -> None:
        first, second, other = ([choice.text for _, choice in sorted(a.choices.items())] for a in answers)
        assert first == second != other

    def asked(call: Callable[..., Answer]) -> tuple[Answer, ...]:
        return tuple(call(chat(**_OPEN | {"seed": seed}), stream=False) for seed in (7, 7, 8))

    return Feature("Sampling", "seed", lambda c: asked(c.chat), lambda c: asked(c.grpc_chat), both)


def _parallel(block: str) -> dict[str, Any]:
    """The bundled model never calls two tools on its own: the grammar makes it."""
    return {"messages": WEATHER, "tools": TOOLS, "max_tokens": 150, "structured_outputs": {"choice": [block]}}


_D = "\uff5cDSML\uff5c"


def _invoke(name: str, city: str) -> str:
    parameter = f'<{_D}parameter name="city" string="true">{city}</{_D}parameter>'
    return f'<{_D}invoke name="{name}">\n{parameter}\n</{_D}invoke>\n'


TWO_CALLS = f"\n\n<{_D}tool_calls>\n{_invoke('get_weather', 'Lisbon')}{_invoke('get_time', 'Oslo')}</{_D}tool_calls>"
WITH_TOOLS: dict[str, Any] = {"messages": WEATHER, "tools": TOOLS, "max_tokens": 60}
RESULT = [
    *WEATHER,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "call_0",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Lisbon"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_0", "content": "sunny"},
]
LONG = [{"role": "user", "content": f"Read these notes. {ANSWER * 20} What is an expert group?"}]


def _cached() -> Feature:
    def holds(answers: tuple[Answer, ...]) -> None:
        first, second, other = ((a.usage or {})["prompt_tokens_details"].get("cached_tokens", 0) for a in answers)
        assert second >= 256 and other == 0, (first, second, other)

    def asked(call: Callable[..., Answer], salt: str) -> tuple[Answer, ...]:
        salts = (salt, salt, salt + "-other")
        return tuple(call(chat(messages=LONG, max_tokens=2, cache_salt=each), stream=False) for each in salts)

    return Feature(
        "Usage",
        "cached tokens; `cache_salt` keeps caches apart",
        lambda c: asked(c.chat, "http"),
        lambda c: asked(c.grpc_chat, "grpc"),
        holds,
    )


CHAT = [
    *_chats(
        "Chat",
        ("one question", {"max_tokens": 40}, all_hold(says(ANSWER), finishes("stop"))),
        (
            "turns, with a system prompt",
            {
                "messages": [
                    {"role": "system", "content": "Answer briefly."},
                    {"role": "user", "content": "The red key is zebra."},
                    {"role": "assistant", "content": "Noted."},
                    {"role": "user", "content": "What is the red key?"},
                ],
                "max_tokens": 20,
            },
            says("The red key is zebra."),
        ),
        (
            "content in parts",
            {
                "messages": [{"role": "user", "content": [{"type": "text", "text": "What is an expert group?"}]}],
                "max_tokens": 40,
            },
            says(ANSWER),
        ),
        ("`max_tokens`", {"max_tokens": 5}, finishes("length", 5)),
        ("`max_completion_tokens`", {"max_completion_tokens": 5, "max_tokens": 40}, finishes("length", 5)),
        (
            "`truncate_prompt_tokens`",
            {"truncate_prompt_tokens": 5, "return_token_ids": True},
            usage(prompt_tokens=5),
        ),
        (
            "`return_token_ids`, `return_prompt_text`",
            {"return_token_ids": True, "return_prompt_text": True, "max_tokens": 3},
            all_hold(
                has("prompt_token_ids", [0, 3, 324, 281, 319, 407, 556, 47, 4, 6]),
                has("token_ids", [771, 407, 556]),
                has("prompt_text", "<｜begin▁of▁sentence｜><｜User｜>What is an expert group?<｜Assistant｜></think>"),
            ),
        ),
        ("`request_id`", {"request_id": "mine-1"}, has("id", "chatcmpl-mine-1")),
        ("`priority`", {"priority": 5, "max_tokens": 40}, says(ANSWER)),
    ),
    *_chats(
        "Streaming",
        ("the answer in pieces", {"max_tokens": 40}, all_hold(says(ANSWER), in_pieces, _no_usage, finishes("stop"))),
        (
            "usage at the end",
            {"max_tokens": 40, "stream_options": {"include_usage": True}},
            usage(prompt_tokens=10, completion_tokens=19),
        ),
        (
            "usage in every chunk",
            {"max_tokens": 40, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
            _usage_in_every_chunk,
        ),
        ("n", {**_OPEN, "n": 3}, _choices(3)),
        ("logprobs", {"logprobs": True, "top_logprobs": 2}, _logprobs(8, 2)),
        (
            "`stream_interval`",
            {"max_tokens": 40, "stream_interval": 50},
            all_hold(says(ANSWER), _few),
        ),
        stream=True,
    ),
]


TOOL_CALLS = [
    *_chats(
        "Tools",
        ("auto", WITH_TOOLS, all_hold(calls(("get_weather", "Lisbon")), finishes("tool_calls"))),
        (
            "after a thought",
            {**WITH_TOOLS, **THINK},
            all_hold(calls(("get_weather", "Lisbon")), thinks("I need a tool.")),
        ),
        ("required", {**WITH_TOOLS, "tool_choice": "required"}, calls(("get_weather", "Lisbon"))),
        (
            "named",
            {**WITH_TOOLS, "tool_choice": {"type": "function", "function": {"name": "get_time"}}},
            calls(("get_time", "Lisbon")),
        ),
        ("none", {**WITH_TOOLS, "tool_choice": "none"}, calls()),
        ("parallel", _parallel(TWO_CALLS), calls(("get_weather", "Lisbon"), ("get_time", "Oslo"))),
        (
            "`parallel_tool_calls: false`",
            _parallel(TWO_CALLS) | {"parallel_tool_calls": False},
            calls(("get_weather", "Lisbon")),
        ),
        (
            "an answer from a tool's result",
            {"messages": RESULT, "tools": TOOLS, "max_tokens": 20},
            says("It is sunny in Lisbon."),
        ),
    ),
    *_chats(
        "Tools",
        (
            "streamed in deltas",
            WITH_TOOLS,
            all_hold(calls(("get_weather", "Lisbon")), finishes("tool_calls"), _call_in_deltas),
        ),
        (
            "parallel, streamed",
            _parallel(TWO_CALLS),
            calls(("get_weather", "Lisbon"), ("get_time", "Oslo")),
        ),
        stream=True,
    ),
]


STRUCTURED = _chats(
    "Structured outputs",
    (
        "JSON schema (`response_format`)",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
        matches(OF_THE_SCHEMA),
    ),
    ("JSON object", {"response_format": {"type": "json_object"}}, matches(r"\{(.|\n)*")),
    (
        "structural tag",
        {"response_format": {"type": "structural_tag", "format": {"type": "const_string", "value": "yes sir"}}},
        says("yes sir"),
    ),
    (
        "JSON schema (`structured_outputs`)",
        {"structured_outputs": {"json": SCHEMA}},
        matches(OF_THE_SCHEMA),
    ),
    ("regex", {"structured_outputs": {"regex": "[0-9]{3}-[0-9]{2}"}}, matches("[0-9]{3}-[0-9]{2}")),
    ("grammar", {"structured_outputs": {"grammar": 'root ::= "yes" | "no"'}}, matches("yes|no")),
    ("choice", {"structured_outputs": {"choice": ["red", "green"]}}, matches("red|green")),
    (
        "after a thought",
        {**THINK, "structured_outputs": {"choice": ["red", "green"]}},
        all_hold(matches("red|green"), thinks("I know this fact.")),
    ),
)
SAMPLING = [
    *_chats(
        "Sampling",
        ("n", {**_OPEN, "n": 3}, _choices(3)),
        ("`temperature: 0`", {"temperature": 0, "max_tokens": 40}, says(ANSWER)),
        ("`top_k`", {"temperature": 2.0, "top_k": 1, "max_tokens": 40}, says(ANSWER)),
        ("`top_p`", {"temperature": 1.0, "top_p": 0.01, "max_tokens": 40}, says(ANSWER)),
        ("`min_p`", {"temperature": 1.0, "min_p": 0.99, "max_tokens": 40}, says(ANSWER)),
        (
            "`stop`",
            {"stop": ["process", "slice"], "max_tokens": 40},
            all_hold(says("An expert group is a "), finishes("stop"), lambda a: _stopped_at(a, "process")),
        ),
        (
            "`include_stop_str_in_output`",
            {"stop": ["process"], "include_stop_str_in_output": True, "max_tokens": 40},
            says("An expert group is a process"),
        ),
        ("`stop_token_ids`", {"stop_token_ids": [556], "max_tokens": 40}, says("An expert")),
        ("`min_tokens`", {"min_tokens": 30, "max_tokens": 30}, finishes("length", 30)),
        ("`ignore_eos`", {"ignore_eos": True, "max_tokens": 25}, finishes("length", 25)),
        (
            "`frequency_penalty`, `presence_penalty`",
            {"logit_bias": {"300": 30}, "frequency_penalty": 2, "presence_penalty": 2, "max_tokens": 30},
            is_not("it" * 30),
        ),
        (
            "`repetition_penalty`",
            {"logit_bias": {"300": 30}, "repetition_penalty": 50.0},
            is_not("it" * 8),
        ),
        ("`logit_bias`", {"logit_bias": {"300": 100}, "max_tokens": 3}, says("ititit")),
        ("`bad_words`", {"bad_words": ["An"], "max_tokens": 40}, is_not(ANSWER)),
        ("`allowed_token_ids`", {"allowed_token_ids": [300], "max_tokens": 3}, says("ititit")),
        (
            "`repetition_detection`",
            {"logit_bias": {"300": 100}, "repetition_detection": {"max_pattern_size": 3, "min_count": 3}},
            finishes("repetition", 3),
        ),
        ("beam search", {"use_beam_search": True, "n": 2, "max_tokens": 4}, _choices(2)),
        ("logprobs", {"logprobs": True, "top_logprobs": 2}, _logprobs(8, 2)),
        ("`logprob_token_ids`", {"logprobs": True, "logprob_token_ids": [300]}, _logprobs(8, 2)),
        ("`prompt_logprobs`", {"prompt_logprobs": 1, "max_tokens": 2}, _prompt_logprobs),
    ),
    same_twice(),
]


def _thinking(effort: str, prompt_tokens: int) -> tuple[str, dict[str, Any], Holds]:
    ask = {"reasoning_effort": effort, "max_tokens": 60, "chat_template_kwargs": None}
    return (
        f"`reasoning_effort: {effort}`",
        ask,
        all_hold(says(ANSWER), thinks("I know this fact."), usage(prompt_tokens=prompt_tokens)),
    )


REASONING = [
    *_chats(
        "Reasoning",
        ("a thought beside the answer", THINK, all_hold(says(ANSWER), thinks("I know this fact."))),
        (
            "`reasoning_effort: none`",
            {"reasoning_effort": "none", "max_tokens": 60, "chat_template_kwargs": None},
            all_hold(says(ANSWER), thinks("")),
        ),
        _thinking("low", 10),
        _thinking("high", 88),
        _thinking("max", 99),
        ("`include_reasoning: false`", {**THINK, "include_reasoning": False}, all_hold(says(ANSWER), thinks(""))),
        ("`thinking_token_budget`", {**THINK, "thinking_token_budget": 2}, thinks("I know")),
        (
            "reasoning tokens in usage",
            THINK,
            lambda a: _reasoning_tokens(a, 5),
        ),
    ),
    *_chats("Reasoning", ("streamed", THINK, all_hold(says(ANSWER), thinks("I know this fact."))), stream=True),
]


COMPLETIONS = [
    *_completions(
        ("one prompt", {}, all_hold(finishes("length", 8), usage(prompt_tokens=2))),
        ("several prompts", {"prompt": ["moeray is", "moeray is"]}, _choices(2, equal=True)),
        ("token ids", {"prompt": [5, 6, 7]}, usage(prompt_tokens=3)),
        ("several prompts of token ids", {"prompt": [[5, 6], [5, 6]]}, _choices(2, equal=True)),
        ("`echo` with logprobs", {"echo": True, "logprobs": 1}, _echoed),
        ("JSON schema", {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
                         **THOUGHT}, matches(OF_THE_SCHEMA)),
        ("regex", {"structured_outputs": {"regex": "[0-9]{3}"}, **THOUGHT}, matches("[0-9]{3}")),
        ("n", {"n": 2, **_SEEDED}, _choices(2)),
    ),
    *_completions(
        ("streamed, with usage", {"stream_options": {"include_usage": True}},
         all_hold(in_pieces, usage(completion_tokens=8))),
        stream=True,
    ),
]  # fmt: skip
