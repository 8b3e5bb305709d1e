"""Engram rows of a prompt are brought while it waits for its turn.

EngineCore's input thread makes a request before any step computes it; from then on its rows are known. Where the worker
is in another process (tensor parallel shards) nobody hears of prompts, and rows are asked for by the step that needs
them.

Touch point: `Request.from_engine_core_request`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import wraps
from typing import Any

import numpy as np

from moeray.config import EngramConfig
from moeray.deepseek_v4.engram import UNKNOWN_TOKEN, NgramHash
from moeray.engram import EngramRows

logger = logging.getLogger(__name__)

MAX_TOKENS = 8192
"""Of a prompt, from its beginning: what is further off would push out what is needed first."""
MAX_QUEUED = 4
"""Prompts that wait for this; what comes while there are so many is left."""

OnPrompt = Callable[[Sequence[int]], None]
_on_prompt: OnPrompt | None = None


def pays(engram: EngramConfig) -> bool:
    """Whether rows are somewhere that can be waited for: not in memory, nor at servers that answer within a layer."""
    return engram.placement == "redis" or (engram.placement == "host" and not engram.prefault)


def follow(on_prompt: OnPrompt | None) -> None:
    """Tell this one, and nobody else, each prompt's token ids from now on, in the thread that takes requests in."""
    global _on_prompt
    from vllm.v1.request import Request

    _on_prompt = on_prompt
    original = Request.__dict__["from_engine_core_request"].__func__
    if getattr(original, "tells_prompts", False):
        return

    @wraps(original)  # with the marks of who wrapped it before
    def from_engine_core_request(cls: type, request: Any, block_hasher: Any) -> Any:
        if _on_prompt is not None and request.prompt_token_ids is not None:
            _on_prompt(request.prompt_token_ids)
        return original(cls, request, block_hasher)

    from_engine_core_request.tells_prompts = True  # type: ignore[attr-defined]
    setattr(Request, "from_engine_core_request", classmethod(from_engine_core_request))  # noqa: B010  mypy knows a method


class PromptPrefetch:
    """Brings rows in a thread of its own; what fails is left to the step that needs them."""

    def __init__(self, ngrams: NgramHash, rows: EngramRows) -> None:
        self._ngrams, self._rows = ngrams, rows
        self._thread = ThreadPoolExecutor(1, "moeray-engram-prefetch")
        self._queued: list[Future[None]] = []

    def add(self, token_ids: Sequence[int]) -> None:
        """A prompt has come; returns at once."""
        self._queued = [each for each in self._queued if not each.done()]
        if len(self._queued) < MAX_QUEUED:
            self._queued.append(self._thread.submit(self._bring, token_ids[:MAX_TOKENS]))

    def _bring(self, token_ids: Sequence[int]) -> None:
        tokens_T = np.array(token_ids, dtype=np.int64)
        lookback_RB = np.full((1, self._ngrams.layout.lookback), UNKNOWN_TOKEN, dtype=np.int64)
        try:
            self._rows.prefetch(self._ngrams.rows(tokens_T, np.array([0, len(tokens_T)]), lookback_RB))
        except Exception:
            logger.exception("Engram rows of a prompt were not brought beforehand")
