"""One layer's Engram table as a read-only map of the checkpoint file.

Nothing is copied into anonymous memory: every process that maps the same file shares its pages, and a row that no
prompt asks for is never read from disk.

Suffixes: T tokens, C hash columns, V rows of the table, W elements per row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moeray.deepseek_v4.errors import CheckpointError
from moeray.deepseek_v4.weight_files import DOWNLOAD_AGAIN, StoredTensor

# safetensors dtype -> (as numpy maps it, as torch computes with it); numpy has no bfloat16
_DTYPES: dict[str, tuple[type[np.generic], torch.dtype]] = {
    "BF16": (np.uint16, torch.bfloat16),
    "F16": (np.uint16, torch.float16),
    "F32": (np.uint32, torch.float32),
}


def table_name(layer_id: int) -> str:
    """The checkpoint's name of a layer's table."""
    return f"layers.{layer_id}.engram.embed.weight"


class EngramTable:
    """Rows of `layers.N.engram.embed.weight`, mapped.

    Args:
        stored: where the table's bytes lie; the range was checked against the file's size.
        shape_VW: (rows, elements per row) that config.json promises.
    Raises:
        CheckpointError: another shape, a dtype that cannot be gathered, or a file that cannot be mapped.
    """

    def __init__(self, stored: StoredTensor, shape_VW: tuple[int, int]) -> None:
        if stored.shape != shape_VW:
            raise CheckpointError(
                stored.file,
                f"{stored.name} has shape {list(stored.shape)}, config.json asks for {list(shape_VW)}",
                DOWNLOAD_AGAIN,
            )
        if stored.dtype not in _DTYPES:
            raise CheckpointError(
                stored.file, f"{stored.name} is stored as {stored.dtype}", f"convert it to one of {', '.join(_DTYPES)}"
            )
        mapped_as, self.dtype = _DTYPES[stored.dtype]
        try:
            self._rows_VW: npt.NDArray[Any] = np.memmap(
                stored.file, mapped_as, mode="r", offset=stored.offset, shape=shape_VW
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                stored.file, f"{stored.name} cannot be mapped ({error})", "check the file and its disk"
            ) from None

    @property
    def num_rows(self) -> int:
        return int(self._rows_VW.shape[0])

    @property
    def mapped_bytes(self) -> int:
        """Bytes of address space, shared with every process that maps the file."""
        return int(self._rows_VW.nbytes)

    def gather(self, rows_TC: npt.NDArray[np.int64]) -> Tensor:
        """Copy the rows out: [T, C * W] in the table's dtype.

        Raises:
            IndexError: a row is outside the table.
        """
        num_tokens, num_columns = rows_TC.shape
        gathered = np.take(self._rows_VW, rows_TC, axis=0).reshape(num_tokens, num_columns * self._rows_VW.shape[1])
        return torch.from_numpy(gathered).view(self.dtype)
