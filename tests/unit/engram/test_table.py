"""The table is the checkpoint's bytes, mapped: right rows, no copy, clear errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moeray.deepseek_v4.engram_table import EngramTable, table_name
from moeray.deepseek_v4.errors import CheckpointError
from moeray.deepseek_v4.formats import StoredMatrix, dequantise, stored_matrix
from moeray.deepseek_v4.names import DEEPSEEK
from moeray.deepseek_v4.weight_files import read_headers

NAME = table_name(3)


def stored(directory: Path, table: torch.Tensor, scales: torch.Tensor | None = None) -> StoredMatrix:
    # An odd-sized tensor before the table: the rows then begin at an offset that is no multiple of a page or a row.
    tensors = {"a": torch.zeros(3, dtype=torch.uint8), NAME: table}
    if scales is not None:
        tensors[DEEPSEEK.scale_of(NAME)] = scales
    save_file(tensors, directory / "model.safetensors")
    found = read_headers(directory)[1]
    return stored_matrix(found[NAME], found.get(DEEPSEEK.scale_of(NAME)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gathered_rows_are_the_stored_rows(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(50, 8).to(dtype)
    table = EngramTable(stored(tmp_path, values), (50, 8))
    rows = np.array([[0, 49, 7], [7, 7, 1]])
    got = table.gather(rows)
    assert got.dtype == dtype
    assert torch.equal(got, torch.stack([values[rows[t]].flatten() for t in range(2)]))
    assert table.gather(rows[:0]).shape == (0, 24)


def test_rows_of_an_fp8_table_are_dequantised_exactly_as_they_are_gathered(tmp_path: Path) -> None:
    values = torch.randn(50, 64).to(torch.float8_e4m3fn)
    scales = torch.randint(120, 134, (50, 2), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    table = EngramTable(stored(tmp_path, values, scales), (50, 64))
    whole = dequantise(values, scales, (1, 32), torch.float32)
    rows = np.array([[0, 49, 7], [7, 7, 1]])
    got = table.gather(rows)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got.float(), torch.stack([whole[rows[t]].flatten() for t in range(2)]))
    assert table.mapped_bytes == 50 * (64 + 2)


def test_a_table_with_scales_that_span_rows_is_refused(tmp_path: Path) -> None:
    scales = torch.ones(2, 2, dtype=torch.float8_e8m0fnu)
    with pytest.raises(CheckpointError, match="stored as FP8 32x32 E8M0; a table's scales belong to single rows"):
        EngramTable(stored(tmp_path, torch.randn(50, 64).to(torch.float8_e4m3fn), scales), (50, 64))


def test_a_row_outside_the_table_is_an_error_and_not_another_tensors_bytes(tmp_path: Path) -> None:
    table = EngramTable(stored(tmp_path, torch.randn(50, 8)), (50, 8))
    with pytest.raises(IndexError):
        table.gather(np.array([[50]]))


def anonymous_kib() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))


def test_mapping_a_table_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    rows = 500_000
    entry = stored(tmp_path, torch.zeros(rows, 32, dtype=torch.bfloat16))
    before = anonymous_kib()
    table = EngramTable(entry, (rows, 32))
    table.gather(np.arange(0, rows, 1000).reshape(1, -1))
    assert table.mapped_bytes == rows * 64
    assert anonymous_kib() - before < table.mapped_bytes // 1024 // 4


def test_a_table_of_another_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: layers\.3\.engram.*\[50, 8\].*\[51, 8\]"):
        EngramTable(stored(tmp_path, torch.randn(50, 8)), (51, 8))


def test_a_table_whose_dtype_cannot_be_gathered_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="stored as I64"):
        EngramTable(stored(tmp_path, torch.zeros(50, 8, dtype=torch.int64)), (50, 8))


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    entry = stored(tmp_path, torch.randn(50, 8))
    entry.weight.file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*cannot be mapped"):
        EngramTable(entry, (50, 8))
