"""One layer's Engram table: where its bytes lie in the checkpoint, and the values of rows, wherever these came from.

Where they are mapped nothing is copied into anonymous memory: every process that maps the same file shares its pages.

Suffixes: T tokens, C hash columns, N rows gathered, V rows of the table, W elements per row, B blocks per row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moeray.deepseek_v4.engram_kernel import gather_fp8, gather_plain, products
from moeray.deepseek_v4.errors import CheckpointError
from moeray.deepseek_v4.formats import StoredMatrix
from moeray.deepseek_v4.weight_files import DOWNLOAD_AGAIN, StoredTensor
from moeray.engram import IntArray, StoredRows, Table
from moeray.engram.rows import Bytes

# safetensors dtype of values that are computed with as they are; FP8 values become bfloat16
_PLAIN: dict[str, torch.dtype] = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_FP8, _FP8_SCALES = "F8_E4M3", ("F8_E8M0", "U8")


def table_name(layer_id: int) -> str:
    """The checkpoint's name of a layer's table."""
    return f"layers.{layer_id}.engram.embed.weight"


def dtype_of_rows(stored: StoredMatrix, shape_VW: tuple[int, int]) -> torch.dtype:
    """What the values of a table's rows become; arguments as of `EngramTable`.

    Raises:
        CheckpointError: another shape, or a format that cannot be gathered.
    """
    table, scale = stored.weight, stored.scale
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
    is_fp8 = table.dtype == _FP8 and scale is not None and scale.dtype in _FP8_SCALES
    if not is_fp8 and (scale is not None or table.dtype not in _PLAIN):
        raise CheckpointError(
            table.file,
            f"{table.name} is stored as {stored.format}",
            f"convert it to one of {', '.join(_PLAIN)}, or to {_FP8} with scales of {_FP8_SCALES[0]}",
        )
    return torch.bfloat16 if is_fp8 else _PLAIN[table.dtype]


class EngramTable:
    """Rows of `layers.N.engram.embed.weight`, mapped.

    Args:
        stored: where the table's bytes lie; the ranges were checked against the file's size.
        shape_VW: (rows, elements per row) that config.json promises.
    Attributes:
        bytes: the mapped table.
        dtype: of values; FP8 rows are dequantised as they are gathered.
    Raises:
        CheckpointError: see `dtype_of_rows`; or a file that cannot be mapped.
    """

    def __init__(self, stored: StoredMatrix, shape_VW: tuple[int, int]) -> None:
        self.dtype = dtype_of_rows(stored, shape_VW)
        table, scale = stored.weight, stored.scale
        self._gather = gather_plain() if scale is None else gather_fp8()  # compiled now, not in a request
        self.bytes = Table(_mapped(table), None if scale is None else _mapped(scale))
        self._width = shape_VW[1]

    @property
    def num_rows(self) -> int:
        return int(self.bytes.values.shape[0])

    @property
    def mapped_bytes(self) -> int:
        """Bytes of address space, shared with every process that maps the file."""
        return sum(part.nbytes for part in (self.bytes.values, self.bytes.scales) if part is not None)

    def gather(self, rows_TC: IntArray) -> Tensor:
        """`values_of` rows of the mapped table.

        Raises:
            IndexError: a row is outside the table.
        """
        if rows_TC.size and not 0 <= rows_TC.min() <= rows_TC.max() < self.num_rows:
            raise IndexError(f"rows {rows_TC.min()} to {rows_TC.max()} of a table of {self.num_rows}")
        return self.values_of(StoredRows(self.bytes.values, self.bytes.scales, rows_TC))

    def values_of(self, stored: StoredRows) -> Tensor:
        """Copy rows out, wherever they were brought from: [T, C * W] in the table's dtype (bf16 of FP8 rows: exact).

        The rows are those of this table, and `index_TC` is within what was brought: neither is checked here.
        """
        num_tokens, num_columns = stored.index_TC.shape
        index_N = np.ascontiguousarray(stored.index_TC).ravel()
        out_NW = torch.empty((len(index_N), self._width), dtype=self.dtype)
        if stored.scales is None:
            self._gather(stored.values, index_N, out_NW.view(torch.uint8).numpy())
        else:
            words = out_NW.view(torch.int16).numpy().view(np.uint16)
            self._gather(stored.values, stored.scales, index_N, products(), words)
        return out_NW.view(num_tokens, num_columns * self._width)


def _mapped(stored: StoredTensor) -> Bytes:
    """Bytes as they are stored: uint8 [rows, bytes of a row]."""
    try:
        shape = (stored.shape[0], stored.num_bytes // max(1, stored.shape[0]))
        return np.asarray(np.memmap(stored.file, np.uint8, mode="r", offset=stored.offset, shape=shape))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            stored.file, f"{stored.name} cannot be mapped ({error})", "check the file and its disk"
        ) from None
