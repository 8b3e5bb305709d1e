"""When requests come, and how long they are.

Open loop: at moments that do not depend on the server, as clients who do not know each other come. Closed loop: each
of so many users sends the next one when the last is answered; such a load never asks a slow server for more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random


class LoadError(ValueError):
    """A load that cannot be made; the message names the option or the line."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of prompts and answers.

    Attributes:
        spread: a length is drawn evenly from so far below to so far above, as a share of it.
        shared: of a prompt's tokens, so many begin every prompt of the run.
    """

    prompt: int
    answer: int
    spread: float = 0.0
    shared: int = 0

    def __post_init__(self) -> None:
        if min(self.prompt, self.answer) < 1 or not 0 <= self.spread < 1 or not 0 <= self.shared <= self.prompt:
            raise LoadError("lengths are at least 1, the spread is 0 to below 1, what is shared is part of the prompt")

    def drawn(self, chance: Random) -> tuple[int, int]:
        """(prompt, answer) of one request."""

        def around(length: int) -> int:
            reach = int(length * self.spread)
            return max(1, chance.randint(length - reach, length + reach))

        return max(self.shared, around(self.prompt)), around(self.answer)


@dataclass(frozen=True, slots=True)
class Planned:
    """One request. `due_s`: since the load began; None: when its user is free."""

    number: int
    due_s: float | None
    prompt_tokens: int
    answer_tokens: int


def closed(count: int, lengths: Lengths, seed: int) -> Iterator[Planned]:
    """So many, each as soon as somebody is free."""
    chance = Random(seed)  # noqa: S311 - no secret
    for number in range(count):
        yield Planned(number, None, *lengths.drawn(chance))


def open_loop(count: int, rate: float, burstiness: float, lengths: Lengths, seed: int) -> Iterator[Planned]:
    """So many at `rate` per second; gaps are gamma distributed, as `vllm bench serve` has them.

    Args:
        burstiness: 1 is Poisson; below it comes in bursts, above it more evenly.
    """
    if rate <= 0 or burstiness <= 0:
        raise LoadError("--rate, --burstiness: are above 0")
    return _due(count, rate, burstiness, lengths, Random(seed))  # noqa: S311 - no secret


def _due(count: int, rate: float, burstiness: float, lengths: Lengths, chance: Random) -> Iterator[Planned]:
    due_s = 0.0
    for number in range(count):
        yield Planned(number, due_s, *lengths.drawn(chance))
        due_s += chance.gammavariate(burstiness, 1 / (rate * burstiness))


def from_trace(path: Path, speed: float = 1.0) -> Sequence[Planned]:
    """A JSONL file: `{"at_s": 0.5, "prompt_tokens": 900, "answer_tokens": 120}` per line, by time.

    Raises:
        LoadError: naming the line.
    """
    found: list[Planned] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"--trace {path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            one = Planned(
                len(found), float(entry["at_s"]) / speed, int(entry["prompt_tokens"]), int(entry["answer_tokens"])
            )
        except (ValueError, TypeError, KeyError) as error:
            raise LoadError(
                f"--trace {path}, line {number}: is no object with at_s, prompt_tokens and answer_tokens ({error})"
            ) from error
        if found and one.due_s is not None and one.due_s < (found[-1].due_s or 0.0):
            raise LoadError(f"--trace {path}, line {number}: is before the line above it")
        found.append(one)
    if not found:
        raise LoadError(f"--trace {path}: has no request")
    return found
