"""A group's end of one shard: receive, compute, answer, until the shard goes away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moeray.transport.communicator import Communicator, LinkBroken
from moeray.transport.interface import ExpertCompute
from moeray.transport.wire import HEADER_BYTES, Flags, Geometry, Header, Status, read_header, write_status


class GroupLink(Protocol):
    """A group's end of one shard's messages, whatever carries them. Used by one thread."""

    @property
    def device(self) -> torch.device:
        """Where the messages lie."""
        ...

    def next_block(self, reply: Tensor | None) -> Tensor:
        """Send the reply to the last call, if there was one, and wait for the next call.

        Args:
            reply: as `reply` gave it, filled.
        Returns:
            The call's block (uint8), valid until the next `next_block`, as are its payload and reply.
        Raises:
            LinkBroken: the shard is gone.
            ValueError: what came is not a call.
        """
        ...

    def payload(self, num_bytes: int) -> Tensor:
        """The rows (uint8) that did not fit into the block. Raises as `next_block`."""
        ...

    def reply(self, num_bytes: int) -> Tensor:
        """Room (uint8) for the reply.

        Raises:
            ValueError: the shard has less.
        """
        ...

    def close(self) -> None:
        """Drop the connection; the shard's wait ends with LinkBroken."""
        ...


class BufferedLink:
    """A `GroupLink` of buffers and messages between them. They grow to the largest call and stay.

    The reply to one call and the receive of the next are started together, so that the shard's next message always
    finds its receive posted.
    """

    def __init__(self, communicator: Communicator, block_bytes: int) -> None:
        self._communicator = communicator
        self.device = communicator.device
        self._block = torch.zeros(block_bytes, dtype=torch.uint8, device=self.device)
        self._payload = self._reply = torch.empty(0, dtype=torch.uint8, device=self.device)

    def next_block(self, reply: Tensor | None) -> Tensor:
        sends = [] if reply is None else [(reply, 0)]
        self._communicator.exchange(sends, [(self._block, 0)]).wait(None)
        return self._block

    def payload(self, num_bytes: int) -> Tensor:
        if num_bytes > len(self._payload):
            self._payload = self._payload.new_empty(num_bytes)
        payload = self._payload[:num_bytes]
        self._communicator.exchange([], [(payload, 0)]).wait(None)
        return payload

    def reply(self, num_bytes: int) -> Tensor:
        if num_bytes > len(self._reply):
            self._reply = self._reply.new_zeros(num_bytes)
        return self._reply[:num_bytes]

    def close(self) -> None:
        self._communicator.close()


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
        self, link: GroupLink, geometry: Geometry, compute: ExpertCompute, generation: Callable[[], int]
    ) -> None:
        """Nothing is received yet.

        Args:
            generation: the group's current one; other generations' calls are answered with STALE.
        """
        self._link = link
        self._geometry = geometry
        self._compute = compute
        self._generation = generation
        self.counts = SessionCounts()

    def serve(self) -> str:
        """Answer calls until the shard goes away; returns why it ended.

        Raises:
            ValueError: the shard sent something that is not a call.
        """
        reply: Tensor | None = None
        try:
            while True:
                block = self._link.next_block(reply)
                reply = self._answer(read_header(block), block)
        except LinkBroken as error:
            return error.reason
        finally:
            self._link.close()

    def _answer(self, header: Header, block: Tensor) -> Tensor:
        geometry, status_rows = self._geometry, self._geometry.status_rows
        x_TB, ids_TK = self._rows(header, block)
        reply = self._link.reply((status_rows + header.reply_pairs) * geometry.row_bytes)
        generation, status, text = self._generation(), Status.OK, ""
        if header.generation != generation:
            status = Status.STALE
        elif not header.flags & Flags.PROBE:
            try:
                x_TD = geometry.dispatched.decode(x_TB)
                self._compute_rows(header, x_TD, ids_TK, reply[status_rows * geometry.row_bytes :])
            except Exception as error:  # noqa: BLE001
                # Whatever went wrong in the computation is this call's result; the shard must not wait for rows.
                status, text = Status.FAILED, f"{type(error).__name__}: {error}"
                self.counts.failures += 1
            self.counts.calls += 1
            self.counts.tokens += header.num_rows
            self.counts.pairs += header.num_pairs
        write_status(reply, status, header.sequence, generation, text)
        return reply

    def _rows(self, header: Header, block: Tensor) -> tuple[Tensor, Tensor]:
        geometry, num_rows = self._geometry, header.num_rows
        if not header.flags & Flags.LARGE:
            if num_rows > geometry.inline_rows:
                raise ValueError(f"{num_rows} rows inline, room for {geometry.inline_rows}")
            return geometry.payload_views(block[HEADER_BYTES:], geometry.inline_rows, num_rows)
        return geometry.payload_views(self._link.payload(geometry.payload_bytes(num_rows)), num_rows, num_rows)

    def _compute_rows(self, header: Header, x_TD: Tensor, ids_TK: Tensor, room: Tensor) -> None:
        geometry, num_pairs = self._geometry, header.num_pairs
        rows_PD = self._compute(header.layer, x_TD, ids_TK)
        expected = (num_pairs, geometry.hidden_size)
        if rows_PD.shape != expected or rows_PD.dtype != geometry.dtype:
            raise ValueError(f"the experts gave {rows_PD.dtype} {list(rows_PD.shape)}, asked were {list(expected)}")
        room[: num_pairs * geometry.row_bytes].view(geometry.dtype).view(expected).copy_(rows_PD)
