"""A group's end of one shard: receive, compute, answer, until the shard goes away."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moeray.transport.communicator import Communicator, LinkBroken
from moeray.transport.interface import ExpertCompute
from moeray.transport.wire import HEADER_BYTES, Flags, Geometry, Header, Status, read_header, write_status

ComputeInto = Callable[[int, Tensor, Tensor, Tensor], None]
"""`compute_into(layer, x_TD, expert_ids_TK, room_PD)`: `ExpertCompute` with its rows written where they will lie."""
LARGE, PROBE, EXACT = int(Flags.LARGE), int(Flags.PROBE), int(Flags.EXACT)
MAX_VIEWS = 256


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
            The call's message (uint8; what follows the rows is of no meaning), valid until the next `next_block`, as
            are its payload and reply.
        Raises:
            LinkBroken: the shard is gone.
            ValueError: what came is not a call.
        """
        ...

    def payload(self, num_bytes: int) -> Tensor:
        """The rows (uint8) that come in a second message. Raises as `next_block`."""
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
    """A `GroupLink` of buffers and messages between them. Those for replies grow to the largest call and stay.

    The reply to one call and the receive of the next are started together, so that the shard's next message always
    finds its receive posted.
    """

    def __init__(
        self,
        communicator: Communicator,
        geometry: Geometry,
        max_tokens: int,
        on_connected: Callable[[], None] | None = None,
    ) -> None:
        """Make room.

        Args:
            on_connected: called when the first message is here: backends connect on first use.
            max_tokens: of one message. Gloo and TLS take a shorter message into a larger receive, so all of it comes at
                once; the system commits only what is written.
        """
        self._communicator = communicator
        self._on_connected = on_connected
        self.device = communicator.device
        num_bytes = geometry.block_bytes
        if not communicator.bucketed:
            num_bytes = max(num_bytes, geometry.message_bytes(max_tokens))
        self._block = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        self._payload = self._reply = torch.empty(0, dtype=torch.uint8, device=self.device)

    def next_block(self, reply: Tensor | None) -> Tensor:
        sends = [] if reply is None else [(reply, 0)]
        self._communicator.exchange(sends, [(self._block, 0)]).wait(None)
        if self._on_connected is not None:
            self._on_connected()
            self._on_connected = None
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


def copying(compute: ExpertCompute) -> ComputeInto:
    """Its rows, copied."""

    def compute_into(layer: int, x_TD: Tensor, ids_TK: Tensor, room_PD: Tensor) -> None:
        rows_PD = compute(layer, x_TD, ids_TK)
        if rows_PD.shape != room_PD.shape or rows_PD.dtype != room_PD.dtype:
            given, asked = ((each.dtype, list(each.shape)) for each in (rows_PD, room_PD))
            raise ValueError(f"the experts gave {given[0]} {given[1]}, asked were {asked[0]} {asked[1]}")
        room_PD.copy_(rows_PD)

    return compute_into


class Session:
    """Serves one shard; its thread alone uses it."""

    def __init__(
        self, link: GroupLink, geometry: Geometry, compute: ComputeInto, generations: Callable[[], Collection[int]],
        on_failure: Callable[[int], None],
    ) -> None:  # fmt: skip
        """Nothing is received yet.

        Args:
            generations: that the group serves now; other generations' calls are answered with STALE.
            on_failure: called with the layer of a call that could not be computed.
        """
        self._link = link
        self._geometry = geometry
        self._compute = compute
        self._generations = generations
        self._on_failure = on_failure
        self._views: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
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
        geometry = self._geometry
        # Before anything can go wrong: a second message has to be received whatever becomes of the call.
        rows = None if header.flags & PROBE else self._rows(header, block)
        reply = self._link.reply((geometry.status_rows + header.reply_pairs) * geometry.row_bytes)
        generation, status, text = header.generation, Status.OK, ""
        if generation not in (served := self._generations()):
            generation, status = max(served, default=0), Status.STALE
        elif rows is not None:
            try:
                self._compute_rows(header, *rows, reply)
            except Exception as error:  # noqa: BLE001
                # Whatever went wrong in the computation is this call's result; the shard must not wait for rows.
                status, text = Status.FAILED, f"{type(error).__name__}: {error}"
                self.counts.failures += 1
                self._on_failure(header.layer)
            self.counts.calls += 1
            self.counts.tokens += header.num_rows
            self.counts.pairs += header.num_pairs
        write_status(reply, status, header.sequence, generation, text)
        return reply

    def _rows(self, header: Header, block: Tensor) -> tuple[Tensor, Tensor]:
        """(x_TB, ids_TK) of a call."""
        geometry, num_rows = self._geometry, header.num_rows
        if header.flags & LARGE:
            return geometry.payload_views(self._link.payload(geometry.payload_bytes(num_rows)), num_rows, num_rows)
        # Decoding brings the same shapes to the same places again and again.
        place = (block.data_ptr(), num_rows)
        kept = self._views.get(place)
        if kept is not None:
            return kept
        capacity = num_rows if header.flags & EXACT else geometry.inline_rows
        num_bytes = HEADER_BYTES + geometry.payload_bytes(capacity)
        if num_rows > capacity or num_bytes > len(block):
            raise ValueError(f"{num_rows} rows, {num_bytes} bytes, in a message of {len(block)}")
        if len(self._views) >= MAX_VIEWS:
            self._views.clear()
        self._views[place] = views = geometry.payload_views(block[HEADER_BYTES:num_bytes], capacity, num_rows)
        return views

    def _compute_rows(self, header: Header, x_TB: Tensor, ids_TK: Tensor, reply: Tensor) -> None:
        geometry = self._geometry
        reply_RD = reply.view(geometry.dtype).view(-1, geometry.hidden_size)
        room_PD = reply_RD[geometry.status_rows : geometry.status_rows + header.num_pairs]
        self._compute(header.layer, geometry.dispatched.decode(x_TB), ids_TK, room_PD)
