"""What clients ask for: a fixed set of requests of every kind, each with one right answer."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from clusters import golden_request

MODEL = "moeray-tiny"
LONG_TOKENS = 260
NUM_FLOWING = 4
_ONLY_TEXT = '{"group": "An expert group owns a slice of the routed experts", "states": ["starting", "ready", "lost"]}'
"""A grammar without a choice: where the model wavers, the last bits of its numbers would decide."""


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        name: its key in the fault-free run.
        protocol: http or grpc.
        body: OpenAI's JSON, `stream` included.
        path: of HTTP.
        abort_after: chunks after which the client goes away; None reads to the end.
        flows: a stream whose every token comes in a chunk at once, so that a gap in it is a stall and nothing else.
    """

    name: str
    protocol: str
    body: dict[str, Any] = field(hash=False)
    abort_after: int | None = None
    flows: bool = False
    path: str = "/v1/chat/completions"

    @property
    def is_stream(self) -> bool:
        return bool(self.body.get("stream"))


def catalogue(golden: list[dict[str, Any]], seed: int) -> list[Ask]:
    """About sixty requests: every kind by both protocols, streamed and whole.

    The questions are the bundled model's golden prompts, whose answers are ahead of any other by a wide margin.
    Sampling has a seed.
    """
    rng = random.Random(seed)
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for prompt in golden:
        by_kind.setdefault(prompt["kind"], []).append(prompt)
    asks: list[Ask] = []
    for kind, prompts in sorted(by_kind.items()):
        for prompt in rng.sample(prompts, 3):
            asks += _both_ways(f"{kind} {prompt['id']}", golden_request(prompt))
    drawn = rng.sample(by_kind["single_turn"], 7)
    single = [golden_request(prompt) for prompt in drawn]
    asks += _both_ways("n = 3, seeded", single[0] | {"n": 3, "temperature": 0.7, "seed": 11})
    asks += _both_ways("seeded", single[1] | {"temperature": 0.8, "seed": 5, "top_p": 0.95})
    asks += _both_ways("logprobs", single[2] | {"logprobs": True, "top_logprobs": 2})
    asks += _both_ways("penalties", single[3] | {"frequency_penalty": 0.2, "presence_penalty": 0.1, "min_tokens": 4})
    asks += _both_ways("stop string", single[4] | {"stop": [" the "], "include_stop_str_in_output": True})
    grammar = _both_ways("grammar", single[5] | {"structured_outputs": {"choice": [_ONLY_TEXT]}})
    asks += [ask for ask in grammar if ask.protocol == "http"]  # gRPC has JSON schemas only
    asks += _both_ways("JSON schema", single[6] | {"response_format": _only(drawn[6]["expected"])})
    for number in range(2):
        asks += _both_ways(f"long {number}", _long(number))
    for number in range(NUM_FLOWING):
        # Tokens without text come in no chunk otherwise; gRPC has no such field.
        every_token = _long(number) | {"stream": True, "return_token_ids": True}
        asks.append(Ask(f"every token {number}", "http", every_token, flows=True))
    cut = _long(2) | {"stream": True}
    asks += [Ask(f"aborted by {protocol}", protocol, cut, abort_after=5) for protocol in ("http", "grpc")]
    return asks


def _both_ways(name: str, body: dict[str, Any]) -> list[Ask]:
    whole = {**body, "stream": False}
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    return [
        Ask(f"{name}, {how} by {protocol}", protocol, ask)
        for protocol in ("http", "grpc")
        for how, ask in (("whole", whole), ("streamed", streamed))
    ]


def _only(text: str) -> dict[str, Any]:
    """A JSON schema without a choice. Not of an object: where its tokens end (`{` or `{"`), the model wavers; in the
    quoted text of its own answer it does not.
    """
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"const": text}}}


def _long(number: int) -> dict[str, Any]:
    """Many tokens: the model goes on after its answer has ended."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"Count to {number + 7}."}],
        "temperature": 0,
        "max_tokens": LONG_TOKENS + 20 * number,
        "ignore_eos": True,
        "chat_template_kwargs": {"thinking": False},
    }
