"""The attention shard's end over any `Communicator`: channels on one node, Gloo between CPUs, NCCL on GPUs.

One dispatch is one block to every group (header and rows together, see wire.py), a second message only to groups
whose rows do not fit inline; one reply of known size comes back from every group. Nothing waits between dispatch and
combine. A group without a row still takes part, so that death and generation are noticed everywhere.

States: usable -> (PeerLost | StaleGeneration) -> poisoned: connections are dropped at once, so that the surviving
groups free theirs, and every later call raises the same error. GroupFailed does not poison: all replies were read,
the next layer call starts clean. A handle that was never combined is settled by the next dispatch.

Groups of the placement that are not there have no place here: what belongs to the n-th of the others has index n, and
errors name its number. An expert without a copy among them is missing: only calls that need it fail.

A dead group is noticed when its reply is waited for: at once behind a channel, and otherwise, group after group in
ascending order, at once if the groups before it have answered, in any case within timeout_s. What a layer call costs:
`timings()`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moeray.placement import Placement
from moeray.transport.communicator import NOBODY, Communicator, Flight, Last, LinkBroken, Message
from moeray.transport.errors import (
    TOO_SLOW,
    ExpertsMissing,
    GroupFailed,
    PeerLost,
    StaleGeneration,
    TransportError,
)
from moeray.transport.interface import DispatchHandle
from moeray.transport.links import Links
from moeray.transport.owners import all_replaceable, owners
from moeray.transport.packing import DevicePacker, HostPacker, Packed, Packer
from moeray.transport.patience import Answered, Patience
from moeray.transport.reduction import combine_rows, prepare, require_finite
from moeray.transport.rendezvous import ShardRendezvous
from moeray.transport.spec import TransportSpec
from moeray.transport.timings import HopTimings, now_ns
from moeray.transport.wire import STATUS_BYTES, Flags, Header, Status, read_status


@dataclass(slots=True, eq=False)
class AllToAllHandle:
    """One dispatch in flight: sizes and places, but no reference to a connection."""

    generation: int
    sequence: int
    layer: int
    expert_ids_TK: Tensor
    weights_TK: Tensor
    source_P: Tensor
    reply_rows: list[int]
    dispatched_ns: int

    def index_of_pairs(self) -> Tensor:
        """[P] whose reply holds each pair's row: the group's place among those that are there."""
        ends = torch.tensor(self.reply_rows, device=self.source_P.device).cumsum(dim=0)
        return torch.searchsorted(ends, self.source_P, right=True)


class AllToAllTransport:
    """See `moeray.transport.interface.Transport`; made by `moeray.transport.connect`.

    Attributes:
        links: per group, "channel" or the backend.
    """

    def __init__(
        self,
        spec: TransportSpec,
        links: Links,
        rendezvous: ShardRendezvous,
        placement: Placement,
    ) -> None:
        self._failure: Callable[[], TransportError] | None = None
        self._placement = placement
        self._geometry = geometry = spec.geometry
        self._max_tokens = spec.max_tokens
        self._communicator: Communicator | None = links.communicator
        self.links = links.names
        self._rendezvous = rendezvous
        self._groups = rendezvous.groups
        self._flight: Flight | None = None
        self._pending: AllToAllHandle | None = None
        self._sequence = 0
        num_groups, memory = len(self._groups), links.memory
        owner_LE = owners(placement, self._groups, spec.shard_number)
        self._missing_LE = torch.from_numpy(owner_LE < 0) if (owner_LE < 0).any() else None
        self._patience = Patience(spec.patience_s, spec.timeout_s, replaceable=all_replaceable(placement, self._groups))
        packer = DevicePacker if links.communicator.bucketed else HostPacker
        self._packer: Packer = packer(geometry, owner_LE, num_groups, memory, spec.max_tokens)
        reply_rows = geometry.reply_room(spec.max_tokens, num_groups)
        self._replies = memory.take(reply_rows * geometry.row_bytes).view(geometry.dtype).view(reply_rows, -1)
        prepare(geometry.dtype, self._replies.device)
        on_host = self._replies.is_cpu
        self._host_replies = self._replies.view(-1).view(torch.uint8).numpy().data if on_host else None
        self._timings = HopTimings(pairs_per_group=[0] * placement.num_groups)

    @property
    def generation(self) -> int:
        return self._placement.generation

    def timings(self) -> HopTimings:
        """Running sums; see `HopTimings.per_layer_us`."""
        return self._timings

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> AllToAllHandle:
        started = now_ns()
        self._check_usable()
        self._check_input(layer, x_TD, expert_ids_TK, weights_TK)
        self._sequence += 1
        packed = self._pack(layer, x_TD, expert_ids_TK)
        packed_at = now_ns()
        reply_rows = [self._geometry.status_rows + pairs for pairs in packed.reply_pairs]
        self._start(packed.sends, reply_rows)
        done = now_ns()
        self._timings.pack_ns += packed_at - started
        self._timings.send_ns += done - packed_at
        self._timings.tokens += x_TD.shape[0]
        ids_TK, weights_TK = expert_ids_TK.clone(), weights_TK.clone()
        handle = AllToAllHandle(
            self.generation, self._sequence, layer, ids_TK, weights_TK, packed.source_P, reply_rows, done
        )
        self._pending = handle
        return handle

    def combine(self, handle: DispatchHandle) -> Tensor:
        started = now_ns()
        self._check_usable(settle=False)
        if handle is not self._pending or not isinstance(handle, AllToAllHandle):
            raise TransportError("combine needs the handle of this transport's last dispatch, once")
        last = self._settle(handle, self._patience.limit_s(len(handle.source_P)))
        arrived = now_ns()
        failure = self._read_statuses(handle)
        if isinstance(failure, StaleGeneration):
            self._poison(lambda: StaleGeneration(failure.group, failure.ours, failure.theirs))
        if failure is not None:
            raise failure
        y_TD, is_finite = combine_rows(self._replies, handle.source_P, handle.weights_TK)
        if not is_finite:
            rows_PD = self._replies.index_select(0, handle.source_P)
            require_finite(y_TD, rows_PD, handle.layer, handle.expert_ids_TK, lambda: self._group_of_pairs(handle))
        timings = self._timings
        timings.calls += 1
        timings.overlap_ns += started - handle.dispatched_ns
        timings.wait_ns += arrived - started
        timings.reduce_ns += now_ns() - arrived
        self._judge(handle, arrived, last)
        return y_TD

    def probe(self, timeout_s: float) -> None:
        """Send every group an empty call and wait for its answer: the path and the generation are proved.

        Raises:
            PeerLost, StaleGeneration, GroupFailed: as combine.
        """
        self._sequence += 1
        header = Header(self.generation, self._sequence, -1, 0, 0, 0, Flags.PROBE)
        reply_rows = [self._geometry.status_rows] * len(self._groups)
        nothing = torch.empty(0)
        handle = AllToAllHandle(self.generation, self._sequence, -1, nothing, nothing, nothing, reply_rows, 0)
        self._start(self._packer.blocks_with(header), reply_rows)
        self._settle(handle, timeout_s)
        failure = self._read_statuses(handle)
        if failure is not None:
            raise failure

    def close(self) -> None:
        self._poison(lambda: TransportError("the transport was closed"))

    def __del__(self) -> None:
        # A flight that is dropped instead of ended can hang the process (see gloo.py).
        if self._failure is None:
            self.close()

    def _check_usable(self, settle: bool = True) -> None:
        if self._failure is not None:
            raise self._failure()
        gone = self._rendezvous.gone() if settle else None
        if gone is not None:
            raise self._lost(1 + gone, "connection closed by peer")
        if settle and self._pending is not None:
            self._settle(self._pending, self._patience.limit_s(len(self._pending.source_P)))

    def _check_input(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> None:
        geometry = self._geometry
        expected = (x_TD.shape[0], geometry.top_k)
        if x_TD.dtype != geometry.dtype or x_TD.shape[1:] != (geometry.hidden_size,):
            raise TransportError(
                f"x is {x_TD.dtype} {list(x_TD.shape)}, expected {geometry.dtype} [T, {geometry.hidden_size}]"
            )
        if expert_ids_TK.shape != expected or expert_ids_TK.dtype != torch.int32 or weights_TK.shape != expected:
            raise TransportError(
                f"ids are {expert_ids_TK.dtype} {list(expert_ids_TK.shape)}, weights {list(weights_TK.shape)}, "
                f"expected torch.int32 {list(expected)} and {list(expected)}"
            )
        if x_TD.shape[0] > self._max_tokens or not 0 <= layer < self._placement.num_layers:
            raise TransportError(
                f"layer {layer} with {len(x_TD)} tokens; layers are 0..{self._placement.num_layers - 1}, "
                f"at most {self._max_tokens} tokens"
            )
        if self._missing_LE is not None:
            self._check_held(layer, expert_ids_TK.cpu().long())

    def _check_held(self, layer: int, ids_TK: Tensor) -> None:
        """Only where an expert is missing at all: on a device this waits for the routing."""
        assert self._missing_LE is not None
        known_P = ids_TK[(ids_TK >= 0) & (ids_TK < self._placement.num_experts)]
        missing = known_P[self._missing_LE[layer][known_P]].unique().tolist()
        if missing:
            raise ExpertsMissing(layer, missing)

    def _pack(self, layer: int, x_TD: Tensor, ids_TK: Tensor) -> Packed:
        header = Header(self.generation, self._sequence, layer, 0, 0, 0, Flags.NONE)
        try:
            packed = self._packer.pack(header, x_TD, ids_TK)
        except IndexError:
            raise TransportError(f"expert ids must be 0..{self._placement.num_experts - 1}") from None
        for index, pairs in enumerate(packed.num_pairs or ()):
            self._timings.pairs_per_group[self._groups[index]] += pairs
        return packed

    def _start(self, sends: list[Message], reply_rows: list[int]) -> None:
        receives: list[Message] = []
        begin = 0
        for index, num_rows in enumerate(reply_rows):
            receives.append((self._replies[begin : begin + num_rows], 1 + index))
            begin += num_rows
        broken: tuple[int, str] | None = None
        if self._communicator is None:
            raise self._lost(1, "the connection was dropped")
        try:
            self._flight = self._communicator.exchange(sends, receives)
        except LinkBroken as error:
            broken = error.peer, error.reason
        if broken is not None:
            raise self._lost(*broken)

    def _judge(self, handle: AllToAllHandle, arrived_ns: int, last: Last) -> None:
        """A group that has become too slow is lost to the next call; this one has all its rows."""
        rows = [num_rows - self._geometry.status_rows for num_rows in handle.reply_rows]
        call = Answered(rows, (arrived_ns - handle.dispatched_ns) / 1e9, last.peer - 1, last.alone_s)
        if self._patience.is_over(call, arrived_ns / 1e9):
            self._lost(last.peer, TOO_SLOW)

    def _settle(self, handle: AllToAllHandle, timeout_s: float) -> Last:
        """Wait for the replies of `handle`."""
        self._pending = None
        flight, self._flight = self._flight, None
        broken: tuple[int, str] | None = None
        last = NOBODY
        if flight is not None:
            try:
                last = flight.wait(timeout_s)
            except LinkBroken as error:
                broken = error.peer, error.reason
        del flight
        if broken is not None:
            raise self._lost(*broken)
        return last

    def _read_statuses(self, handle: AllToAllHandle) -> GroupFailed | StaleGeneration | None:
        """The first group's error, if any. A reply that does not belong to this call poisons."""
        begin, row_bytes = 0, self._geometry.row_bytes
        statuses = self._host_replies or self._copied_statuses(handle.reply_rows)
        for index, num_rows in enumerate(handle.reply_rows):
            offset = begin * row_bytes
            begin += num_rows
            try:
                status = read_status(statuses, offset if self._host_replies else index * STATUS_BYTES)
            except ValueError as error:
                raise self._lost(1 + index, str(error)) from None
            if status.status is Status.STALE:
                return StaleGeneration(self._groups[index], self.generation, status.generation)
            if status.sequence != handle.sequence:
                raise self._lost(1 + index, f"answered call {status.sequence} instead of {handle.sequence}")
            if status.status is Status.FAILED:
                return GroupFailed(self._groups[index], status.text)
        return None

    def _group_of_pairs(self, handle: AllToAllHandle) -> Tensor:
        """[P] the group whose reply holds each pair's row."""
        return torch.tensor(self._groups, device=handle.source_P.device)[handle.index_of_pairs()]

    def _copied_statuses(self, reply_rows: list[int]) -> memoryview:
        """All statuses from the device, one after the other, in one copy."""
        raw, begin, found = self._replies.view(-1).view(torch.uint8), 0, []
        for num_rows in reply_rows:
            found.append(raw[begin : begin + STATUS_BYTES])
            begin += num_rows * self._geometry.row_bytes
        return torch.cat(found).cpu().numpy().data

    def _lost(self, peer: int, reason: str) -> TransportError:
        """Args: peer: its rank; below 1 where the library cannot tell, then the first that has gone, if any."""
        index = peer - 1 if peer > 0 else self._rendezvous.gone() or 0
        group = self._groups[index]
        return self._poison(lambda: PeerLost(group, reason))

    def _poison(self, failure: Callable[[], TransportError]) -> TransportError:
        """Drop everything that holds a connection; idempotent, the first failure stays."""
        if self._failure is None:
            self._failure = failure
            flight, self._flight, self._pending = self._flight, None, None
            if flight is not None:
                flight.abandon()
            del flight
            communicator, self._communicator = self._communicator, None
            if communicator is not None:
                communicator.close()
            self._rendezvous.close()
        return self._failure()
