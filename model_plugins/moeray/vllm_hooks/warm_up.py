"""What vLLM compiles at its first use, compiled before the first request: a compiler in a step stops every stream.

vLLM warms up its model. Not what counts ranks for log-probabilities, which is a `torch.compile` of its own: the first
request for log-probabilities that a new engine gets would hold up all others for the 2 to 5 s that it takes.
Touch point: `Sampler.gather_logprobs`.
"""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)

NUM_ROWS = 2
"""vLLM marks the number of rows as unknown: one compilation serves all."""


def compile_logprobs(vocab_size: int, device: torch.device) -> None:
    """Once per process. Takes seconds, fewer where the compiler's cache on disk has it.

    Where it cannot be compiled (there may be no C++ compiler) the engine serves everything else, and the log says so.
    """
    from vllm.v1.sample.sampler import Sampler

    try:
        with torch.inference_mode():  # as the steps run: the compiled code is for this mode only
            logprobs = torch.zeros(NUM_ROWS, vocab_size, device=device).log_softmax(-1)
            Sampler.gather_logprobs(logprobs, 1, torch.zeros(NUM_ROWS, dtype=torch.int64, device=device))
    except Exception:
        logger.exception("requests for log-probabilities will fail: what counts their ranks cannot be compiled")
