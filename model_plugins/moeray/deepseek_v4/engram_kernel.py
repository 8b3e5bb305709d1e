"""Gathering rows of an Engram table and writing their values, in one pass: compiled, nothing in between.

An FP8 value is e4m3 times a power of two: 256 times 256 possible results. They are computed once, by the same functions
that dequantise whole matrices, and looked up: the bits are theirs.

Suffixes: N rows, V rows of the table, W values per row, B blocks per row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moeray.deepseek_v4.formats import dequantise
from moeray.transport.compiled import compiled

Words = npt.NDArray[np.uint16]


@cache
def products() -> Words:
    """[256 * 256] bf16 bits of every (scale, value): e8m0 times e4m3."""
    every = torch.arange(256, dtype=torch.uint8)
    values = every.view(torch.float8_e4m3fn).expand(256, 256).contiguous()
    rows = dequantise(values, every.view(torch.float8_e8m0fnu).unsqueeze(1), (1, 256), torch.bfloat16)
    return rows.view(torch.int16).numpy().view(np.uint16).ravel()


def _gather_fp8(values_VW: Any, scales_VB: Any, index_N: Any, products: Any, out_NW: Any) -> None:
    num_blocks = scales_VB.shape[1]
    width = values_VW.shape[1] // num_blocks
    for n in range(index_N.shape[0]):
        row = index_N[n]
        for block in range(num_blocks):
            of_scale = np.int64(scales_VB[row, block]) << 8
            for w in range(block * width, (block + 1) * width):
                out_NW[n, w] = products[of_scale + values_VW[row, w]]


@cache
def gather_fp8() -> Callable[..., None]:
    """(values uint8 [V, W], scales uint8 [V, B], index int64 [N], `products()`, out uint16 [N, W])."""
    from numba import types  # not before it is needed: see `compiled`

    bytes_2d = types.Array(types.uint8, 2, "C", readonly=True)
    index, words = types.Array(types.int64, 1, "C"), types.Array(types.uint16, 1, "C")
    return compiled(_gather_fp8, (bytes_2d, bytes_2d, index, words, types.uint16[:, ::1]))


def _gather_plain(values_VW: Any, index_N: Any, out_NW: Any) -> None:
    for n in range(index_N.shape[0]):
        out_NW[n] = values_VW[index_N[n]]


@cache
def gather_plain() -> Callable[..., None]:
    """(values uint8 [V, W bytes], index int64 [N], out uint8 [N, W bytes])."""
    from numba import types  # not before it is needed: see `compiled`

    bytes_2d = types.Array(types.uint8, 2, "C", readonly=True)
    return compiled(_gather_plain, (bytes_2d, types.Array(types.int64, 1, "C"), types.uint8[:, ::1]))
