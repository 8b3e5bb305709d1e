"""NCCL: device tensors, the same messages as Gloo's.

NOT RUN: written without a GPU at hand; `tests/contract/test_transport.py` runs it where there is one.

One ProcessGroupNCCL per shard. The messages of one exchange are coalesced into one NCCL group call. The host waits by
polling (NCCL itself never gives up on a dead peer), so that a timeout, or the end of the rendezvous connection, which
`peer_gone` reports, aborts the communicator (`ncclCommAbort`) instead of hanging the stream.

Sizes are bucketed: for decode batches neither dispatch nor reply size depends on the routing, so the shard's host
never waits for the routing result; it waits twice per layer, in combine: for the replies' statuses, and to know
whether the sum is finite. These waits are a break in a CUDA graph: vllm_hooks wraps dispatch and combine in
`eager_break_during_capture`. Every reply has room for all pairs of the bucket, so its unused bytes grow with the number
of groups: meant for a few groups per shard.
A group with several shards has one receive kernel waiting per shard; `options.config.max_ctas` keeps each to one SM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from time import monotonic, sleep
from typing import Any

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from moeray.transport.communicator import NOBODY, Last, LinkBroken, Message
from moeray.transport.errors import no_answer

PeerGone = Callable[[], int | None]
"""Rank of a peer whose rendezvous connection has ended, or None. Does not block."""

POLL_S = 20e-6
SLOW_POLL_S = 1e-3
SPIN_S = 0.05


class NcclFlight:
    """One coalesced exchange."""

    def __init__(self, communicator: NcclCommunicator, work: Any) -> None:
        self._communicator = communicator
        self._work = work

    def wait(self, timeout_s: float | None) -> Last:
        started = monotonic()
        broken: tuple[int, str] | None = None
        while broken is None and not self._work.is_completed():
            waited = monotonic() - started
            gone = self._communicator.peer_gone()
            if gone is not None:
                broken = gone, "connection closed by peer"
            elif timeout_s is not None and waited > timeout_s:
                broken = -1, no_answer(timeout_s)
            else:
                sleep(POLL_S if waited < SPIN_S else SLOW_POLL_S)
        if broken is None and self._work.exception() is not None:
            broken = -1, str(self._work.exception()).splitlines()[0][:160]
        if broken is not None:
            self._communicator.close()
            raise LinkBroken(*broken)
        self._work.wait()  # orders the caller's stream after the messages; does not block the host
        return NOBODY  # all messages are one operation: the library does not tell who was last

    def abandon(self) -> None:
        self._communicator.close()


class NcclCommunicator:
    """See `Communicator`."""

    bucketed = True

    def __init__(
        self, store: Store, rank: int, size: int, device: torch.device, connect_timeout_s: float, peer_gone: PeerGone
    ) -> None:
        from torch.distributed import ProcessGroupNCCL  # not in a CPU build of torch

        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=connect_timeout_s)
        options.config.blocking = 1
        options.config.max_ctas = 1
        self.device = device
        self.peer_gone = peer_gone
        with torch.cuda.device(device):
            self._group: Any = ProcessGroupNCCL(store, rank, size, options)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> NcclFlight:
        broken: str | None = None
        work: Any = None
        try:
            with torch.cuda.device(self.device):
                self._group._start_coalescing(self.device)
                for tensor, peer in receives:
                    self._group.recv([tensor], peer, 0)
                for tensor, peer in sends:
                    self._group.send([tensor], peer, 0)
                work = self._group._end_coalescing(self.device)
        except RuntimeError as error:
            broken = str(error).splitlines()[0][:160]
        if broken is not None:
            self.close()
            raise LinkBroken(-1, broken)
        return NcclFlight(self, work)

    def close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.abort()
