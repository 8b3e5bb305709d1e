"""One layer's Engram table as a read-only map of the checkpoint file.

Nothing is copied into anonymous memory: every process that maps the same file shares its pages, and a row that no
prompt asks for is never read from disk.

Suffixes: T tokens, C hash columns, N rows gathered, V rows of the table, W elements per row, B blocks per row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moeray.deepseek_v4.errors import CheckpointError
from moeray.deepseek_v4.formats import StoredMatrix, dequantise
from moeray.deepseek_v4.weight_files import DOWNLOAD_AGAIN, StoredTensor

# safetensors dtype -> (as numpy maps it, as torch computes with it); numpy has no bfloat16
_DTYPES: dict[str, tuple[type[np.generic], torch.dtype]] = {
    "BF16": (np.uint16, torch.bfloat16),
    "F16": (np.uint16, torch.float16),
    "F32": (np.uint32, torch.float32),
    "F8_E4M3": (np.uint8, torch.float8_e4m3fn),
    "F8_E8M0": (np.uint8, torch.float8_e8m0fnu),
}


def table_name(layer_id: int) -> str:
    """The checkpoint's name of a layer's table."""
    return f"layers.{layer_id}.engram.embed.weight"


class EngramTable:
    """Rows of `layers.N.engram.embed.weight`, mapped; FP8 rows are dequantised as they are gathered.

    Args:
        stored: where the table's bytes lie; the ranges were checked against the file's size.
        shape_VW: (rows, elements per row) that config.json promises.
    Raises:
        CheckpointError: another shape, a format that cannot be gathered, or a file that cannot be mapped.
    """

    def __init__(self, stored: StoredMatrix, shape_VW: tuple[int, int]) -> None:
        table = stored.weight
        if stored.shape != shape_VW:
            raise CheckpointError(
                table.file,
                f"{table.name} has shape {list(stored.shape)}, config.json asks for {list(shape_VW)}",
                DOWNLOAD_AGAIN,
            )
        if stored.block is not None and stored.block[0] != 1:
            raise CheckpointError(
                table.file, f"{table.name} is stored as {stored.format}", "a table's scales belong to single rows"
            )
        self._block = stored.block
        self._rows_VW, self._stored_dtype = _mapped(table)
        self._scales = None if stored.scale is None else _mapped(stored.scale)
        self.dtype = self._stored_dtype if self._block is None else torch.bfloat16

    @property
    def num_rows(self) -> int:
        return int(self._rows_VW.shape[0])

    @property
    def mapped_bytes(self) -> int:
        """Bytes of address space, shared with every process that maps the file."""
        return int(self._rows_VW.nbytes + (0 if self._scales is None else self._scales[0].nbytes))

    def gather(self, rows_TC: npt.NDArray[np.int64]) -> Tensor:
        """Copy the rows out: [T, C * W] in the table's dtype (bf16 of FP8 rows: exact).

        Raises:
            IndexError: a row is outside the table.
        """
        num_tokens, num_columns = rows_TC.shape
        rows_NW = torch.from_numpy(np.take(self._rows_VW, rows_TC.ravel(), axis=0)).view(self._stored_dtype)
        if self._scales is not None:
            scales_VB, scale_dtype = self._scales
            scales_NB = torch.from_numpy(np.take(scales_VB, rows_TC.ravel(), axis=0)).view(scale_dtype)
            rows_NW = dequantise(rows_NW, scales_NB, self._block, self.dtype)
        return rows_NW.view(num_tokens, num_columns * self._rows_VW.shape[1])


def _mapped(stored: StoredTensor) -> tuple[npt.NDArray[Any], torch.dtype]:
    if stored.dtype not in _DTYPES:
        raise CheckpointError(
            stored.file, f"{stored.name} is stored as {stored.dtype}", f"convert it to one of {', '.join(_DTYPES)}"
        )
    mapped_as, dtype = _DTYPES[stored.dtype]
    try:
        return np.memmap(stored.file, mapped_as, mode="r", offset=stored.offset, shape=stored.shape), dtype
    except (OSError, ValueError) as error:
        raise CheckpointError(
            stored.file, f"{stored.name} cannot be mapped ({error})", "check the file and its disk"
        ) from None
