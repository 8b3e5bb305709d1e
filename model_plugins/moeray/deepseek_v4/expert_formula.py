"""The mathematics of one expert in plain torch: the oracle of the kernels, and what runs where there is none.

Suffixes: D hidden, I expert width, n rows of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moeray.deepseek_v4.errors import ExpertError


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """w13: [2 I, D] gate over up; w2: [D, I]."""

    w13: Tensor
    w2: Tensor


def pre_activations(weights: ExpertWeights, x_nD: Tensor) -> Tensor:
    """[n, 2 I] gate beside up, before the clamp.

    Raises:
        ExpertError: the activations are not of the expert's shape and dtype.
    """
    require_like(x_nD, weights.w13.dtype, weights.w13.shape[1])
    return functional.linear(x_nD, weights.w13)


def expert_rows(weights: ExpertWeights, limit: float, x_nD: Tensor) -> Tensor:
    """[n, D] rows; roundings as in `moeray.deepseek_v4.experts`.

    Raises:
        ExpertError: as pre_activations.
    """
    gate_nI, up_nI = pre_activations(weights, x_nD).float().chunk(2, dim=1)
    gate_nI.clamp_(max=limit)
    up_nI.clamp_(-limit, limit)
    return functional.linear(functional.silu(gate_nI).mul_(up_nI).to(x_nD.dtype), weights.w2)


def require_like(x_TD: Tensor, dtype: torch.dtype, hidden_size: int) -> None:
    """Raises ExpertError if activations are not of the experts' dtype and width."""
    if x_TD.dtype != dtype or x_TD.shape[1] != hidden_size:
        raise ExpertError(f"activations are {x_TD.dtype} x {x_TD.shape[1]}, the experts {dtype} x {hidden_size}")
