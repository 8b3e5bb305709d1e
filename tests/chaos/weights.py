"""Overwrites the expert weights that a living expert group holds, so that it answers with garbage."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open

NUM_BYTES = 32 << 10
_MIN_MAP_BYTES = NUM_BYTES
_SLICE_BYTES = 64 << 20


def find(pid: int, checkpoint: Path, held: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """Where every held expert's first matrix begins in `pid`'s memory -> bytes of its beginning. Takes seconds."""
    found: dict[int, int] = {}
    wanted = list(_signatures(checkpoint, held))
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:  # noqa: PTH123
        for begin, end in _writable(pid):
            for at in range(begin, end, _SLICE_BYTES):
                memory.seek(at)
                with suppress(OSError):  # unmapped meanwhile
                    data = memory.read(min(_SLICE_BYTES, end - at))
                    for signature in wanted:
                        if (offset := data.find(signature)) >= 0:
                            found[at + offset] = min(NUM_BYTES, end - at - offset)
    return found


def spoil(pid: int, found: Mapping[int, int], rng: random.Random) -> None:
    """Write random bytes there.

    Raises:
        OSError: the memory may not be written.
    """
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:  # noqa: PTH123
        for at, num_bytes in found.items():
            memory.seek(at)
            memory.write(rng.randbytes(num_bytes))


def _signatures(checkpoint: Path, held: Mapping[int, Sequence[int]]) -> Iterator[bytes]:
    """How the beginning of an expert's first matrix looks: as a row in plain memory, or as the CPU kernel packs it."""
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        for layer, experts in held.items():
            for expert in experts:
                name = f"layers.{layer}.ffn.experts.{expert}"
                gate, up = (file.get_tensor(f"{name}.{part}.weight").view(torch.int16) for part in ("w1", "w3"))
                yield gate[0, :32].contiguous().numpy().tobytes()
                yield torch.stack((gate[:16, 0], up[:16, 0]), dim=1).numpy().tobytes()


def _writable(pid: int) -> Iterator[tuple[int, int]]:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) rw.p \S+ \S+ 0(\s|$)", line):
            begin, end = int(match[1], 16), int(match[2], 16)
            if end - begin >= _MIN_MAP_BYTES:
                yield begin, end
