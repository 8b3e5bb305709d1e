"""One long stream, and whatever happens in its middle."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from clusters import Cluster, wait_for

LONG: dict[str, Any] = {
    "model": "moeray-tiny", "messages": [{"role": "user", "content": "What is moeray?"}], "temperature": 0,
    "max_tokens": 2000, "ignore_eos": True, "stream": True,
}  # fmt: skip
HARM_AT = 10
"""Events of a stream before something happens."""


def stream(running: Cluster, max_tokens: int = LONG["max_tokens"]) -> Iterator[dict[str, Any]]:
    """Events of one long stream, errors included."""
    body = json.dumps(LONG | {"max_tokens": max_tokens}).encode()
    request = urllib.request.Request(f"{running.http}/v1/chat/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=180) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


def text_of(running: Cluster, harm: Callable[[], None] = lambda: None, max_tokens: int = LONG["max_tokens"]) -> str:
    """A whole stream's text; harm is done in its middle."""
    text = []
    for count, event in enumerate(stream(running, max_tokens)):
        if count == HARM_AT:
            harm()
        assert "error" not in event, event
        text.append(event["choices"][0]["delta"].get("content") or "" if event["choices"] else "")
    return "".join(text)


def wait_until_healed(running: Cluster, generation: int = 1, shards: int = 2, groups: int = 2) -> None:
    """So many of each serve, in this generation or a later one."""

    def healed() -> bool:
        state = running.status()
        ready = [process["role"] for process in state["processes"] if process["state"] == "ready"]
        return (
            state["generation"] >= generation and state["is_complete"]
            and ready.count("attention_shard") == shards and ready.count("expert_group") == groups
        )  # fmt: skip

    wait_for(healed, 240, "healing")
    wait_for(
        lambda: running.post("/v1/chat/completions", LONG | {"stream": False, "max_tokens": 4})[0] == 200, 60, "serving"
    )
