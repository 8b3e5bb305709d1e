"""Exact-match measurement of a checkpoint, by transformers in fp32 or by vLLM.

The margin of an answer is the smallest difference, over its tokens and the end token, between the
log-probabilities of the best and the second-best token, in nats: how far the answer is from
changing when arithmetic differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoTokenizer

from moeray.tiny import architecture, export
from moeray.tiny.curriculum import PAD_ID
from moeray.tiny.dialogues import Dialogue
from moeray.tiny.engram import build_token_map

BATCH_TOKENS = 3000


@dataclass(frozen=True)
class Outcome:
    """Whether greedy decoding gives the expected answer, exactly and ending there, and how surely."""

    exact: bool
    margin: float
    prompt_tokens: int


class Engine(Protocol):
    """Something that can answer dialogues."""

    tokenizer: Any

    def answer(self, asked: Sequence[Dialogue]) -> list[Outcome]:
        """Answer the last turn of each dialogue greedily."""


class TransformersEngine:
    """The checkpoint's own weights (bf16 as stored) in fp32 arithmetic.

    One pass over prompt and expected answer tells whether greedy decoding would produce the
    answer: by induction it does if each of its tokens is the most probable one.
    """

    def __init__(self, directory: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self.model = architecture.build_model(len(self.tokenizer), build_token_map(self.tokenizer))
        names = list(self.model.state_dict())
        self.model.load_state_dict(export.read_weights(directory, names))
        self.model.train(False)

    def answer(self, asked: Sequence[Dialogue]) -> list[Outcome]:
        """See ``Engine.answer``; the order of the results is that of ``asked``."""
        rows = [self._encode(dialogue) for dialogue in asked]
        order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))
        out: dict[int, Outcome] = {}
        while order:
            longest = sum(map(len, rows[order[-1]]))
            take = max(1, BATCH_TOKENS // longest)
            batch, order = order[-take:], order[:-take]
            outcomes = self._answer_batch([rows[i] for i in batch])
            out.update(zip(batch, outcomes, strict=True))
        return [out[i] for i in range(len(rows))]

    def _encode(self, dialogue: Dialogue) -> tuple[list[int], list[int]]:
        prompt, answer = dialogue.prompt_and_answer()
        encode = self.tokenizer.encode
        end = [self.tokenizer.eos_token_id]
        return encode(prompt, add_special_tokens=False), encode(answer, add_special_tokens=False) + end

    @torch.no_grad()
    def _answer_batch(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[Outcome]:
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        padded = [p + a + [PAD_ID] * (width - len(p) - len(a)) for p, a in rows]
        hidden_BSD = self.model.model(torch.tensor(padded), use_cache=False).last_hidden_state
        outcomes = []
        for hidden_SD, (prompt, answer) in zip(hidden_BSD, rows, strict=True):
            span = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
            outcomes.append(self._judge(self.model.lm_head(hidden_SD[span]), answer, len(prompt)))
        return outcomes

    @staticmethod
    def _judge(logits_TV: Tensor, answer: list[int], prompt_tokens: int) -> Outcome:
        best = logits_TV.log_softmax(-1).topk(2)
        exact = best.indices[:, 0].tolist() == answer
        margin = (best.values[:, 0] - best.values[:, 1]).min().item()
        return Outcome(exact, margin, prompt_tokens)


class VllmEngine:
    """vLLM on this machine's CPU, with moeray's plugin, over the same rendered prompts."""

    def __init__(self, directory: Path) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=str(directory),
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=5000,
            max_num_seqs=16,
            tokenizer_mode="deepseek_v4",
            seed=0,
        )
        self.tokenizer: Any = self.llm.get_tokenizer()

    def answer(self, asked: Sequence[Dialogue]) -> list[Outcome]:
        """See ``Engine.answer``; these answers are really generated token by token."""
        from vllm import SamplingParams

        pairs = [dialogue.prompt_and_answer() for dialogue in asked]
        encode = self.tokenizer.encode
        prompts: Any = [{"prompt_token_ids": encode(prompt, add_special_tokens=False)} for prompt, _ in pairs]
        sampling = SamplingParams(temperature=0, max_tokens=160, logprobs=2)
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        outcomes = []
        for output, (_, expected) in zip(outputs, pairs, strict=True):
            written = output.outputs[0]
            exact = written.text == expected and written.finish_reason == "stop"
            margin = min(_gap(choices) for choices in written.logprobs or [])
            outcomes.append(Outcome(exact, margin, len(output.prompt_token_ids or [])))
        return outcomes


def _gap(choices: Any) -> float:
    values = sorted((choice.logprob for choice in choices.values()), reverse=True)
    return float(values[0] - values[1])
