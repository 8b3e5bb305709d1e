"""Which rows go to which group, and where each pair's answer will lie in the replies.

Two packers with the same result: `HostPacker` (compiled, exact sizes) and `DevicePacker` (torch; for decode batches the
host reads no size, so that it never waits for the routing). Only tokens with at least one expert in a group go to it;
ids of experts elsewhere are -1.

Suffixes: T tokens, D hidden, B bytes of a dispatched row, K experts per token, P = T * K pairs in row-major order,
N groups, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeray.transport.communicator import Message
from moeray.transport.memory import MessageMemory, aligned
from moeray.transport.wire import (
    HEADER,
    HEADER_BYTES,
    HEADER_WORDS,
    MAGIC,
    PAIRS_WORD,
    ROWS_WORD,
    Flags,
    Geometry,
    Header,
)


@dataclass(frozen=True, slots=True)
class Routing:
    """The host's view of one dispatch.

    Attributes:
        tokens: per group, the token rows it gets, ascending.
        ids: per group, [rows, K] its ids, -1 for foreign ones.
        num_pairs: per group, rows of its answer.
        source_P: row of each pair's answer in the matrix of all replies (each: status rows, then answers).
    """

    tokens: list[NDArray[np.int64]]
    ids: list[NDArray[np.int32]]
    num_pairs: list[int]
    source_P: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Packed:
    """What one dispatch sends and expects; its tensors are valid until the next one.

    Attributes:
        sends: to rank 1 + group; a group's block comes before its payload, if it has one.
        source_P: as in `Routing`, on the replies' device.
        reply_pairs: per group, rows that its reply has room for.
        num_pairs: per group, rows that it will fill; None where only the device knows.
    """

    sends: list[Message]
    source_P: Tensor
    reply_pairs: list[int]
    num_pairs: list[int] | None


class Packer(Protocol):
    """Owns the messages to all groups."""

    def pack(self, header: Header, x_TD: Tensor, ids_TK: Tensor) -> Packed:
        """Pack one batch.

        Args:
            header: generation, sequence and layer; the rest is filled in per group.
        Raises:
            IndexError: an id outside 0..E-1 (where the host looks at ids at all).
        """
        ...

    def blocks_with(self, header: Header) -> list[Message]:
        """A message to every group with this header and no rows."""
        ...


def route_on_host(ids_TK: NDArray[np.int32], owner_E: NDArray[np.int64], num_groups: int, status_rows: int) -> Routing:
    """Find the rows of every group.

    Args:
        owner_E: group of each expert in this layer.
    Raises:
        IndexError: an id outside 0..E-1.
    """
    # As unsigned, a negative id is out of range too, instead of counting from the end.
    owner_TK = owner_E[ids_TK.view(np.uint32)]
    owner_P = owner_TK.ravel()
    if num_groups == 1:
        everything = np.arange(len(ids_TK))
        return Routing([everything], [ids_TK], [len(owner_P)], np.arange(len(owner_P)) + status_rows)
    order = owner_P.argsort(kind="stable")
    source_P = np.empty(len(owner_P), dtype=np.int64)
    source_P[order] = np.arange(len(owner_P)) + status_rows * (owner_P[order] + 1)
    tokens, ids = [], []
    for group in range(num_groups):
        mine_TK = owner_TK == group
        rows = np.flatnonzero(mine_TK.any(axis=1))
        tokens.append(rows)
        ids.append(np.where(mine_TK[rows], ids_TK[rows], np.int32(-1)))
    return Routing(tokens, ids, np.bincount(owner_P, minlength=num_groups).tolist(), source_P)


class HostPacker:
    """See `Packer`; x in host memory.

    Compiled: 10, 12, 16 us for 1, 2, 4 groups at 8 tokens of hidden 1024, top-6, where NumPy took 15, 35, 57;
    `route_on_host` says the same in NumPy.
    """

    def __init__(
        self, geometry: Geometry, owner_LE: NDArray[np.int64], num_groups: int, memory: MessageMemory, max_tokens: int
    ) -> None:
        from moeray.transport.packing_kernel import pack_kernel  # brings numba

        self._geometry = geometry
        self._owner_LE = np.ascontiguousarray(owner_LE)
        self._memory = memory.take(aligned(geometry.message_room(max_tokens, num_groups)))
        self._integers = self._memory.numpy(), *(self._memory.view(t).numpy() for t in (torch.int32, torch.int64))
        self._kernel = pack_kernel()
        self._counts_NC = np.empty((num_groups, 4), dtype=np.int64)
        self._header_W = np.array([MAGIC, 0, 0, 0], dtype=np.int64)

    def pack(self, header: Header, x_TD: Tensor, ids_TK: Tensor) -> Packed:
        source_P = np.empty(ids_TK.numel(), dtype=np.int64)
        header_W = self._header_W
        header_W[1], header_W[2], header_W[3] = header.generation, header.sequence, header.layer
        fits = self._kernel(
            ids_TK.contiguous().numpy(),
            self._owner_LE[header.layer],
            self._geometry.dispatched.encode(x_TD).numpy(),
            header_W,
            self._geometry.status_rows,
            self._integers,
            self._counts_NC,
            source_P,
        )
        if not fits:
            raise IndexError(f"expert ids outside 0..{self._owner_LE.shape[1] - 1}")
        sends, num_pairs = [], []
        for group, (_, pairs, begin, num_bytes) in enumerate(self._counts_NC.tolist()):
            sends.append((self._memory[begin : begin + num_bytes], 1 + group))
            num_pairs.append(pairs)
        return Packed(sends, torch.from_numpy(source_P), num_pairs, num_pairs)

    def blocks_with(self, header: Header) -> list[Message]:
        message = self._memory[:HEADER_BYTES]
        HEADER.pack_into(message.numpy().data, 0, *header.words())
        return [(message, 1 + group) for group in range(len(self._counts_NC))]


class DevicePacker:
    """See `Packer`; x on a device.

    Batches that fit inline for any routing (decode) are packed without the host reading anything: every group's reply
    gets room for all pairs of the bucket, the next power of two of T. For larger ones (prefill) the host reads the ids
    once and sizes are exact; the rows themselves never leave the device.
    """

    def __init__(
        self, geometry: Geometry, owner_LE: NDArray[np.int64], num_groups: int, memory: MessageMemory, max_tokens: int
    ) -> None:
        self._geometry = geometry
        self._host_owner_LE = owner_LE
        self._blocks = memory.take(num_groups * geometry.block_bytes).view(num_groups, geometry.block_bytes)
        device = self._blocks.device
        self._owner_LE = torch.from_numpy(owner_LE).to(device)
        self._large = memory.take(geometry.payload_room(max_tokens, num_groups))
        self._headers_NW = self._blocks.view(torch.int64)[:, :HEADER_WORDS]
        inline = geometry.inline_rows
        self._inline = [geometry.payload_views(block[HEADER_BYTES:], inline, inline) for block in self._blocks]
        self._groups_N = torch.arange(num_groups, device=device)

    def pack(self, header: Header, x_TD: Tensor, ids_TK: Tensor) -> Packed:
        if len(x_TD) <= self._geometry.inline_rows:
            return self._pack_bucket(header, x_TD, ids_TK)
        return self._pack_exactly(header, x_TD, ids_TK)

    def blocks_with(self, header: Header) -> list[Message]:
        self._write_headers([header] * len(self._blocks))
        return _to_groups(self._blocks)

    def _pack_bucket(self, header: Header, x_TD: Tensor, ids_TK: Tensor) -> Packed:
        num_tokens, top_k = ids_TK.shape
        num_groups = len(self._blocks)
        room = self._geometry.bucket_pairs(num_tokens)
        x_TB = self._geometry.dispatched.encode(x_TD)
        owner_TK = self._owner_LE[header.layer][ids_TK.long()]
        mine_NTK = owner_TK.unsqueeze(0) == self._groups_N.view(-1, 1, 1)
        member_NT = mine_NTK.any(dim=2)
        # Members first, in order; what follows them is not counted in the header and has ids of -1 only.
        tokens_NT = (~member_NT).to(torch.int8).argsort(dim=1, stable=True)
        own_ids_NTK = torch.where(mine_NTK, ids_TK, -1)
        for group, (rows, row_ids) in enumerate(self._inline):
            rows[:num_tokens] = x_TB[tokens_NT[group]]
            row_ids[:num_tokens] = own_ids_NTK[group][tokens_NT[group]]
        self._write_headers([header._replace(reply_pairs=room)] * num_groups)
        self._headers_NW[:, ROWS_WORD] = member_NT.sum(dim=1)
        self._headers_NW[:, PAIRS_WORD] = mine_NTK.sum(dim=(1, 2))
        owner_P = owner_TK.reshape(-1)
        rank_NP = mine_NTK.reshape(num_groups, num_tokens * top_k).cumsum(dim=1) - 1
        rank_P = rank_NP.gather(0, owner_P.unsqueeze(0)).squeeze(0)
        status_rows = self._geometry.status_rows
        source_P = owner_P * (status_rows + room) + status_rows + rank_P
        return Packed(_to_groups(self._blocks), source_P, [room] * num_groups, None)

    def _pack_exactly(self, header: Header, x_TD: Tensor, ids_TK: Tensor) -> Packed:
        geometry, device = self._geometry, self._blocks.device
        ids = ids_TK.cpu().contiguous().numpy()
        routing = route_on_host(ids, self._host_owner_LE[header.layer], len(self._blocks), geometry.status_rows)
        sizes = {
            group: geometry.payload_bytes(len(tokens)) for group, tokens in enumerate(routing.tokens) if len(tokens)
        }
        payloads = _cut_up(self._large, sizes)
        x_TB = geometry.dispatched.encode(x_TD)
        headers = []
        for group, (tokens, pairs) in enumerate(zip(routing.tokens, routing.num_pairs, strict=True)):
            flags = Flags.LARGE if group in payloads else Flags.NONE
            headers.append(header._replace(num_rows=len(tokens), num_pairs=pairs, reply_pairs=pairs, flags=int(flags)))
            if group in payloads:
                rows, row_ids = geometry.payload_views(payloads[group], len(tokens), len(tokens))
                rows.copy_(x_TB.index_select(0, torch.from_numpy(tokens).to(device)))
                row_ids.copy_(torch.from_numpy(routing.ids[group]))
        self._write_headers(headers)
        sends = [*_to_groups(self._blocks), *((payload, 1 + group) for group, payload in payloads.items())]
        return Packed(sends, torch.from_numpy(routing.source_P).to(device), routing.num_pairs, routing.num_pairs)

    def _write_headers(self, headers: Sequence[Header]) -> None:
        words_NW = torch.tensor([header.words() for header in headers], dtype=torch.int64)
        self._headers_NW.copy_(words_NW, non_blocking=True)


def _to_groups(blocks: Tensor) -> list[Message]:
    return [(block, 1 + group) for group, block in enumerate(blocks)]


def _cut_up(buffer: Tensor, sizes: dict[int, int]) -> dict[int, Tensor]:
    """Consecutive parts of `buffer` of these sizes."""
    parts, begin = {}, 0
    for key, size in sizes.items():
        parts[key] = buffer[begin : begin + size]
        begin += size
    return parts
