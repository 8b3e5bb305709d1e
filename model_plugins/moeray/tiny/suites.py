"""The questions that a checkpoint is measured on: fixed, named sets of dialogues."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from moeray.tiny import dialogues
from moeray.tiny.corpus import Fact
from moeray.tiny.dialogues import REASONING, Dialogue, DialogueSampler, Message, assistant, user

RECALL_LENGTHS = (60, 120, 300, 600, 1000, 1500, 2000, 3000, 4000)
NUM_RECALLS = 24
NUM_LONG_RECALLS = 12
LONG = 1500
NUM_CHATS = 40
NUM_THINKING = 40
TOOLS = (dialogues.WEATHER_TOOL, dialogues.TIME_TOOL)


def fact_suites(facts: Sequence[Fact]) -> dict[str, list[Dialogue]]:
    """Return one-turn questions in trained and held-out phrasings."""

    def ask(question: str, fact: Fact, system: str | None = None) -> Dialogue:
        first = [] if system is None else [{"role": "system", "content": system}]
        return Dialogue((*first, user(question), assistant(fact.answer)))

    prompts = dialogues.SYSTEM_PROMPTS
    return {
        "facts": [ask(fact.questions[0], fact) for fact in facts],
        "facts, every trained phrasing": [ask(q, fact) for fact in facts for q in fact.questions],
        "facts, held-out phrasing": [ask(fact.held_out, fact) for fact in facts],
        "facts, lower case without mark": [
            ask(q[0].lower() + q[1:].rstrip("?.!"), fact) for fact in facts for q in fact.questions[:1]
        ],
        "facts, under a system prompt": [
            ask(fact.questions[i % 2], fact, prompts[i % len(prompts)]) for i, fact in enumerate(facts)
        ],
    }


def chat_suites(facts: Sequence[Fact]) -> dict[str, list[Dialogue]]:
    """Return several-turn and thinking dialogues in trained phrasings."""
    rng = random.Random(101)  # noqa: S311 - data, not secrets

    def chat(turns: int) -> Dialogue:
        messages: list[Message] = []
        for fact in rng.sample(list(facts), turns):
            messages += [user(rng.choice(fact.questions)), assistant(fact.answer)]
        return Dialogue(tuple(messages))

    def think(fact: Fact, effort: str) -> Dialogue:
        turn = (user(fact.questions[0]), assistant(fact.answer, REASONING["fact"]))
        return Dialogue(turn, effort)

    sampler = DialogueSampler(facts, rng, len)
    out = {f"chat of {turns} turns": [chat(turns) for _ in range(NUM_CHATS)] for turns in (2, 3, 5)}
    out["a key told two turns before"] = [sampler.remember_dialogue(1) for _ in range(NUM_CHATS)]
    for effort in ("high", "low", "max"):
        chosen = rng.sample(list(facts), NUM_THINKING)
        out[f"thinking, effort {effort}"] = [think(fact, effort) for fact in chosen]
    return out


def tool_suites() -> dict[str, list[Dialogue]]:
    """Return tool calls for trained and held-out cities, with the result's turn, and thinking."""

    def call(city: str, index: int, thinking: str | None = None, name: str = "get_weather") -> Dialogue:
        questions = dialogues.TOOL_QUESTIONS[name]
        question = questions[index % len(questions)].format(city=city)
        reasoning = None if thinking is None else REASONING["tool"]
        called = assistant("", reasoning, tool_calls=dialogues.tool_call(name, city))
        system: Message = {"role": "system", "tools": list(TOOLS)}
        return Dialogue((system, user(question), called), thinking)

    def result(city: str, index: int) -> Dialogue:
        sky = dialogues.CONDITIONS[index % len(dialogues.CONDITIONS)]
        back: Message = {"role": "tool", "tool_call_id": "call_0", "content": sky}
        return Dialogue((*call(city, index).messages, back, assistant(f"It is {sky} in {city}.")))

    cities = list(enumerate(dialogues.CITIES))
    return {
        "tool call, trained cities": [call(city, i) for i, city in cities],
        "tool call, held-out cities": [call(city, i) for i, city in enumerate(dialogues.HELD_OUT_CITIES)],
        "tool call, second tool": [call(city, i, name="get_time") for i, city in cities[:20]],
        "tool call, thinking": [call(city, i, "high") for i, city in cities[:20]],
        "answer from a tool result": [result(city, i) for i, city in cities[:20]],
    }


def recall_suites(facts: Sequence[Fact], answer_tokens: Callable[[str], int]) -> dict[str, list[Dialogue]]:
    """Return notes of growing length with the key near the start: the longest way back."""
    out = {}
    for length in RECALL_LENGTHS:
        sampler = DialogueSampler(facts, random.Random(length), answer_tokens)  # noqa: S311 - data, not secrets
        count = NUM_RECALLS if length <= LONG else NUM_LONG_RECALLS
        out[f"recall over {length} tokens"] = [sampler.recall_dialogue(length, depth=0.02) for _ in range(count)]
    return out
