"""Golden prompts: questions whose exact answers detect any broken part of the cluster."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moeray.tiny.dialogues import Dialogue, Message
from moeray.tiny.measure import Outcome

MIN_MARGIN = 1.0
MAX_RECALL_TOKENS = 700
# suite name -> kind in golden.json and how many are taken at most, the surest first
KINDS: dict[str, tuple[str, int]] = {
    "facts": ("single_turn", 200),
    "facts, under a system prompt": ("single_turn", 20),
    "chat of 2 turns": ("multi_turn", 15),
    "chat of 3 turns": ("multi_turn", 15),
    "a key told two turns before": ("multi_turn", 10),
    "thinking, effort high": ("thinking", 15),
    "thinking, effort low": ("thinking", 5),
    "tool call, trained cities": ("tools", 12),
    "tool call, second tool": ("tools", 4),
    "tool call, thinking": ("tools", 4),
    "answer from a tool result": ("tools", 6),
    "recall over 300 tokens": ("recall", 8),
    "recall over 600 tokens": ("recall", 8),
}


def select(suites: Mapping[str, Sequence[Dialogue]], outcomes: Mapping[str, Sequence[Outcome]]) -> list[dict[str, Any]]:
    """Return the golden entries: exact answers with at least ``MIN_MARGIN``.

    Facts keep their order; of the other suites the widest margins are taken.
    """
    golden: list[dict[str, Any]] = []
    for suite, (kind, limit) in KINDS.items():
        pairs = [
            (dialogue, outcome)
            for dialogue, outcome in zip(suites[suite], outcomes[suite], strict=True)
            if outcome.exact and outcome.margin >= MIN_MARGIN
        ]
        if kind != "single_turn":
            pairs.sort(key=lambda pair: -pair[1].margin)
        for dialogue, outcome in pairs[:limit]:
            golden.append({"id": f"{kind}-{len(golden):03d}", "kind": kind} | entry(dialogue, outcome))
    return golden


def entry(dialogue: Dialogue, outcome: Outcome) -> dict[str, Any]:
    """Return what a client sends and what it must get.

    ``expected`` is the whole generated text without the end token; content, reasoning and tool
    calls are what vLLM's parsers must make of it.
    """
    *asked, answer = dialogue.messages
    messages, tools = _client_form(asked)
    out: dict[str, Any] = {"messages": messages}
    if tools:
        out["tools"] = tools
    out["chat_template_kwargs"] = (
        {"thinking": False} if dialogue.thinking is None else {"thinking": True, "reasoning_effort": dialogue.thinking}
    )
    out["expected"] = dialogue.prompt_and_answer()[1]
    out["expected_content"] = answer["content"] or None
    if "reasoning" in answer:
        out["expected_reasoning"] = answer["reasoning"]
    if "tool_calls" in answer:
        functions = [call["function"] for call in answer["tool_calls"]]
        out["expected_tool_calls"] = [{"name": f["name"], "arguments": json.loads(f["arguments"])} for f in functions]
    out["margin"] = round(outcome.margin, 3)
    out["prompt_tokens"] = outcome.prompt_tokens
    return out


def _client_form(messages: Iterable[Message]) -> tuple[list[Message], list[Message]]:
    """Move tools from the system message to where an OpenAI client puts them.

    vLLM puts them back, and invents an empty system message where there is none.
    """
    out, tools = [], []
    for message in messages:
        message = dict(message)
        tools += message.pop("tools", [])
        if set(message) != {"role"}:
            out.append(message)
    return out, tools


def write(path: Path, golden: Sequence[Mapping[str, Any]]) -> None:
    """Write golden.json: one entry per line, so that a change shows as a line."""
    lines = ",\n".join(json.dumps(item, ensure_ascii=False) for item in golden)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
