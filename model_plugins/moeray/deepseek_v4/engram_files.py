"""Where a checkpoint's Engram tables lie. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moeray.deepseek_v4.weight_files import StoredTensor
from moeray.engram import FileRange


def table_ranges(tensors: Mapping[str, StoredTensor]) -> Iterator[FileRange]:
    """Where a checkpoint's tables lie, scales included.

    Args:
        tensors: name -> place, as in `Checkpoint.tensors`.
    """
    for name, tensor in tensors.items():
        if ".engram.embed." in name:
            yield FileRange(tensor.file, tensor.offset, tensor.num_bytes)
