"""How far an engine's logprobs are from transformers' in fp32, beside what rounding alone explains.

Two emulations tell what to expect: transformers in fp32 with every key/value entry rounded as vLLM's fp8_ds_mla cache
stores it, and the same with bf16 activations. An engine that computes the model right is as far from fp32 as the
second. The mean is moved by single tokens whose router sits at a tie (another expert is chosen, |dlogprob| of 1 and
more, in the emulations too); the median is not, so it is what a mistake shows in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from engines import InProcessEngine
from torch import Tensor
from transformers import DeepseekV4ForCausalLM
from v4_reference import Logprobs, teacher_forced

# The slack is for what a few tokens at a router's tie do to a mean of some hundred tokens.
RATIO, MEAN_SLACK, ARGMAX_SLACK = 2.0, 0.03, 0.03


@dataclass(frozen=True)
class Distance:
    """|dlogprob| from fp32 over all tokens, in nats, and the share of equal argmaxes."""

    median: float
    mean: float
    worst: float
    agreement: float


@dataclass(frozen=True)
class Parity:
    length: int
    num_tokens: int
    ours: Distance
    fp8_kv: Distance | None
    fp8_kv_bf16: Distance

    def excess(self) -> list[str]:
        """What is larger than rounding explains; empty where the engine computes the model."""
        ours, bound = self.ours, self.fp8_kv_bf16
        limits = {
            "median |dlogprob|": (ours.median, RATIO * bound.median),
            "mean |dlogprob|": (ours.mean, RATIO * bound.mean + MEAN_SLACK),
            "share of other argmaxes": (1 - ours.agreement, RATIO * (1 - bound.agreement) + ARGMAX_SLACK),
        }
        return [
            f"{self.length} tokens: {name} is {value:.4f}, expected at most {limit:.4f}"
            for name, (value, limit) in limits.items()
            if value > limit
        ]


def prompts_of(length: int, num_prompts: int) -> list[list[int]]:
    """Random ordinary tokens of the bundled vocabulary; the same for every caller."""
    generator = np.random.default_rng(length)
    return [generator.integers(10, 1500, length).tolist() for _ in range(num_prompts)]


def measure(
    engine: InProcessEngine, model: DeepseekV4ForCausalLM, prompts: Sequence[list[int]], *, fp8_kv: bool = False
) -> Parity:
    """Ask the engine and the reference for the same prompts (of one length).

    Args:
        fp8_kv: also measure the emulation with fp32 activations (a third pass of the reference).
    """
    exact = [teacher_forced(model, prompt) for prompt in prompts]
    rounded = [teacher_forced(model, prompt, fp8_kv=True, bf16=True) for prompt in prompts]
    kv_only = [teacher_forced(model, prompt, fp8_kv=True) for prompt in prompts] if fp8_kv else []
    ours = [engine.teacher_forced(prompt) for prompt in prompts]
    return Parity(
        length=len(prompts[0]),
        num_tokens=sum(len(each.chosen_T) for each in exact),
        ours=_distance(ours, exact),
        fp8_kv=_distance(kv_only, exact) if kv_only else None,
        fp8_kv_bf16=_distance(rounded, exact),
    )


def _distance(found: Sequence[Logprobs], exact: Sequence[Logprobs]) -> Distance:
    off_T = (_joined(found, "chosen_T") - _joined(exact, "chosen_T")).abs()
    same_T = _joined(found, "best_T") == _joined(exact, "best_T")
    return Distance(float(off_T.median()), float(off_T.mean()), float(off_T.max()), float(same_T.float().mean()))


def _joined(parts: Sequence[Logprobs], name: str) -> Tensor:
    return torch.cat([getattr(part, name) for part in parts])
