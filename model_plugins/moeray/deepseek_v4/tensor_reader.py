"""Reads byte ranges of weight files straight into tensors, and counts them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.errors import CheckpointError
from moeray.deepseek_v4.formats import StoredMatrix, dequantise
from moeray.deepseek_v4.weight_files import DOWNLOAD_AGAIN, StoredTensor

TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


class TensorReader:
    """Open files of one load; a context manager. Not thread-safe.

    Attributes:
        bytes_read: bytes taken from weight files so far.
    """

    def __init__(self, checkpoint: Checkpoint | None = None) -> None:
        """No file is open yet.

        Args:
            checkpoint: whose files are read long after it was opened: one that has changed since then is an error.
        """
        self.bytes_read = 0
        self._files: dict[Path, int] = {}
        self._expected = {each.file: each for each in checkpoint.weight_files} if checkpoint is not None else {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, parts: Sequence[StoredTensor]) -> Tensor:
        """Read tensors of one dtype and equal trailing dimensions, concatenated along the first dimension.

        The result owns its memory (64-byte aligned by torch's allocator).

        Raises:
            CheckpointError: a file is gone, shorter than its header says, changed, or of a dtype torch cannot hold.
        """
        first = parts[0]
        if first.dtype not in TORCH_DTYPES:
            raise CheckpointError(first.file, f"{first.name} is stored as {first.dtype}", "convert it to BF16")
        out = torch.empty(
            (sum(part.shape[0] for part in parts), *first.shape[1:]) if first.shape else (),
            dtype=TORCH_DTYPES[first.dtype],
            device="cpu",  # whatever the caller's default device is
        )
        target = memoryview(out.reshape(-1).view(torch.uint8).numpy().data)
        begin = 0
        for part in parts:
            self._fill(part, target[begin : begin + part.num_bytes])
            begin += part.num_bytes
        return out

    def _fill(self, part: StoredTensor, target: memoryview) -> None:
        try:
            if part.file not in self._files:
                self._files[part.file] = os.open(part.file, os.O_RDONLY | os.O_CLOEXEC)
            done = 0
            while done < part.num_bytes:
                count = os.preadv(self._files[part.file], [target[done:]], part.offset + done)
                if count == 0:
                    raise CheckpointError(
                        part.file, f"{part.name}: {part.num_bytes} bytes expected, {done} found", DOWNLOAD_AGAIN
                    )
                done += count
                self.bytes_read += count
            if part.file in self._expected:
                self._expected[part.file].require_unchanged(os.fstat(self._files[part.file]))
        except OSError as error:
            raise CheckpointError(
                part.file, f"cannot be read ({error})", "check its permissions and the disk"
            ) from None


def read_matrix(reader: TensorReader, matrix: StoredMatrix, dtype: torch.dtype) -> Tensor:
    """The matrix' values in `dtype`, dequantised where it is quantised.

    Raises:
        CheckpointError: see `TensorReader.read`.
    """
    scales = None if matrix.scale is None else reader.read([matrix.scale])
    return dequantise(reader.read([matrix.weight]), scales, matrix.block, dtype)


def activation_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What config.json's dtype is called in torch.

    Raises:
        CheckpointError: it is not a floating-point dtype that torch has.
    """
    dtype = getattr(torch, checkpoint.shape.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CheckpointError(
            checkpoint.path / "config.json", f"dtype is {checkpoint.shape.dtype!r}", "it must be bfloat16 or float32"
        )
    return dtype
