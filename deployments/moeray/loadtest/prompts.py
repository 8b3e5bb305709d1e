"""Prompts of a wanted number of tokens, of words that a server's own tokenizer counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

from moeray.loadtest.arrivals import LoadError

WORDS = (
    "the expert group of a layer owns its rows and sends them back when each token was routed to it by weight while an "
    "attention shard keeps what it has read so that nothing is computed twice or lost"
).split()


class Prompts:
    """Random words, the same for the same seed; all begin alike as far as `shared` says.

    Args:
        tokens_per_word: of the server's tokenizer for these words, see `measured`.
    """

    def __init__(self, seed: int, shared: int = 0, tokens_per_word: float = 1.0) -> None:
        self._seed, self._per_word = seed, tokens_per_word
        self._shared = self._text(Random(seed), shared)  # noqa: S311 - no secret

    def text(self, number: int, tokens: int, shared: int = 0) -> str:
        """About so many tokens; the first `shared` are those of every prompt."""
        own = self._text(Random((self._seed << 32) + number + 1), tokens - shared)  # noqa: S311 - no secret
        return f"{self._shared} {own}".strip() if shared else own

    def _text(self, chance: Random, tokens: int) -> str:
        return " ".join(chance.choices(WORDS, k=max(0, round(tokens / self._per_word))))


def from_file(path: Path) -> Sequence[str]:
    """A prompt per line.

    Raises:
        LoadError: it cannot be read, or has none.
    """
    try:
        found = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"--prompts {path}: cannot be read: {error}") from error
    if not found:
        raise LoadError(f"--prompts {path}: has no prompt")
    return found
