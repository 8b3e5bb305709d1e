"""Which rows go to which group, and where each pair's answer will lie in the replies.

Two packers with the same result: `pack_on_host` (NumPy, exact sizes, 5 to 50 us) and `pack_on_device` (torch, no size
ever read by the host). Only tokens with at least one expert in a group go to it; ids of experts elsewhere are -1.

Suffixes: T tokens, D hidden, K experts per token, P = T * K pairs in row-major order, N groups, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeray.transport.wire import Geometry, Header

# NumPy has no bfloat16: rows are moved as integers of the same width.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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


def as_numpy_rows(x_TD: Tensor) -> NDArray[np.generic]:
    """[T, D] integers of the width of x's dtype; shares memory."""
    array: NDArray[np.generic] = x_TD.view(INTEGERS[x_TD.dtype.itemsize]).numpy()
    return array


class HostBlocks:
    """The dispatch blocks of all groups, allocated once, with NumPy views into them."""

    def __init__(self, geometry: Geometry, num_groups: int) -> None:
        self._geometry = geometry
        self.blocks = torch.zeros((num_groups, geometry.block_bytes), dtype=torch.uint8)
        self.headers_NW = self.blocks.view(torch.int64)[:, :8].numpy()
        pairs = [self._views(self.blocks[group, 64:], geometry.inline_rows) for group in range(num_groups)]
        self._x = [x for x, _ in pairs]
        self._ids = [ids for _, ids in pairs]
        self._large = torch.empty(0, dtype=torch.uint8)

    def fill(self, group: int, x_TD: NDArray[np.generic], tokens: NDArray[np.int64], ids: NDArray[np.int32]) -> None:
        """Put a group's rows inline; there must be room."""
        num_rows = len(tokens)
        np.take(x_TD, tokens, axis=0, out=self._x[group][:num_rows], mode="clip")
        self._ids[group][:num_rows] = ids

    def large_payloads(self, x_TD: NDArray[np.generic], routing: Routing) -> dict[int, Tensor]:
        """Exact payloads of the groups whose rows do not fit inline; valid until the next call."""
        geometry = self._geometry
        large = {group: len(rows) for group, rows in enumerate(routing.tokens) if len(rows) > geometry.inline_rows}
        needed = sum(geometry.payload_bytes(num_rows) for num_rows in large.values())
        if needed > len(self._large):
            self._large = torch.empty(needed, dtype=torch.uint8)
        payloads, begin = {}, 0
        for group, num_rows in large.items():
            payload = self._large[begin : begin + geometry.payload_bytes(num_rows)]
            begin += len(payload)
            x, ids = self._views(payload, num_rows)
            np.take(x_TD, routing.tokens[group], axis=0, out=x, mode="clip")
            ids[:] = routing.ids[group]
            payloads[group] = payload
        return payloads

    def _views(self, payload: Tensor, num_rows: int) -> tuple[NDArray[np.generic], NDArray[np.int32]]:
        x, ids = self._geometry.payload_views(payload, num_rows, num_rows)
        return as_numpy_rows(x), ids.numpy()


class DeviceBlocks:
    """The same blocks on a device, filled without the host reading anything: T must fit inline for every group."""

    def __init__(self, geometry: Geometry, num_groups: int, device: torch.device) -> None:
        self._status_rows = geometry.status_rows
        self.blocks = torch.zeros((num_groups, geometry.block_bytes), dtype=torch.uint8, device=device)
        views = [
            geometry.payload_views(self.blocks[group, 64:], geometry.inline_rows, geometry.inline_rows)
            for group in range(num_groups)
        ]
        self._x, self._ids = [x for x, _ in views], [ids for _, ids in views]
        self.headers_NW = self.blocks.view(torch.int64)[:, :8]
        self._groups_N = torch.arange(num_groups, device=device)

    def fill(self, x_TD: Tensor, ids_TK: Tensor, owner_E: Tensor, header: Header) -> tuple[Tensor, Tensor]:
        """Pack one batch for all groups.

        Args:
            header: rows and pairs are filled in per group here.
        Returns:
            source_P: as in `Routing`, for replies with room for `header.reply_pairs` rows each.
            pairs_N: rows of each group's answer.
        """
        num_tokens, top_k = ids_TK.shape
        owner_TK = owner_E[ids_TK.long()]
        mine_NTK = owner_TK.unsqueeze(0) == self._groups_N.view(-1, 1, 1)
        member_NT = mine_NTK.any(dim=2)
        pairs_N = mine_NTK.sum(dim=(1, 2))
        # Members first, in order; what follows them is not counted in the header and has ids of -1 only.
        tokens_NT = (~member_NT).to(torch.int8).argsort(dim=1, stable=True)
        own_ids_NTK = torch.where(mine_NTK, ids_TK, -1)
        for group in range(len(self._x)):
            self._x[group][:num_tokens] = x_TD[tokens_NT[group]]
            self._ids[group][:num_tokens] = own_ids_NTK[group][tokens_NT[group]]
        words = torch.tensor(header.words(), dtype=torch.int64)
        self.headers_NW[:] = words.to(self.headers_NW.device, non_blocking=True)
        self.headers_NW[:, Header.ROWS_WORD] = member_NT.sum(dim=1)
        self.headers_NW[:, Header.PAIRS_WORD] = pairs_N
        rank_NP = mine_NTK.reshape(len(self._x), num_tokens * top_k).cumsum(dim=1) - 1
        owner_P = owner_TK.reshape(-1)
        rank_P = rank_NP.gather(0, owner_P.unsqueeze(0)).squeeze(0)
        stride = self._status_rows + header.reply_pairs
        return owner_P * stride + self._status_rows + rank_P, pairs_N
