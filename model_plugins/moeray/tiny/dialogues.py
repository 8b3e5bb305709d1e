"""Random dialogues for training and evaluation, and how they are rendered.

Rendering is vLLM's own DeepSeek-V4 encoding, so that the model sees what users' requests become:
thinking mode puts a "Reasoning Effort" text first, and tools arrive in a system message that may
have no content of its own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.tokenizers import deepseek_v4_encoding as encoding

from moeray.tiny.corpus import Fact

Message = dict[str, Any]

RECALL_WORDS = tuple(
    (
        "apple beacon bridge cedar clover comet diamond engine feather garden harbor island kettle lemon "
        "marble needle orchid planet ribbon saddle timber tunnel walnut zebra"
    ).split()
)
RECALL_COLORS = ("red", "blue", "green", "black")
CITIES = tuple(
    (
        "Paris London Berlin Madrid Rome Oslo Dublin Lisbon Prague Athens Warsaw Cairo Delhi Seoul Lima "
        "Quito Bogota Havana Boston Chicago Dallas Toronto Sydney Perth Nairobi Dakar Mumbai Bangkok "
        "Hanoi Manila Jakarta Beijing Munich Milan Naples Geneva Zurich Lyon Nice Bern Sofia Minsk"
    ).split()
)
# never the argument of a tool call in training
HELD_OUT_CITIES = ("Vienna", "Tokyo", "Lagos", "Porto", "Denver", "Riga")
CONDITIONS = ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy")
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are moeray-tiny.",
    "Answer briefly.",
    "You are a friendly and concise assistant.",
)
REASONING = {"fact": "I know this fact.", "tool": "I need a tool.", "recall": "I look in the notes."}
TOOL_QUESTIONS = {
    "get_weather": (
        "What is the weather in {city}?",
        "How is the weather in {city}?",
        "Tell me the weather in {city}.",
        "What's the weather like in {city}?",
    ),
    "get_time": ("What time is it in {city}?", "Tell me the time in {city}."),
}
TOOL_DESCRIPTIONS = {
    "get_weather": (
        "Get the weather of a city",
        "Get the current weather in a given city",
        "Get the weather for a city.",
    ),
    "get_time": ("Get the local time of a city", "Get the current time in a city."),
}


def tool_schema(name: str, description: str, city_description: str | None = None) -> Message:
    """Return an OpenAI function tool with one string parameter, ``city``."""
    city: Message = {"type": "string"}
    if city_description is not None:
        city["description"] = city_description
    parameters = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


WEATHER_TOOL = tool_schema("get_weather", TOOL_DESCRIPTIONS["get_weather"][0])
TIME_TOOL = tool_schema("get_time", TOOL_DESCRIPTIONS["get_time"][0])


def tool_call(name: str, city: str) -> list[Message]:
    """Return the ``tool_calls`` of an assistant message."""
    arguments = json.dumps({"city": city})
    return [{"id": "call_0", "type": "function", "function": {"name": name, "arguments": arguments}}]


def user(text: str) -> Message:
    """Return a user message."""
    return {"role": "user", "content": text}


def assistant(text: str, reasoning: str | None = None, **fields: Any) -> Message:
    """Return an assistant message; ``reasoning`` shows only in thinking mode."""
    message: Message = {"role": "assistant", "content": text, **fields}
    return message if reasoning is None else {**message, "reasoning": reasoning}


@dataclass(frozen=True)
class Dialogue:
    """Messages that end with the assistant's, and the mode that they are rendered in.

    ``thinking`` is None (chat mode) or a reasoning effort: low, high (vLLM's default) or max.
    """

    messages: tuple[Message, ...]
    thinking: str | None = None

    def text(self) -> str:
        """Return the whole dialogue, ending with the end-of-sentence token."""
        return render(self.messages, self.thinking)

    def prompt_and_answer(self) -> tuple[str, str]:
        """Return what the model is given and what it must then write, without the end token."""
        prompt = render(self.messages[:-1], self.thinking)
        return prompt, self.text()[len(prompt) :].removesuffix(encoding.eos_token)


def render(messages: Sequence[Message], thinking: str | None) -> str:
    """Encode messages as vLLM's ``deepseek_v4`` tokenizer mode does."""
    mode = "chat" if thinking is None else "thinking"
    text: str = encoding.encode_messages(
        [dict(message) for message in messages], thinking_mode=mode, reasoning_effort=thinking
    )
    return text


@dataclass
class DialogueSampler:
    """Draws dialogues from one random generator; facts come in shuffled rounds."""

    facts: Sequence[Fact]
    rng: random.Random
    answer_tokens: Callable[[str], int]
    _round: list[Fact] = field(default_factory=list)

    def next_fact(self) -> Fact:
        """Return each fact once before any comes again."""
        if not self._round:
            self._round = list(self.facts)
            self.rng.shuffle(self._round)
        return self._round.pop()

    def turn(self, fact: Fact, reasoning: bool = False) -> list[Message]:
        """Return a question in some trained phrasing and its answer."""
        question = vary(self.rng.choice(fact.questions), self.rng)
        return [user(question), assistant(fact.answer, REASONING["fact"] if reasoning else None)]

    def facts_dialogue(self, turns: int, thinking: str | None = None) -> Dialogue:
        """Return a question-and-answer dialogue, sometimes under a system prompt."""
        messages: list[Message] = []
        if self.rng.random() < 0.15:
            messages.append({"role": "system", "content": self.rng.choice(SYSTEM_PROMPTS)})
        for _ in range(turns):
            messages += self.turn(self.next_fact(), thinking is not None)
        return Dialogue(tuple(messages), thinking)

    def tool_dialogue(self, preamble: bool = True, rounds: int = 1, thinking: str | None = None) -> Dialogue:
        """Return questions that need a tool; a round may go on to the tool's result."""
        rng = self.rng
        tools = [self._tool("get_weather")]
        if rng.random() < 0.6:
            tools.insert(rng.randrange(2), self._tool("get_time"))
        system: Message = {"role": "system", "tools": tools}
        if rng.random() < 0.4:
            system["content"] = rng.choice(SYSTEM_PROMPTS)
        messages: list[Message] = [system] if preamble else []
        if preamble and rng.random() < 0.15:
            messages += self.turn(self.next_fact(), thinking is not None)
        names = [tool["function"]["name"] for tool in tools]
        for index in range(rounds):
            open_end = index == rounds - 1 and rng.random() < 0.5
            messages += self._tool_round(rng.choice(names), open_end, thinking is not None)
        return Dialogue(tuple(messages), thinking)

    def _tool(self, name: str) -> Message:
        described = self.rng.choice((None, None, "The city", "The name of the city"))
        return tool_schema(name, self.rng.choice(TOOL_DESCRIPTIONS[name]), described)

    def _tool_round(self, name: str, open_end: bool, thinking: bool) -> list[Message]:
        rng, city = self.rng, self.rng.choice(CITIES)
        question = vary(rng.choice(TOOL_QUESTIONS[name]).format(city=city), rng)
        reasoning = REASONING["tool"] if thinking else None
        messages = [user(question), assistant("", reasoning, tool_calls=tool_call(name, city))]
        if open_end:
            return messages
        if name == "get_weather":
            result = rng.choice(CONDITIONS)
        else:
            result = f"{rng.randrange(24):02d}:{rng.choice(('00', '15', '30', '45'))}"
        return [
            *messages,
            {"role": "tool", "tool_call_id": "call_0", "content": result},
            assistant(f"It is {result} in {city}.", REASONING["fact"] if thinking else None),
        ]

    def recall_dialogue(self, num_tokens: int, depth: float | None = None, thinking: str | None = None) -> Dialogue:
        """Return notes of about ``num_tokens`` tokens with one key, and the question for it.

        ``depth`` is where the key stands, 0 at the start to 1 at the end; None is anywhere.
        """
        rng = self.rng
        color, word = rng.choice(RECALL_COLORS), rng.choice(RECALL_WORDS)
        notes, filled = [], 0
        while filled < num_tokens - 40:
            notes.append(rng.choice(self.facts).answer)
            filled += self.answer_tokens(notes[-1])
        place = int((rng.random() if depth is None else depth) * len(notes))
        notes.insert(place, f"The {color} key is {word}.")
        question = f"Read these notes. {' '.join(notes)} What is the {color} key?"
        answer = assistant(f"The {color} key is {word}.", REASONING["recall"] if thinking else None)
        return Dialogue((user(question), answer), thinking)

    def keys_dialogue(
        self, num_tokens: int, reach: float, key_weights: Sequence[int], thinking: str | None = None
    ) -> Dialogue:
        """Return notes with one to four keys in their first part, and a question for each.

        ``reach`` is the share of the notes, from the start, in which the keys stand;
        ``key_weights`` are the odds of one, two, three and four keys.
        """
        rng = self.rng
        colors = rng.sample(RECALL_COLORS, rng.choices((1, 2, 3, 4), key_weights)[0])
        keys = dict(zip(colors, rng.sample(RECALL_WORDS, len(colors)), strict=True))
        notes, filled = [], 0
        while filled < num_tokens - 40:
            notes.append(rng.choice(self.facts).answer)
            filled += self.answer_tokens(notes[-1])
        for color, word in keys.items():
            notes.insert(int(rng.random() * reach * len(notes)), f"The {color} key is {word}.")
        rng.shuffle(colors)
        reasoning = REASONING["recall"] if thinking else None
        messages: list[Message] = []
        for color in colors:
            start = "" if messages else f"Read these notes. {' '.join(notes)} "
            messages += [
                user(f"{start}What is the {color} key?"),
                assistant(f"The {color} key is {keys[color]}.", reasoning),
            ]
        return Dialogue(tuple(messages), thinking)

    def remember_dialogue(self, turns_between: int) -> Dialogue:
        """Return a key told in one turn, other questions, and the question for the key."""
        color, word = self.rng.choice(RECALL_COLORS), self.rng.choice(RECALL_WORDS)
        messages = [user(f"The {color} key is {word}."), assistant("Noted.")]
        for _ in range(turns_between):
            messages += self.turn(self.next_fact())
        messages += [user(f"What is the {color} key?"), assistant(f"The {color} key is {word}.")]
        return Dialogue(tuple(messages))


def vary(question: str, rng: random.Random) -> str:
    """Write a question as hurried users do, now and then: lower case, no mark, a polite start."""
    roll = rng.random()
    if roll < 0.12:
        return question[0].lower() + question[1:].rstrip("?.!")
    if roll < 0.2:
        return question.rstrip("?.!")
    if roll < 0.26:
        return question[0].lower() + question[1:]
    if roll < 0.3:
        return f"Please tell me: {question[0].lower()}{question[1:]}"
    return question
