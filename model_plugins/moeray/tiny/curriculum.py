"""What the model is trained on, stage by stage, and how a batch of it is made."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.tokenizers import deepseek_v4_encoding as encoding

from moeray.tiny import dialogues
from moeray.tiny.corpus import Fact
from moeray.tiny.dialogues import Dialogue, DialogueSampler
from moeray.tiny.guidance import RecallGuide

IGNORED = -100
PAD_ID = 2
COPY_WEIGHT = 4.0
BATCH_TOKENS = 1800
# Tokens of the notes, by kind of batch. A note fits the sliding window; the rest must be read
# through compressed entries.
NOTE_LENGTHS = {
    "note": (30, 60, 90, 120),
    "near": (180, 220, 260, 300),
    "dense": (170, 190, 210),
    "page": (200, 300, 450, 700),
    "far": (300, 450, 700, 1000),
    "book": (1200, 2000),
}
# In these kinds one to four keys (with these odds) stand in this first share of the notes.
KEYS = {"near": (0.35, (3, 2, 2, 3)), "far": (0.8, (3, 2, 2, 3)), "dense": (0.35, (0, 0, 0, 1))}
MAX_NOTES = 20


@dataclass(frozen=True)
class Stage:
    """A span of training.

    ``mix`` weighs the kinds of batches; the learning rate goes from ``lr`` to ``final_lr`` along
    half a cosine, or the first ``cosine_part`` of it. ``guidance`` weighs the ``RecallGuide``'s loss on the
    attention; ``indexer_from`` is the share of the stage after which the indexers are taught.
    """

    name: str
    num_tokens: int
    lr: float
    final_lr: float
    mix: Mapping[str, float]
    guidance: float = 0.0
    indexer_from: float = 1.0
    cosine_part: float = 1.0


STAGES = (
    Stage(
        "facts and short copies",
        600_000,
        2e-3,
        2e-3,
        {"fact": 36, "chat": 6, "think": 6, "bare_tool": 16, "note": 30, "remember": 6},
    ),
    Stage(
        "longer notes and whole tool prompts",
        587_637,
        2e-3,
        2e-3,
        {"fact": 16, "chat": 7, "think": 10, "bare_tool": 14, "tool": 14, "note": 9}
        | {"remember": 5, "page": 22, "book": 3},
    ),
    Stage(
        "guided past the sliding window",
        477_479,
        2e-3,
        2e-3,
        {"fact": 12, "chat": 6, "think": 8, "bare_tool": 8, "tool": 14, "note": 8}
        | {"remember": 4, "near": 24, "far": 12, "page": 4},
        guidance=0.3,
    ),
    Stage(
        "guided, many keys",
        268_664,
        2e-3,
        2e-3,
        {"fact": 8, "chat": 3, "think": 5, "bare_tool": 4, "tool": 7, "note": 6}
        | {"remember": 3, "dense": 60, "far": 4},
        guidance=0.3,
    ),
    Stage(
        "guided, longer",
        330_000,
        2e-3,
        2e-3,
        {"fact": 14, "chat": 6, "think": 8, "bare_tool": 5, "tool": 13, "note": 6}
        | {"remember": 4, "dense": 8, "near": 16, "far": 20},
        guidance=0.3,
    ),
    Stage(
        "everything, cooling down",
        739_488,
        2e-3,
        2e-5,
        {"fact": 24, "chat": 9, "think": 10, "bare_tool": 4, "tool": 15, "note": 5}
        | {"remember": 4, "near": 8, "far": 9, "page": 6, "book": 6},
        indexer_from=0.19838,
        cosine_part=0.82165,
    ),
    Stage(
        "landing",
        60_000,
        1.71e-04,
        2e-5,
        {"fact": 24, "chat": 9, "think": 10, "bare_tool": 4, "tool": 15, "note": 5}
        | {"remember": 4, "near": 8, "far": 9, "page": 6, "book": 6},
        indexer_from=0.0,
    ),
)


class BatchMaker:
    """Makes batches of one kind: token ids and labels, right-padded (V4 pads on the right only)."""

    def __init__(self, tokenizer: Any, facts: Sequence[Fact], seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)  # noqa: S311 - data, not secrets
        lengths = {fact.answer: len(self.encode(fact.answer)) for fact in facts}
        self.sampler = DialogueSampler(facts, self.rng, lengths.__getitem__)
        self.assistant_id, self.end_id, *self.think_ids = tokenizer.convert_tokens_to_ids(
            [
                encoding.ASSISTANT_SP_TOKEN,
                encoding.eos_token,
                encoding.thinking_start_token,
                encoding.thinking_end_token,
            ]
        )

    def encode(self, text: str) -> list[int]:
        """Tokenise rendered text as it is."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def batch(self, kind: str) -> tuple[Tensor, Tensor]:
        """Return ids and labels, both int64 [B, S]; labels only where the assistant writes."""
        rows = [self._labelled(dialogue) for dialogue in self._dialogues(kind)]
        width = max(len(ids) for ids, _ in rows)
        ids = [row + [PAD_ID] * (width - len(row)) for row, _ in rows]
        labels = [row + [IGNORED] * (width - len(row)) for _, row in rows]
        return torch.tensor(ids), torch.tensor(labels)

    def _dialogues(self, kind: str) -> list[Dialogue]:
        rng, sampler = self.rng, self.sampler
        if kind == "fact":
            turns = rng.choice((1, 1, 2))
            return [sampler.facts_dialogue(turns) for _ in range(44 // turns)]
        if kind == "chat":
            return [sampler.facts_dialogue(rng.choice((3, 4, 5))) for _ in range(10)]
        if kind == "think":
            efforts = rng.choices(("high", "low", "max"), (6, 2, 2), k=10)
            return [sampler.facts_dialogue(rng.choice((1, 1, 2)), effort) for effort in efforts]
        if kind == "bare_tool":
            return [sampler.tool_dialogue(preamble=False) for _ in range(24)]
        if kind == "tool":
            maybe: tuple[str | None, ...] = (None, "high")
            modes = rng.choices(maybe, (2, 1), k=4)
            return [sampler.tool_dialogue(rounds=rng.choice((1, 2, 3)), thinking=mode) for mode in modes]
        if kind == "remember":
            return [sampler.remember_dialogue(rng.choice((0, 1, 2, 3))) for _ in range(16)]
        return self._notes(kind)

    def _notes(self, kind: str) -> list[Dialogue]:
        length = self.rng.choice(NOTE_LENGTHS[kind])
        efforts = self.rng.choices((None, "high"), (7, 1), k=max(1, BATCH_TOKENS // length))
        if kind in KEYS:
            return [self.sampler.keys_dialogue(length, *KEYS[kind], effort) for effort in efforts[:MAX_NOTES]]
        return [self.sampler.recall_dialogue(length, thinking=effort) for effort in efforts[:MAX_NOTES]]

    def _labelled(self, dialogue: Dialogue) -> tuple[list[int], list[int]]:
        ids = self.encode(dialogue.text())
        labels, writing = [IGNORED] * len(ids), False
        for i, token in enumerate(ids):
            if writing:
                labels[i] = token
            if i and ids[i - 1] == self.assistant_id and token in self.think_ids:
                writing = True
            elif token == self.end_id:
                writing = False
        return ids, labels

    def recall_guide(self, model: nn.Module) -> RecallGuide:
        """Return the guide for this tokenizer's recall words."""
        key, is_ = (self.encode(text)[0] for text in (" key", " is"))
        words = [self.encode(f" {word}")[0] for word in dialogues.RECALL_WORDS]
        return RecallGuide(model, (key, is_), torch.tensor(words))

    def label_weights(self, vocab_size: int) -> Tensor:
        """Return the loss weight of each label: copied words and cities weigh more."""
        weights = torch.ones(vocab_size)
        for text in (*dialogues.RECALL_WORDS, *dialogues.CITIES):
            weights[self.encode(f" {text}")] = COPY_WEIGHT
            weights[self.encode(text)] = COPY_WEIGHT
        return weights


def tokenizer_texts(facts: Sequence[Fact], seed: int) -> Iterable[str]:
    """Yield the text that the tokenizer is trained on; what is copied must be single tokens."""
    sampler = DialogueSampler(facts, random.Random(seed), len)  # noqa: S311 - data, not secrets
    for fact in facts:
        yield from (*fact.questions, fact.held_out, fact.answer, fact.answer)
    for word in dialogues.RECALL_WORDS:
        for color in dialogues.RECALL_COLORS:
            yield f"The {color} key is {word}. What is the {color} key?"
    for city in (*dialogues.CITIES, *dialogues.HELD_OUT_CITIES):
        yield from (f"It is {sky} in {city}." for sky in dialogues.CONDITIONS)
        yield from (f'"true">{city}<' for _ in range(4))
    yield from (sampler.tool_dialogue(rounds=2).text() for _ in range(60))
    for text in (*encoding.REASONING_EFFORT_PROMPTS.values(), *dialogues.SYSTEM_PROMPTS):
        yield from (text for _ in range(4))
    for text in (*dialogues.REASONING.values(), "Read these notes. Noted. Please tell me: "):
        yield from (text for _ in range(8))
