"""The hop to the expert groups as one EngineCore sees it: the current Transport and what its calls cost.

One EngineCore has one hop; its steps call it from one thread. The transport can be replaced between steps (a new
generation of the placement).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor

from moeray.transport.errors import TransportError
from moeray.transport.interface import DispatchHandle, Transport
from moeray.transport.links import room_for
from moeray.transport.wire import MAX_INLINE_ROWS, Geometry


class NotConnected(TransportError):
    """A request reached the experts before the shard was told where they are."""


@dataclass(slots=True)
class HopCosts:
    """Sums since the last connect; times in microseconds.

    Attributes:
        calls: layer calls combined.
        tokens: tokens sent, summed over layer calls.
        overlap_us: between dispatch and combine: the shared expert.
        failures: layer calls that raised.
    """

    calls: int = 0
    tokens: int = 0
    dispatch_us: float = 0.0
    overlap_us: float = 0.0
    combine_us: float = 0.0
    failures: int = 0


@dataclass(slots=True)
class Hop:
    """Dispatch and combine over the current transport.

    Attributes:
        reserved: device memory for the messages, held since vLLM's profile run.
    """

    costs: HopCosts = field(default_factory=HopCosts)
    reserved: Tensor | None = None
    _transport: Transport | None = None
    _in_flight: DispatchHandle | None = None
    _dispatched_ns: int = 0

    @property
    def generation(self) -> int | None:
        """Generation of the current transport; None before the first connect."""
        return None if self._transport is None else self._transport.generation

    def reserve(self, x_TD: Tensor, top_k: int) -> None:
        """Hold the memory of a layer call like this one, so that vLLM counts it before it sizes the KV cache.

        For as many groups as a token can go to; a transport that needs more allocates it. Only ever grows.
        """
        geometry = Geometry(x_TD.shape[1], top_k, x_TD.dtype, MAX_INLINE_ROWS)
        num_bytes = room_for(geometry, len(x_TD), top_k)
        if self.reserved is None or num_bytes > len(self.reserved):
            self.reserved = None  # the old one first: both at once would be counted
            self.reserved = torch.empty(num_bytes, dtype=torch.uint8, device=x_TD.device)

    def replace(self, transport: Transport | None) -> None:
        """Close the old transport and use this one; the costs start again.

        The old one is closed first and no reference to it is kept: the groups accept the shard again only when the
        old connections are gone.
        """
        old, self._transport, self._in_flight = self._transport, None, None
        if old is not None:
            old.close()
        del old
        self._transport, self.costs = transport, HopCosts()

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> None:
        """Send; exactly one `combine` must follow before the next layer.

        Raises:
            NotConnected: no transport yet.
            TransportError: see `Transport.dispatch`.
        """
        if self._transport is None:
            raise NotConnected("the shard is not connected to its expert groups yet")
        started = perf_counter_ns()
        try:
            self._in_flight = self._transport.dispatch(layer, x_TD, expert_ids_TK, weights_TK)
        except TransportError:
            self.costs.failures += 1
            raise
        self._dispatched_ns = perf_counter_ns()
        self.costs.dispatch_us += (self._dispatched_ns - started) / 1e3
        self.costs.tokens += x_TD.shape[0]

    def combine(self) -> Tensor:
        """The reduced rows [T, D] of the last dispatch.

        Raises:
            TransportError: see `Transport.combine`.
        """
        handle, self._in_flight = self._in_flight, None
        if self._transport is None or handle is None:
            raise NotConnected("the transport was replaced in the middle of a layer call")
        started = perf_counter_ns()
        self.costs.overlap_us += (started - self._dispatched_ns) / 1e3
        try:
            y_TD = self._transport.combine(handle)
        except TransportError:
            self.costs.failures += 1
            raise
        self.costs.combine_us += (perf_counter_ns() - started) / 1e3
        self.costs.calls += 1
        return y_TD

    def report(self) -> dict[str, Any]:
        """Costs and generation as plain values; `stages`: the transport's own, finer account, where it keeps one."""
        timings = getattr(self._transport, "timings", None)
        stages = timings().per_layer_us() if timings is not None else {}
        return {"generation": self.generation, **asdict(self.costs), "stages": stages}


hop = Hop()
"""This process' hop."""
