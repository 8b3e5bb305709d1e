"""How far `RoutedExperts` is from float64, expert by expert."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy_reading import NumpyCheckpoint

from moeray.deepseek_v4 import Checkpoint, RoutedExperts


def relative_errors(directory: Path, dtype: torch.dtype, *, num_tokens: int) -> list[float]:
    """|y - y64| / |y64| (Euclidean, per row) of every expert of every layer on random tokens of unit variance.

    The tokens are rounded to `dtype` first, so that only the experts' own arithmetic is measured.
    """
    checkpoint, reading = Checkpoint.open(directory), NumpyCheckpoint(directory)
    shape = checkpoint.shape
    experts = RoutedExperts.load(checkpoint, dict.fromkeys(shape.moe_layers, range(shape.num_experts)), dtype=dtype)
    x_TD = torch.from_numpy(np.random.default_rng(9).normal(size=(num_tokens, shape.hidden_size))).to(dtype)
    every = torch.arange(shape.num_experts, dtype=torch.int32).repeat(num_tokens, 1)
    errors = []
    for layer in shape.moe_layers:
        rows = experts(layer, x_TD, every).double().numpy().reshape(num_tokens, shape.num_experts, -1)
        for token in range(num_tokens):
            x_D = x_TD[token].double().numpy()
            for expert in range(shape.num_experts):
                want = reading.expert(layer, expert, x_D)
                errors.append(float(np.linalg.norm(rows[token, expert] - want) / np.linalg.norm(want)))
    return errors
