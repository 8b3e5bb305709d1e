"""Weight formats of the published checkpoints, and their exact values.

    format   values                                  scales
    plain    BF16, F16, F32 [R, C]                   none
    fp8      e4m3 [R, C]                             e8m0 or F32, one per block of 128x128 (V3, V4) or 32x32 (V4.1);
                                                     one per 32 elements of a row (V4.1's Engram tables)
    fp4      e2m1, two per byte, low half first,     e8m0, one per 32 elements of a row
             stored as I8 or U8 [R, C / 2]

value = element * scale, a product of fp32 rounded once to the wanted dtype. With e8m0 scales (powers of two) bf16 holds
every such product exactly, short of under- and overflow: e2m1 and e4m3 have fewer significant bits.
Blocks at the right and lower edge may be smaller.

Source: OCP Microscaling Formats (MX) v1.0, tables 5 and 7; DeepSeek-V3 report, section 3.3.2.

Suffixes: R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moeray.deepseek_v4.errors import CheckpointError
from moeray.deepseek_v4.weight_files import DOWNLOAD_AGAIN, StoredTensor

PLAIN = ("BF16", "F16", "F32")
FP4_CONTAINERS = ("I8", "U8")
ROW_BLOCK = (1, 32)
FP8_SCALES = ("F8_E8M0", "F32")
KNOWN_FP8_BLOCKS = ((128, 128), (32, 32))
NEEDS_SCALES = ("F8_E4M3", "F8_E5M2", "F4", *FP4_CONTAINERS)
"""Stored so, a weight means nothing by itself."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """One matrix as the checkpoint stores it.

    Attributes:
        scale: None for plain formats.
        shape: [R, C] of its values.
        block: rows and columns that share one scale; None for plain formats.
    """

    weight: StoredTensor
    scale: StoredTensor | None
    shape: tuple[int, ...]
    block: tuple[int, int] | None

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return (self.weight,) if self.scale is None else (self.weight, self.scale)

    @property
    def num_bytes(self) -> int:
        """Stored bytes, scales included."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def format(self) -> str:
        """For people and logs: "BF16", "FP8 128x128 E8M0", "FP4 1x32 E8M0"."""
        if self.scale is None or self.block is None:
            return self.weight.dtype
        kind = "FP8" if self.weight.dtype == "F8_E4M3" else "FP4"
        scale = "E8M0" if self.scale.dtype in ("F8_E8M0", "U8") else self.scale.dtype
        return f"{kind} {self.block[0]}x{self.block[1]} {scale}"


def stored_matrix(
    weight: StoredTensor, scale: StoredTensor | None, fp8_block: tuple[int, int] | None = None
) -> StoredMatrix:
    """Recognise the format from dtypes and shapes.

    Args:
        fp8_block: what config.json says (`quantization_config.weight_block_size`).
    Raises:
        CheckpointError: an unknown combination; names the tensor, what it is and what would be legal.
    """
    if scale is None:
        if weight.dtype in PLAIN:
            return StoredMatrix(weight, None, weight.shape, None)
        raise CheckpointError(
            weight.file,
            f"{weight.name} is stored as {weight.dtype} and has no scales beside it",
            f"store it as {', '.join(PLAIN)}, as F8_E4M3 with block scales, or as packed FP4 with block scales",
        )
    if len(weight.shape) != 2:
        raise CheckpointError(weight.file, f"{weight.name} has scales, but shape {list(weight.shape)}", DOWNLOAD_AGAIN)
    rows, columns = weight.shape
    if weight.dtype in FP4_CONTAINERS:
        return _with_block(weight, scale, (rows, 2 * columns), [ROW_BLOCK], ("F8_E8M0", "U8"))
    if weight.dtype == "F8_E4M3":
        blocks = [*([fp8_block] if fp8_block else KNOWN_FP8_BLOCKS), ROW_BLOCK]
        return _with_block(weight, scale, (rows, columns), blocks, FP8_SCALES)
    raise CheckpointError(
        weight.file, f"{weight.name} is stored as {weight.dtype} with scales", "known are F8_E4M3 and packed FP4 (I8)"
    )


def _with_block(
    weight: StoredTensor,
    scale: StoredTensor,
    shape: tuple[int, int],
    blocks: Sequence[tuple[int, int]],
    scale_dtypes: Sequence[str],
) -> StoredMatrix:
    if scale.dtype not in scale_dtypes:
        raise CheckpointError(
            scale.file, f"{scale.name} is stored as {scale.dtype}", f"scales are {' or '.join(scale_dtypes)}"
        )
    for block in blocks:
        if scale.shape == _grid(shape, block):
            return StoredMatrix(weight, scale, shape, block)
    legal = " or ".join(f"{list(_grid(shape, block))} (blocks of {block[0]}x{block[1]})" for block in blocks)
    raise CheckpointError(
        scale.file, f"{scale.name} has shape {list(scale.shape)}, {weight.name} asks for {legal}", DOWNLOAD_AGAIN
    )


def _grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])


def fp8_block_of(config: Mapping[str, object]) -> tuple[int, int] | None:
    """`quantization_config.weight_block_size` of a config.json; None where it says nothing usable."""
    quantization = config.get("quantization_config")
    block = quantization.get("weight_block_size") if isinstance(quantization, Mapping) else None
    if isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block):
        return block[0], block[1]
    return None


def dequantise(values: Tensor, scales: Tensor | None, block: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
    """The values of a matrix as it was read.

    Args:
        values: as stored: plain [R, C], e4m3 [R, C], or packed e2m1 [R, C / 2] (int8 or uint8).
        scales: e8m0, fp32, or uint8 holding e8m0; None for plain formats.
    Returns:
        [R, C] in `dtype`.
    """
    if scales is None or block is None:
        return values.to(dtype)
    elements_RC = unpack_e2m1(values) if values.dtype in (torch.int8, torch.uint8) else values.float()
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    rows, columns = elements_RC.shape
    scales_RC = scales.float()
    if block[0] > 1:
        scales_RC = scales_RC.repeat_interleave(block[0], dim=0)[:rows]
    if columns % block[1] == 0:  # without writing every scale out block[1] times
        by_block = elements_RC.view(rows, -1, block[1])
        return by_block.mul_(scales_RC.unsqueeze(2)).view(rows, columns).to(dtype)
    return elements_RC.mul_(scales_RC.repeat_interleave(block[1], dim=1)[:, :columns]).to(dtype)


# The two elements of every byte, low half first.
_PAIRS = np.array([(E2M1[byte & 15], E2M1[byte >> 4]) for byte in range(256)], dtype=np.float32)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """[R, C / 2] bytes -> [R, C] fp32."""
    rows, half = packed.shape
    return torch.from_numpy(_PAIRS[packed.contiguous().view(torch.uint8).numpy()].reshape(rows, 2 * half))
