"""A group's end of one shard: receive, compute, answer, until the shard goes away.

The reply to one call and the receive of the next are started together, so that the shard's next message always finds
its receive posted. Buffers grow to the largest call and stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moeray.transport.communicator import Communicator, LinkBroken
from moeray.transport.interface import ExpertCompute
from moeray.transport.wire import HEADER_BYTES, Flags, Geometry, Header, Status, write_status


@dataclass(slots=True)
class SessionCounts:
    """What one shard asked so far.

    Attributes:
        calls: layer calls answered, failed ones included.
        tokens: rows received.
        pairs: rows sent back.
    """

    calls: int = 0
    tokens: int = 0
    pairs: int = 0
    failures: int = 0


class Session:
    """Serves one shard; its thread alone uses it."""

    def __init__(
        self, communicator: Communicator, geometry: Geometry, compute: ExpertCompute, generation: Callable[[], int]
    ) -> None:
        """Allocate the buffers of one shard.

        Args:
            generation: the group's current one; other generations' calls are answered with STALE.
        """
        self._communicator = communicator
        self._geometry = geometry
        self._compute = compute
        self._generation = generation
        device = communicator.device
        self._block = torch.zeros(geometry.block_bytes, dtype=torch.uint8, device=device)
        self._payload = torch.empty(0, dtype=torch.uint8, device=device)
        self._replies = torch.zeros((geometry.status_rows, geometry.hidden_size), dtype=geometry.dtype, device=device)
        self.counts = SessionCounts()

    def serve(self) -> str:
        """Answer calls until the shard goes away; returns why it ended.

        Raises:
            ValueError: the shard sent something that is not a call.
        """
        try:
            flight = self._communicator.exchange([], [(self._block, 0)])
            while True:
                flight.wait(None)
                reply = self._answer(Header.from_words(self._block[:HEADER_BYTES].view(torch.int64).tolist()))
                flight = self._communicator.exchange([(reply, 0)], [(self._block, 0)])
        except LinkBroken as error:
            return error.reason
        finally:
            self._communicator.close()

    def _answer(self, header: Header) -> Tensor:
        x_TD, ids_TK = self._rows(header)
        status_rows = self._geometry.status_rows
        num_rows = status_rows + header.reply_pairs
        if num_rows > len(self._replies):
            self._replies = self._replies.new_zeros((num_rows, self._geometry.hidden_size))
        reply = self._replies[:num_rows]
        generation, status, text = self._generation(), Status.OK, ""
        if header.generation != generation:
            status = Status.STALE
        elif not header.flags & Flags.PROBE:
            try:
                reply[status_rows : status_rows + header.num_pairs] = self._compute_rows(header, x_TD, ids_TK)
            except Exception as error:  # noqa: BLE001
                # Whatever went wrong in the computation is this call's result; the shard must not wait for rows.
                status, text = Status.FAILED, f"{type(error).__name__}: {error}"
                self.counts.failures += 1
            self.counts.calls += 1
            self.counts.tokens += header.num_rows
            self.counts.pairs += header.num_pairs
        write_status(reply[:status_rows], status, header.sequence, generation, text)
        return reply

    def _rows(self, header: Header) -> tuple[Tensor, Tensor]:
        geometry, num_rows = self._geometry, header.num_rows
        if not header.flags & Flags.LARGE:
            if num_rows > geometry.inline_rows:
                raise ValueError(f"{num_rows} rows inline, room for {geometry.inline_rows}")
            return geometry.payload_views(self._block[HEADER_BYTES:], geometry.inline_rows, num_rows)
        num_bytes = geometry.payload_bytes(num_rows)
        if num_bytes > len(self._payload):
            self._payload = self._payload.new_empty(num_bytes)
        payload = self._payload[:num_bytes]
        self._communicator.exchange([], [(payload, 0)]).wait(None)
        return geometry.payload_views(payload, num_rows, num_rows)

    def _compute_rows(self, header: Header, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
        rows_PD = self._compute(header.layer, x_TD, ids_TK)
        expected = (header.num_pairs, self._geometry.hidden_size)
        if rows_PD.shape != expected or rows_PD.dtype != self._geometry.dtype:
            raise ValueError(f"the experts gave {rows_PD.dtype} {list(rows_PD.shape)}, asked were {list(expected)}")
        return rows_PD
