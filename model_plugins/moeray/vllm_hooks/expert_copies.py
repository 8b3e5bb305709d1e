"""How many copies each expert gets: vLLM's EPLB policy, from rows that were counted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from vllm.distributed.eplb.policy.default import DefaultEplbPolicy


def expert_copies(rows_LE: Sequence[Sequence[float]], num_slots: int) -> list[list[int]]:
    """[L][E] copies, `num_slots` per layer, that make the busiest copy's load least.

    The policy knows nothing of groups: it may ask for more copies than there are groups (`arrange` corrects it).

    Source: vllm/distributed/eplb/policy/default.py, replicate_experts (DeepSeek EPLB).
    """
    weights_LE = np.asarray(rows_LE, dtype=np.float64)
    _, copies_LE = DefaultEplbPolicy.replicate_experts(weights_LE, num_slots)
    counts: list[list[int]] = copies_LE.tolist()
    return counts
