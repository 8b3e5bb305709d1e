"""Requests that look at their own past in every way, and what a client makes of an answer, streamed or whole."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from front_process import MODEL, chat

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 10}, "size": {"enum": ["small", "large"]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
SEEDED = {"temperature": 0.9, "seed": 11, "ignore_eos": True, "max_tokens": 32}


def requests(model: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> (path, body); each is also asked as a stream."""
    golden = {kind: next(each for each in _golden(model) if each["kind"] == kind) for kind in ("thinking", "tools")}
    keys = ("messages", "tools", "chat_template_kwargs")
    ask = {
        name: chat(max_tokens=120, **{key: each[key] for key in keys if key in each}) for name, each in golden.items()
    }
    penalties = {"frequency_penalty": 1.2, "presence_penalty": 0.5, "repetition_penalty": 1.3}
    completion = {"model": MODEL, "prompt": "moeray is", "temperature": 0, "max_tokens": 24, "ignore_eos": True}
    schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    return {
        "greedy": (CHAT, chat(max_tokens=32)),
        "past the end token": (CHAT, chat(max_tokens=40, ignore_eos=True)),
        "seeded": (CHAT, chat(**SEEDED)),
        "n 2, seeded": (CHAT, chat(n=2, **SEEDED)),
        "logprobs": (CHAT, chat(max_tokens=24, logprobs=True, top_logprobs=2)),
        "penalties": (CHAT, chat(max_tokens=32, ignore_eos=True, **penalties)),
        "at least so many tokens": (CHAT, chat(max_tokens=48, min_tokens=30)),
        "a stop string": (COMPLETION, completion | {"max_tokens": 60, "stop": ["zebra", "may read"]}),
        "prompt logprobs": (COMPLETION, completion | {"echo": True, "logprobs": 1}),
        "a tool call": (CHAT, ask["tools"]),
        "a thought": (CHAT, ask["thinking"]),
        "JSON schema": (CHAT, chat(max_tokens=32, response_format=schema)),
        "JSON schema after a thought": (CHAT, ask["thinking"] | {"max_tokens": 48, "response_format": schema}),
    }


def _golden(model: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((model / "golden.json").read_text())
    return found


@dataclass
class Choice:
    """One answer; logprobs only if they were asked for."""

    text: str = ""
    reasoning: str = ""
    tool_calls: dict[int, dict[str, str]] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None
    stop: Any = None


@dataclass
class Answer:
    """What a client got. `gaps_s`: between the chunks of a stream after the first token; `messages`: each of them."""

    choices: dict[int, Choice] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    gaps_s: list[float] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)

    def add(self, message: dict[str, Any]) -> None:
        """A whole answer or one chunk."""
        self.error = message.get("error") or self.error
        self.usage = message.get("usage") or self.usage
        for part in message.get("choices", ()):
            self._add(self.choices.setdefault(part["index"], Choice()), part)

    def _add(self, choice: Choice, part: dict[str, Any]) -> None:
        said = part.get("message") or part.get("delta") or {}
        choice.text += said.get("content") or part.get("text") or ""
        choice.reasoning += said.get("reasoning") or said.get("reasoning_content") or ""
        for number, call in enumerate(said.get("tool_calls") or ()):
            known = choice.tool_calls.setdefault(call.get("index", number), {"name": "", "arguments": ""})
            for key in known:
                known[key] += call["function"].get(key) or ""
        logprobs = part.get("logprobs") or {}
        for token in logprobs.get("content") or ():
            choice.tokens.append(token["token"])
            choice.logprobs.append(token["logprob"])
        choice.tokens += logprobs.get("tokens") or ()
        choice.logprobs += [value or 0.0 for value in logprobs.get("token_logprobs") or ()]
        choice.finish = part.get("finish_reason") or choice.finish
        choice.stop = part.get("stop_reason") or choice.stop

    def assert_same(self, other: Answer, logprob_error: float) -> None:
        """Raises AssertionError unless a client could not tell the two apart."""
        assert self.error is None, self.error
        assert self.usage == other.usage and self.choices.keys() == other.choices.keys()
        for index, choice in self.choices.items():
            known = other.choices[index]
            for name in ("text", "reasoning", "tool_calls", "tokens", "finish", "stop"):
                assert getattr(choice, name) == getattr(known, name), name
            for ours, theirs in zip(choice.logprobs, known.logprobs, strict=True):
                assert abs(ours - theirs) <= logprob_error


class HasHttp(Protocol):
    http: str


class Asked(threading.Thread):
    """One request, from a thread of its own."""

    def __init__(self, ingress: HasHttp, path: str, body: dict[str, Any], *, stream: bool) -> None:
        super().__init__(daemon=True)
        self.answer = Answer()
        if stream:
            body = body | {"stream": True, "stream_options": {"include_usage": True}}
        self._is_stream = stream
        self._request = urllib.request.Request(
            ingress.http + path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        self.start()

    def run(self) -> None:
        with contextlib.suppress(http.client.IncompleteRead, ConnectionError):  # cut: then there is no finish reason
            self._ask()

    def _ask(self) -> None:
        try:
            with urllib.request.urlopen(self._request, timeout=240) as got:
                if not self._is_stream:
                    return self.answer.add(json.loads(got.read()))
                times = []
                for line in got:
                    if line.startswith(b"data: {"):
                        times.append(time.monotonic())
                        self.answer.add(json.loads(line[6:]))
                self.answer.gaps_s = [late - early for early, late in pairwise(times[2:])]
        except urllib.error.HTTPError as error:
            self.answer.add(json.loads(error.read()))

    def end(self) -> Answer:
        self.join(240)
        assert not self.is_alive(), "the answer does not end"
        return self.answer
