"""Experts' matrices as the CPU kernel reads them, and the call of the kernel, on one thread or several.

Suffixes: T tokens, D hidden, I expert width, K experts per token, P (token, k) pairs, R pairs sorted by expert,
E experts.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeray.deepseek_v4.expert_formula import ExpertWeights, require_like
from moeray.deepseek_v4.expert_kernel import CHUNK_ROWS, TILE_FLOATS, products
from moeray.deepseek_v4.expert_layout import BLOCK, LANES, pack, plan
from moeray.deepseek_v4.expert_store import ExpertsPerLayer, Rows, damaged, kept, not_held, require_room

DTYPES = (torch.bfloat16, torch.float32)
MAX_PAIRS = 8192
"""Computed at a time. Their scratch memory stays: for each an expert's width in fp32, 64 MiB at a width of 2048."""
SHARED_BYTES = 4 << 20
"""Calls that read fewer bytes of weights stay on one thread: waking another took as long as reading a megabyte."""

SCRUB_BYTES = 1 << 20
"""Compared at a time: half a millisecond."""


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """One expert.

    Attributes:
        w13: [blocks of I, D * 32]. w2: [blocks of D, I * 32].
        digest: CRC-32 of both, as they were packed.
    """

    w13: NDArray[Any]
    w2: NDArray[Any]
    digest: int


class _Layer:
    """What is held of one layer, and where it lies. Never changed: a call goes on with the one that it began with."""

    def __init__(self, experts: Mapping[int, Packed], num_experts: int) -> None:
        self.experts = experts
        self.slot_E = np.full(num_experts, -1, dtype=np.int32)
        self.slot_E[list(experts)] = np.arange(len(experts))
        self.w13_at = np.array([each.w13.ctypes.data for each in experts.values()], dtype=np.int64)
        self.w2_at = np.array([each.w2.ctypes.data for each in experts.values()], dtype=np.int64)


class _Space:
    """Scratch memory of one call."""

    def __init__(self, num_pairs: int, num_experts: int, hidden: int, width: int, num_shares: int) -> None:
        self.num_pairs = num_pairs
        self.next_E, self.slots, self.starts = (np.empty(num_experts + 1, dtype=np.int32) for _ in range(3))
        self.order_R, self.row_R = (np.empty(num_pairs, dtype=np.int32) for _ in range(2))
        self.bad_P = np.empty(num_pairs, dtype=np.uint8)
        self._arrays = (
            _aligned((num_pairs, -(-width // LANES) * LANES), np.float32),
            _aligned((num_shares, CHUNK_ROWS * hidden), np.float32),
            _aligned((num_shares, TILE_FLOATS), np.float32),
        )
        self.h, chunks, tiles = (each.ctypes.data for each in self._arrays)
        self.chunks = [chunks + share * self._arrays[1][0].nbytes for share in range(num_shares)]
        self.tiles = [tiles + share * self._arrays[2][0].nbytes for share in range(num_shares)]


class PackedExperts:
    """See `moeray.deepseek_v4.expert_store.ExpertStore`."""

    batch_invariant = True
    kernel = "moeray"

    def __init__(
        self,
        *,
        hidden_size: int,
        width: int,
        dtype: torch.dtype,
        num_experts: int,
        limit: float,
        num_threads: int,
    ) -> None:
        """Compile the kernel; nothing is held yet.

        Args:
            width: of an expert. dtype: one of DTYPES.
            num_threads: that compute one call; results are the same for every number.
        """
        self._dtype, self._num_experts, self._limit = dtype, num_experts, np.float32(limit)
        self._hidden, self._width = hidden_size, width
        bf16 = dtype == torch.bfloat16
        self._plan, self._pack, self._products = plan(), pack(bf16=bf16), products(bf16=bf16)
        self._element: np.generic = np.uint16(0) if bf16 else np.float32(0)
        self._size = 2 if bf16 else 4
        self._integers: torch.dtype = torch.int16 if bf16 else torch.int32
        self._changing = threading.Lock()
        self._nothing = _Layer({}, num_experts)
        self._layers: Mapping[int, _Layer] = {}  # replaced as a whole
        self._num_shares = num_threads
        self._pool = ThreadPoolExecutor(num_threads - 1, "moeray-experts") if num_threads > 1 else None
        self._spaces: list[_Space] = []

    @property
    def held(self) -> dict[int, tuple[int, ...]]:
        return {layer: tuple(sorted(held.experts)) for layer, held in self._layers.items()}

    def put(self, layer: int, expert: int, weights: ExpertWeights) -> None:
        packed_w13, packed_w2 = self._room()
        places = (2, 1) if self._size == 2 else (1, LANES)
        width, hidden = self._width, self._hidden
        w13, w2 = (each.contiguous().view(self._integers).numpy() for each in (weights.w13, weights.w2))
        self._pack(w13, 0, width, (width, width), LANES, *places, packed_w13)
        self._pack(w2, 0, LANES, (hidden, hidden - LANES), BLOCK, *places, packed_w2)
        packed = Packed(packed_w13, packed_w2, zlib.crc32(_raw(packed_w2), zlib.crc32(_raw(packed_w13))))
        with self._changing:
            experts = {**self._layers.get(layer, self._nothing).experts, expert: packed}
            self._layers = {**self._layers, layer: _Layer(experts, self._num_experts)}

    def keep(self, experts_per_layer: ExpertsPerLayer) -> None:
        with self._changing:
            before = self._layers
            rest = kept({layer: held.experts for layer, held in before.items()}, experts_per_layer)
            self._layers = {
                layer: before[layer] if experts is before[layer].experts else _Layer(experts, self._num_experts)
                for layer, experts in rest.items()
            }

    def get(self, layer: int, expert: int) -> ExpertWeights:
        packed = self._layers.get(layer, self._nothing).experts.get(expert)
        if packed is None:
            raise not_held(layer, expert)
        gate_up, down = self._unpacked(packed.w13, self._hidden), self._unpacked(packed.w2, self._width)
        w13 = torch.cat([gate_up[half].flatten(0, 1)[: self._width] for half in (0, 1)])
        return ExpertWeights(w13, down.transpose(0, 1).flatten(0, 2)[: self._hidden].contiguous())

    def scrub(self) -> Iterator[int]:
        for layer, held in self._layers.items():
            for expert, packed in held.experts.items():
                digest = 0
                for matrix in (packed.w13, packed.w2):
                    whole = _raw(matrix)
                    for begin in range(0, len(whole), SCRUB_BYTES):
                        piece = whole[begin : begin + SCRUB_BYTES]
                        digest = zlib.crc32(piece, digest)
                        yield len(piece)
                if digest != packed.digest:
                    raise damaged(layer, expert)

    @property
    def weight_bytes(self) -> int:
        layers = self._layers.values()
        return sum(each.w13.nbytes + each.w2.nbytes for layer in layers for each in layer.experts.values())

    def rows(self, layer: int, x_TD: Tensor, ids_TK: Tensor, out_PD: Tensor | None = None) -> Rows:
        require_like(x_TD, self._dtype, self._hidden)
        ids_P, top_k = ids_TK.contiguous().view(-1).numpy(), ids_TK.shape[1]
        if out_PD is None:
            out_PD = torch.empty((len(ids_P), self._hidden), dtype=self._dtype)
        else:
            require_room(out_PD, int(np.count_nonzero(ids_P >= 0)), self._dtype, self._hidden)
        held, x, row_bytes = self._layers.get(layer, self._nothing), x_TD.contiguous(), self._hidden * self._size
        bad_P: list[NDArray[np.uint8]] = []
        num_rows, num_bad, step = 0, 0, max(1, MAX_PAIRS // top_k) * top_k
        space = self._take(min(step, len(ids_P)))
        try:
            for begin in range(0, len(ids_P), step):
                active = self._sort(held, layer, ids_P[begin : begin + step], space)
                at, out = x.data_ptr() + begin // top_k * row_bytes, out_PD.data_ptr() + num_rows * row_bytes
                num_bad += self._compute(held, active, at, top_k, space, out)
                bad_P.append(space.bad_P[: space.starts[active]].copy())
                num_rows += len(bad_P[-1])
        finally:
            self._spaces.append(space)
        experts_P = ids_P if num_rows == len(ids_P) else ids_P[ids_P >= 0]
        return Rows(out_PD[:num_rows], experts_P, np.concatenate(bad_P) if num_bad else None)

    def _sort(self, held: _Layer, layer: int, ids_P: NDArray[np.int32], space: _Space) -> int:
        """Plan one call in `space`; the number of experts that have rows."""
        active = self._plan(ids_P, held.slot_E, space.next_E, space.order_R, space.row_R, space.starts, space.slots)
        if active < 0:
            raise not_held(layer, int(ids_P[-1 - active]))
        space.bad_P[: space.starts[active]] = 0
        return active

    def _compute(self, held: _Layer, active: int, x: int, top_k: int, space: _Space, out: int) -> int:
        """Rows of the planned call from the tokens at `x` to `out`; how many times NaN or Inf was seen."""
        element, size, hidden, width = self._element, self._size, self._hidden, self._width
        starts, slots = space.starts, space.slots
        num_shares = self._num_shares if active * 3 * hidden * width * size > SHARED_BYTES else 1

        def gate_up(share: int) -> int:
            self._products.gate_up(
                element, size, x, top_k, hidden, width, self._limit, held.w13_at, space.order_R, starts, slots, active,
                space.chunks[share], space.tiles[share], space.h, share, num_shares,
            )  # fmt: skip
            return 0

        def down(share: int) -> int:
            num_bad: int = self._products.down(
                element, size, space.h, hidden, width, held.w2_at, space.row_R, starts, slots, active,
                space.tiles[share], out, space.bad_P, share, num_shares,
            )  # fmt: skip
            return num_bad

        self._each(num_shares, gate_up)
        return self._each(num_shares, down)

    def _each(self, num_shares: int, work: Callable[[int], int]) -> int:
        """Do `work` of every share, the first in this thread; the sum of what it returns."""
        if num_shares == 1 or self._pool is None:
            return work(0)
        others = [self._pool.submit(work, share) for share in range(1, num_shares)]
        return work(0) + sum(other.result() for other in others)

    def _take(self, num_pairs: int) -> _Space:
        """Scratch memory that no other thread uses; as many live as there were calls at one time."""
        try:
            space = self._spaces.pop()
        except IndexError:
            space = None
        if space is not None and space.num_pairs >= num_pairs:
            return space
        return _Space(num_pairs, self._num_experts, self._hidden, self._width, self._num_shares)

    def _room(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Memory for one expert's w13 and w2."""
        integers = np.int16 if self._size == 2 else np.int32
        w13 = _aligned((-(-self._width // LANES), self._hidden * BLOCK), integers)
        return w13, _aligned((-(-self._hidden // BLOCK), self._width * BLOCK), integers)

    def _unpacked(self, packed: NDArray[Any], depth: int) -> Tensor:
        """[2, blocks, 16, depth] the first and the second 16 rows of every block."""
        blocks = torch.from_numpy(packed).view(self._dtype)
        if self._size == 2:
            return blocks.view(-1, depth, LANES, 2).permute(3, 0, 2, 1)
        return blocks.view(-1, depth, 2, LANES).permute(2, 0, 3, 1)


def _raw(matrix: NDArray[Any]) -> memoryview:
    """Its bytes, where they lie."""
    return memoryview(matrix.reshape(-1).view(np.uint8).data)


def _aligned(shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """Uninitialised, on a cache line's border."""
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(num_bytes + 64, dtype=np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + num_bytes].view(dtype).reshape(shape)
