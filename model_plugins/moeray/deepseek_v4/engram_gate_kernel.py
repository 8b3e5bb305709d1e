"""The gated value, added to every stream in one pass over the bf16 of a CPU: compiled, no fp32 copy of the streams.

The formula is that of `engram.add_gated_value`. Sums are folded in halves, so their order depends on the hidden size
alone: a token's bits are the same in every batch.

Suffixes: T tokens, H streams, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moeray.deepseek_v4.engram import GATE_CLAMP
from moeray.transport.compiled import compiled


def _add_gated(streams_THD: Any, kv_TKD: Any, weight_HD: Any, rms_eps: float, out_THD: Any) -> None:
    num_tokens, num_streams, hidden = streams_THD.shape
    words = np.empty((3, hidden), dtype=np.uint32)
    floats = words.view(np.float32)
    stream, key, value = floats[0], floats[1], floats[2]
    products = np.empty((3, hidden), dtype=np.float32)
    match, stream_square, key_square = products[0], products[1], products[2]
    out_words = words[1]
    for t in range(num_tokens):
        for d in range(hidden):
            words[2, d] = np.uint32(kv_TKD[t, num_streams, d]) << np.uint32(16)
        for s in range(num_streams):
            for d in range(hidden):
                words[0, d] = np.uint32(streams_THD[t, s, d]) << np.uint32(16)
            for d in range(hidden):
                words[1, d] = np.uint32(kv_TKD[t, s, d]) << np.uint32(16)
            for d in range(hidden):
                match[d] = stream[d] * weight_HD[s, d] * key[d]
                stream_square[d] = stream[d] * stream[d]
                key_square[d] = key[d] * key[d]
            count = hidden
            while count > 1:
                half = (count + 1) >> 1
                for d in range(count - half):
                    match[d] += match[half + d]
                    stream_square[d] += stream_square[half + d]
                    key_square[d] += key_square[half + d]
                count = half
            scale = math.sqrt(stream_square[0] / hidden + rms_eps) * math.sqrt(key_square[0] / hidden + rms_eps)
            matched = match[0] / (scale * math.sqrt(hidden))
            magnitude = abs(matched)
            magnitude = math.sqrt(GATE_CLAMP if magnitude < GATE_CLAMP else magnitude)  # of NaN: NaN
            gate = np.float32(1.0 / (1.0 + math.exp(magnitude if matched < 0 else -magnitude)))
            for d in range(hidden):
                key[d] = stream[d] + gate * value[d]
            for d in range(hidden):
                word = out_words[d]
                rounded = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
                is_nan = (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
                out_THD[t, s, d] = np.uint16(np.uint32(0x7FC0) if is_nan else rounded)


def add_gated_value_bf16(streams_THD: Tensor, kv: Tensor, weight_HD: Tensor, rms_eps: float) -> Tensor:
    """As `engram.add_gated_value`, of bf16 on a CPU, rounded once.

    Args:
        weight_HD: fp32, q_weight times k_weight.
    """
    num_tokens, num_streams, hidden = streams_THD.shape
    out_THD = torch.empty_like(streams_THD, memory_format=torch.contiguous_format)
    key_and_value = kv.contiguous().view(num_tokens, num_streams + 1, hidden)
    kernel = add_gated_kernel()
    kernel(_words(streams_THD.contiguous()), _words(key_and_value), weight_HD.numpy(), rms_eps, _words(out_THD))
    return out_THD


def _words(bf16: Tensor) -> npt.NDArray[np.uint16]:
    return bf16.view(torch.int16).numpy().view(np.uint16)


@cache
def add_gated_kernel() -> Callable[..., None]:
    """(streams uint16 [T, H, D], keys and value uint16 [T, H + 1, D], weight fp32 [H, D], eps, written: as streams)."""
    from numba import types  # not before it is needed: see `compiled`

    words, weight = types.uint16[:, :, ::1], types.float32[:, ::1]
    return compiled(_add_gated, (words, words, weight, types.float64, words))
