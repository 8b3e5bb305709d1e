"""Safetensors headers: where each tensor's bytes lie, checked against the files' sizes.

Only headers are read here (format: 8 bytes little-endian header length, JSON header, tensor bytes), so that a
truncated download is found before anything is loaded.
Source: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeray.deepseek_v4.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DOWNLOAD_AGAIN = "download the checkpoint again"
ITEM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    "F4": 4,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor's place: `num_bytes` bytes from `offset` (bytes from the start of `file`)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One safetensors file.

    Attributes:
        header: as stored (8 length bytes included).
        stamp: inode and time of the last change (ns) when the header was read.
    """

    file: Path
    size_bytes: int
    header: bytes
    stamp: tuple[int, int]

    def require_unchanged(self, found: os.stat_result) -> None:
        """Raises CheckpointError unless this is still the file whose header was read, as it was then."""
        if (found.st_ino, found.st_mtime_ns) != self.stamp or found.st_size != self.size_bytes:
            raise CheckpointError(self.file, "was replaced or changed while it was read", "start again")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(file, "the file is missing", DOWNLOAD_AGAIN) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(file, f"cannot be read as JSON ({error})", DOWNLOAD_AGAIN) from None
    if not isinstance(data, dict):
        raise CheckpointError(file, f"holds a JSON {type(data).__name__}, not an object", DOWNLOAD_AGAIN)
    return data


def read_headers(directory: Path) -> tuple[tuple[WeightFile, ...], dict[str, StoredTensor]]:
    """Read and check every weight file's header: the sharded index if there is one, else the single file.

    Raises:
        CheckpointError: a file is missing, truncated, too long or disagrees with the index.
    """
    index_file = directory / INDEX_FILE
    if not index_file.exists():
        weight_file, tensors = _read_header(directory / SINGLE_FILE)
        return (weight_file,), tensors
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(index_file, "has no weight_map", DOWNLOAD_AGAIN)
    for name in weight_map.values():
        if not isinstance(name, str):
            raise CheckpointError(index_file, f"weight_map names {name!r}, which is no file", DOWNLOAD_AGAIN)
    parts = {name: _read_header(_beside(index_file, name)) for name in sorted(set(weight_map.values()))}
    tensors = {}
    for name, part in weight_map.items():
        if name not in parts[part][1]:
            raise CheckpointError(
                directory / part, f"does not hold {name}, which {INDEX_FILE} puts there", DOWNLOAD_AGAIN
            )
        tensors[name] = parts[part][1][name]
    return tuple(weight_file for weight_file, _ in parts.values()), tensors


def _beside(index_file: Path, name: str) -> Path:
    file = index_file.parent / name
    if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        raise CheckpointError(index_file, f"weight_map names {name!r}", "weight files must lie beside the index")
    return file


def _read_header(file: Path) -> tuple[WeightFile, dict[str, StoredTensor]]:
    try:
        with file.open("rb") as stream:
            found = os.fstat(stream.fileno())
            size = found.st_size
            length_bytes = stream.read(8)
            length = struct.unpack("<Q", length_bytes)[0] if len(length_bytes) == 8 else 0
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    file,
                    f"is truncated or not safetensors: header of 8 + {length} bytes expected, {size} found",
                    DOWNLOAD_AGAIN,
                )
            header = length_bytes + stream.read(length)
    except FileNotFoundError:
        raise CheckpointError(file, "the weight file is missing", DOWNLOAD_AGAIN) from None
    except OSError as error:
        raise CheckpointError(file, f"cannot be read ({error})", "check its permissions and the disk") from None
    tensors = _parse_header(file, header[8:])
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda each: (each.offset, each.num_bytes)):
        if tensor.offset != end:
            raise CheckpointError(
                file,
                f"{tensor.name} begins at byte {tensor.offset}, the tensor before it ends at {end}",
                DOWNLOAD_AGAIN,
            )
        end += tensor.num_bytes
    data_bytes = max((tensor.offset + tensor.num_bytes for tensor in tensors.values()), default=8 + length)
    if data_bytes != size:
        state = "truncated" if size < data_bytes else "too long"
        raise CheckpointError(file, f"is {state}: {data_bytes} bytes expected, {size} found", DOWNLOAD_AGAIN)
    return WeightFile(file, size, header, (found.st_ino, found.st_mtime_ns)), tensors


def _parse_header(file: Path, text: bytes) -> dict[str, StoredTensor]:
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        base = 8 + len(text)
        return {name: _parse_entry(file, name, entry, base) for name, entry in entries.items()}
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(file, f"its safetensors header is damaged ({error!r})", DOWNLOAD_AGAIN) from None


def _parse_entry(file: Path, name: str, entry: dict[str, Any], base: int) -> StoredTensor:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(size) for size in entry["shape"])
    dtype = str(entry["dtype"])
    if dtype in ITEM_BITS and (expected := math.prod(shape) * ITEM_BITS[dtype] // 8) != end - begin:
        raise CheckpointError(
            file,
            f"{name}: {dtype} {list(shape)} takes {expected} bytes, the header gives {end - begin}",
            DOWNLOAD_AGAIN,
        )
    if begin < 0 or end < begin:
        raise CheckpointError(file, f"{name}: byte range {begin}..{end} is impossible", DOWNLOAD_AGAIN)
    return StoredTensor(name, file, dtype, shape, base + begin, end - begin)
