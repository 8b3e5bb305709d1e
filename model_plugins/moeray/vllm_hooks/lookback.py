"""Which tokens precede this step's tokens, from the CPU runner's own token table.

Engram hashes a token together with the three before it, which an earlier chunk, a prefix hit or an earlier step may
have computed. vLLM's GPU runner hands such ids to a model that states `token_lookback_depth`; its CPU runner does not.
On CPU scheduling is synchronous, so the runner's table holds every prompt and generated token of a request (it takes
the step's own input ids from it). The table belongs to the request and not to its KV blocks: chunked prefill, prefix
hits, preemption and blocks loaded from elsewhere need nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

KEYWORD = "lookback_token_ids"
"""Argument of the model's `forward`: int64 [R, B], nearest token first, -1 before the first token."""


def hand_to_model() -> None:
    """Wrap `CPUModelRunner._init_model_kwargs`; idempotent."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original = CPUModelRunner._init_model_kwargs
    if getattr(original, "hands_lookback", False):
        return

    def _init_model_kwargs(runner: Any, num_reqs: int | None = None) -> dict[str, Any]:
        kwargs: dict[str, Any] = original(runner, num_reqs)
        depth = getattr(runner.model, "token_lookback_depth", 0)
        if depth:
            kwargs[KEYWORD] = torch.from_numpy(preceding_tokens(runner, depth))
        return kwargs

    _init_model_kwargs.hands_lookback = True  # type: ignore[attr-defined, unused-ignore]
    CPUModelRunner._init_model_kwargs = _init_model_kwargs  # type: ignore[method-assign, assignment, unused-ignore]


def preceding_tokens(runner: Any, depth: int) -> npt.NDArray[np.int64]:
    """[R, depth] ids at (first scheduled position - 1 - column) of every request in the batch, -1 before its start.

    Raises:
        RuntimeError: asynchronous scheduling, under which the table holds placeholders for generated tokens.
    """
    if runner.use_async_scheduling:
        raise RuntimeError("Engram needs synchronous scheduling on CPU: the token table would hold placeholders")
    batch = runner.input_batch
    num_reqs = batch.num_reqs
    positions = batch.num_computed_tokens_cpu[:num_reqs, None] - np.arange(1, depth + 1)
    ids = batch.token_ids_cpu[np.arange(num_reqs)[:, None], np.maximum(positions, 0)]
    return np.where(positions >= 0, ids, -1).astype(np.int64)
