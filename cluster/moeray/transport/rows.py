"""How a token's activations travel to the groups: as they are, or as FP8 with scales.

FP8 is half of bf16's bytes on the wire and rounds what the experts see: see `Fp8Rows`. Answers always travel in the
model's dtype. Both ends use the format that the shard's hello names.

Suffixes: T tokens, D hidden size, G groups of GROUP_SIZE values, B bytes of one row on the wire.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from moeray.config import RowFormatName

GROUP_SIZE = 128
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


class RowFormat(Protocol):
    """Bytes of one row, and the way there and back; on any device."""

    @property
    def row_bytes(self) -> int: ...

    def encode(self, x_TD: Tensor) -> Tensor:
        """[T, row_bytes] uint8; may share x's memory."""
        ...

    def decode(self, rows_TB: Tensor) -> Tensor:
        """x_TD of contiguous rows; may share their memory."""
        ...


class PlainRows:
    """The activations' own bytes."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.row_bytes = hidden_size * dtype.itemsize

    def encode(self, x_TD: Tensor) -> Tensor:
        # An empty tensor is contiguous whatever its strides are, and would not be viewed.
        return (x_TD.contiguous() if x_TD.shape[0] else x_TD.new_empty(x_TD.shape)).view(torch.uint8)

    def decode(self, rows_TB: Tensor) -> Tensor:
        return rows_TB.view(self._dtype)


class Fp8Rows:
    """e4m3 values, and one fp32 scale for every 128 of them (the last group may be shorter): D + 4 G bytes.

    The scale puts a group's largest value on 448, e4m3's largest. A value is off by at most 2^-4 of itself, or, where
    it is so small that e4m3 has no mantissa left, by 2^-10 of the scale: 2^-18.8 of the group's largest. NaN stays NaN.
    Source: DeepSeek-V3 report, section 3.3.2 (fine-grained quantisation), 3.4 (FP8 dispatch).
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        self._hidden_size, self._dtype = hidden_size, dtype
        self._num_groups = -(-hidden_size // GROUP_SIZE)
        self.row_bytes = hidden_size + 4 * self._num_groups

    def encode(self, x_TD: Tensor) -> Tensor:
        groups_TGS = self._grouped(x_TD.float())
        largest_TG = groups_TGS.abs().amax(dim=2)
        scales_TG = torch.where(largest_TG > 0, largest_TG / FP8_MAX, 1.0)
        values_TGS = (groups_TGS / scales_TG.unsqueeze(2)).clamp(-FP8_MAX, FP8_MAX).to(FP8)
        values_TD = values_TGS.flatten(1)[:, : self._hidden_size]
        return torch.cat((values_TD.view(torch.uint8), scales_TG.view(torch.uint8)), dim=1)

    def decode(self, rows_TB: Tensor) -> Tensor:
        values_TD = rows_TB[:, : self._hidden_size].view(FP8).float()
        scales_TG = rows_TB[:, self._hidden_size :].clone(memory_format=torch.contiguous_format).view(torch.float32)
        x_TGS = self._grouped(values_TD) * scales_TG.unsqueeze(2)
        return x_TGS.flatten(1)[:, : self._hidden_size].to(self._dtype).contiguous()

    def _grouped(self, values_TD: Tensor) -> Tensor:
        padding = self._num_groups * GROUP_SIZE - self._hidden_size
        return functional.pad(values_TD, (0, padding)).view(len(values_TD), self._num_groups, GROUP_SIZE)


def row_format(name: RowFormatName, hidden_size: int, dtype: torch.dtype) -> RowFormat:
    """Raises ValueError: no such format."""
    if name == "plain":
        return PlainRows(hidden_size, dtype)
    if name == "fp8":
        return Fp8Rows(hidden_size, dtype)
    raise ValueError(f"rows travel as plain or fp8, not as {name!r}")
