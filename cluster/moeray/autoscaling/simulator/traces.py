"""Requests as they come: when, with how many prompt tokens, and how many tokens their answers have.

Lengths are log-normal, with the means and the long tails of a public trace of a chat service (Azure's LLM inference
trace of 2023: prompts of about 1,000 tokens, answers of about 200).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
HOUR = 3600.0
PROMPT, ANSWER = (700.0, 0.9), (150.0, 0.8)
"""Median, and sigma of the logarithm."""
LONGEST = 32_000


@dataclass(frozen=True)
class Trace:
    """Sorted by arrival; all of one length.

    Attributes:
        arrival_s: since the beginning.
        prompt, answer: tokens.
        length_s: of the whole trace; requests that have not ended by then count as late.
    """

    name: str
    arrival_s: Floats
    prompt: Floats
    answer: Floats
    length_s: float


def _trace(
    name: str, rate: Callable[[Floats], Floats], length_s: float, rng: np.random.Generator, prompt_scale: float = 1.0
) -> Trace:
    """Poisson arrivals at a rate that changes (requests/s at each second), of ordinary lengths."""
    counts = rng.poisson(np.maximum(0.0, rate(np.arange(length_s, dtype=np.float64))))
    arrival = np.sort(np.repeat(np.arange(length_s), counts) + rng.random(counts.sum()))
    return Trace(
        name, arrival, prompt_scale * _lengths(rng, len(arrival), PROMPT), _lengths(rng, len(arrival), ANSWER), length_s
    )


def _lengths(rng: np.random.Generator, number: int, shape: tuple[float, float]) -> Floats:
    median, sigma = shape
    return np.clip(np.round(median * np.exp(sigma * rng.standard_normal(number))), 1, LONGEST)


def bursts(rate: float, rng: np.random.Generator) -> Trace:
    """Two hours in which the rate jumps between a half and twice as much, for minutes each."""
    seconds = int(2 * HOUR)
    level, levels = 0.5, np.empty(seconds)
    at = 0
    while at < seconds:
        stays = int(rng.exponential(300.0)) + 30
        levels[at : at + stays] = level
        at, level = at + stays, 2.5 - level
    return _trace("bursts", lambda _: rate * levels, seconds, rng)


def diurnal(rate: float, rng: np.random.Generator) -> Trace:
    """A day: a tenth of the peak at night."""
    return _trace("diurnal", lambda at: rate * (0.55 - 0.45 * np.cos(2 * np.pi * at / (24 * HOUR))), 24 * HOUR, rng)


def steady(rate: float, rng: np.random.Generator) -> Trace:
    """Two hours of public lengths at one rate."""
    return _trace("steady", lambda at: np.full_like(at, rate), 2 * HOUR, rng)


def flash_crowd(rate: float, rng: np.random.Generator) -> Trace:
    """Four times as many within a minute, for twenty minutes; then as before."""

    def at_second(at: Floats) -> Floats:
        return rate * (1 + 3 * np.clip((at - HOUR / 2) / 60, 0, 1) * (at < HOUR / 2 + 1200))

    return _trace("flash crowd", at_second, 2 * HOUR, rng)


def tenant_storm(rate: float, rng: np.random.Generator) -> Trace:
    """One tenant sends prompts eight times as long, with short answers, for a quarter of an hour."""
    base = _trace("tenant storm", lambda at: np.full_like(at, rate), 2 * HOUR, rng)
    storm = _trace("", lambda at: np.where((at > 1800) & (at < 2700), rate / 2, 0.0), 2 * HOUR, rng, prompt_scale=8.0)
    arrival = np.concatenate([base.arrival_s, storm.arrival_s])
    order = np.argsort(arrival, kind="stable")
    prompt = np.minimum(np.concatenate([base.prompt, storm.prompt]), LONGEST)[order]
    answer = np.concatenate([base.answer, np.ceil(storm.answer / 8)])[order]
    return Trace("tenant storm", arrival[order], prompt, answer, base.length_s)


TRACES: Mapping[str, Callable[[float, np.random.Generator], Trace]] = {
    "steady": steady, "bursts": bursts, "diurnal": diurnal, "flash crowd": flash_crowd, "tenant storm": tenant_storm,
}  # fmt: skip
"""Name -> (requests/s of an ordinary moment, seeded chance) -> the trace."""
