"""The hop to the expert groups as one EngineCore sees it: where it goes, what its calls cost, and how they survive.

One EngineCore has one hop (two where steps are cut in halves); its steps call it from one thread. Another thread, the
route feed's, brings new generations. They meet at layer boundaries: a layer call holds the hop's lock from dispatch to
combine, a change of transport holds it for the length of an assignment.

A layer call that fails is computed again from the same input, so no error of a group reaches the engine:

- the group died, hung, came too late or gave garbage: it is left out, and its experts' copies elsewhere are asked;
- an expert has no copy that is there: the call waits for a route that has one, `wait_s` at most.

The rows of a token do not depend on who computes them (bit for bit), so the engine cannot tell.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from time import monotonic, perf_counter_ns
from typing import Any

import torch
from torch import Tensor

from moeray.membership import Charge
from moeray.transport.errors import ExpertsMissing, GroupFailed, PeerLost, StaleGeneration, TransportError
from moeray.transport.interface import DispatchHandle, Transport
from moeray.transport.links import room_for
from moeray.transport.wire import MAX_INLINE_ROWS, Geometry
from moeray.vllm_hooks.blame import Blame, beyond_doubt, can_carry, judged, may_be_the_calls_own
from moeray.vllm_hooks.hop_costs import HopCosts
from moeray.vllm_hooks.route import Route
from moeray.vllm_hooks.trial import broken_groups

Connect = Callable[[Route, frozenset[int], bool], Transport]
"""`connect(route, absent, in_a_hurry)`: a transport to the route's groups but those; a step waits if in a hurry."""
Accuse = Callable[[str, str, Charge], None]
"""`accuse(group_id, reason, charge)`: tell the cluster that a group is bad."""
OnWaiting = Callable[[bool], None]
"""`on_waiting(True)` when a layer call begins to wait for experts that nobody has, `on_waiting(False)` once it ends."""
RETRY_S = 0.5
HEAL_S = 5.0
"""After which a group that was left out, and is not needed, may be tried again: it may only have been slow."""
DEFAULT_WAIT_S = 120.0

logger = logging.getLogger(__name__)


class NotConnected(TransportError):
    """A request reached the experts before the shard was told where they are."""


MENDABLE = (PeerLost, GroupFailed, StaleGeneration, ExpertsMissing, NotConnected)
"""Errors of a group or a generation; any other is the caller's."""


@dataclass(frozen=True, slots=True)
class LayerCall:
    """The input of the layer call in flight, kept until it is combined."""

    layer: int
    x_TD: Tensor
    expert_ids_TK: Tensor
    weights_TK: Tensor


class Hop:
    """Dispatch and combine over the current transport.

    Attributes:
        costs: see `HopCosts`.
        reserved: device memory for the messages, held since vLLM's profile run.
    """

    def __init__(self) -> None:
        self.costs = HopCosts()
        self.reserved: Tensor | None = None
        self._connect: Connect | None = None
        self._accuse: Accuse = lambda *_: None
        self._on_waiting: OnWaiting = lambda _: None
        self._said_waiting = False
        self._wait_s = DEFAULT_WAIT_S
        self._transport: Transport | None = None
        self._route: Route | None = None
        self._wanted: Route | None = None
        self._bad: dict[int, Blame] = {}
        self._news = threading.Condition()
        self._between_calls = threading.Lock()
        self._call: LayerCall | None = None
        self._handle: DispatchHandle | None = None
        self._failure: TransportError | None = None
        self._dispatched_ns = 0
        self.is_waiting = False

    def set_up(
        self,
        connect: Connect,
        accuse: Accuse | None = None,
        wait_s: float = DEFAULT_WAIT_S,
        on_waiting: OnWaiting | None = None,
    ) -> None:
        """Before the first route.

        Args:
            wait_s: how long a layer call waits for experts of which no copy is there.
        """
        self._connect, self._wait_s, self.costs = connect, wait_s, HopCosts()
        self._accuse = accuse or self._accuse
        self._on_waiting = on_waiting or self._on_waiting

    @property
    def generation(self) -> int | None:
        """Generation of the current transport; None before the first connect."""
        return None if self._transport is None else self._transport.generation

    @property
    def route(self) -> Route | None:
        """The current transport's."""
        return self._route

    @property
    def left_out(self) -> dict[int, str]:
        """Groups of this route that this shard found bad, and why."""
        return {group: blame.reason for group, blame in self._bad.items()}

    def reserve(self, x_TD: Tensor, top_k: int) -> None:
        """Hold the memory of a layer call like this one, so that vLLM counts it before it sizes the KV cache.

        For as many groups as a token can go to; a transport that needs more allocates it. Only ever grows.
        """
        geometry = Geometry(x_TD.shape[1], top_k, x_TD.dtype, MAX_INLINE_ROWS)
        num_bytes = room_for(geometry, len(x_TD), top_k)
        if self.reserved is None or num_bytes > len(self.reserved):
            self.reserved = None  # the old one first: both at once would be counted
            self.reserved = torch.empty(num_bytes, dtype=torch.uint8, device=x_TD.device)

    def follow(self, route: Route) -> None:
        """Move to this route at the next layer boundary; returns when it is done.

        The new transport is built and tried beside the old one, which serves meanwhile (not on a device, where both
        would need the reserved memory). A layer call that waits for experts takes the route by itself.

        Raises:
            TransportError: a group cannot be reached or refuses; the hop stays where it was.
        """
        self.announce(route)
        if self._route is route and self._transport is not None and not self._bad:
            return
        beside = None
        if self.reserved is None and not self.is_waiting:
            beside = self._connected(route, route.absent)
        while not self._between_calls.acquire(timeout=RETRY_S):
            if self._wanted is not route:  # the layer call that holds the lock waits for a later one
                break
        else:
            try:
                if self._route is not route and self._wanted is route:
                    self._replace(beside if self.reserved is None else None)
                    if self._transport is None:
                        self._replace(self._connected(route, route.absent))
                    self._route, self._bad, beside = route, {}, None
            finally:
                self._between_calls.release()
        if beside is not None:
            beside.close()

    def announce(self, route: Route) -> None:
        """The newest route: a layer call that waits for experts takes it by itself; `follow` is for all others."""
        with self._news:
            self._wanted = route
            self._news.notify_all()

    def heal(self) -> None:
        """Try the groups that were left out again, if the route still has them: they may only have been slow.

        Raises:
            TransportError: one of them is still bad; nothing has changed.
        """
        route, bad, kept = self._route, dict(self._bad), beyond_doubt(self._bad)
        if route is None or bad == kept or self.reserved is not None or self.is_waiting:
            return
        again = self._connected(route, route.absent | frozenset(kept))
        with self._between_calls:
            if self._route is route and self._bad == bad:
                self._replace(again)
                self._bad = kept
            else:
                again.close()

    def abandon(self) -> None:
        """The layer call in flight, if any, will not be combined: the step has failed elsewhere."""
        if self._call is not None:
            self._call = self._handle = self._failure = None
            self._between_calls.release()

    def close(self) -> None:
        """Drop the transport; the next layer call raises NotConnected."""
        with self._between_calls:
            self._replace(None)
            self._route = self._wanted = None

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> None:
        """Send; exactly one `combine` must follow before the next layer.

        Args:
            x_TD, expert_ids_TK, weights_TK: must stay as they are until `combine` has returned.
        Raises:
            NotConnected: no route yet.
            TransportError: the arguments are of a wrong shape or dtype.
        """
        self._between_calls.acquire()
        transport = self._transport
        if transport is None and self._route is None:
            self._between_calls.release()
            raise NotConnected("the shard is not connected to its expert groups yet")
        started = perf_counter_ns()
        self._call = LayerCall(layer, x_TD, expert_ids_TK, weights_TK)
        try:
            if transport is None:
                raise NotConnected("the last route's groups are gone")
            self._handle = transport.dispatch(layer, x_TD, expert_ids_TK, weights_TK)
        except MENDABLE as error:
            self._failure = error.with_traceback(None)  # combine's to do: the shared expert can run meanwhile
        except TransportError:
            self.abandon()
            raise
        self._dispatched_ns = perf_counter_ns()
        self.costs.dispatch_us += (self._dispatched_ns - started) / 1e3
        self.costs.tokens += x_TD.shape[0]

    def combine(self) -> Tensor:
        """The reduced rows [T, D] of the last dispatch.

        Raises:
            NotConnected: nothing was dispatched.
            TransportError: no group that is there can compute this call, and none came within `wait_s`.
        """
        handle, failure, transport = self._handle, self._failure, self._transport
        if self._call is None:
            raise NotConnected("combine without a dispatch before it")
        started = perf_counter_ns()
        self.costs.overlap_us += (started - self._dispatched_ns) / 1e3
        try:
            y_TD = None
            if failure is None and handle is not None and transport is not None:
                try:
                    y_TD = transport.combine(handle)
                except MENDABLE as error:
                    failure = error.with_traceback(None)
            del handle, transport  # a reference would keep the old connections
            if y_TD is None:
                y_TD = self._again(self._call, failure or NotConnected("nothing was sent"))
        finally:
            self._say_waiting(False)
            self._call = self._handle = self._failure = None
            self._between_calls.release()
        self.costs.combine_us += (perf_counter_ns() - started) / 1e3
        self.costs.calls += 1
        return y_TD

    def report(self) -> dict[str, Any]:
        """Costs and generation as plain values; what only some transports have is empty without it.

        `stages`: the transport's own, finer account; `links`: how each group that is there is reached.
        """
        timings = getattr(self._transport, "timings", None)
        stages = timings().per_layer_us() if timings is not None else {}
        left_out = {str(group): why for group, why in self.left_out.items()}
        links = list(getattr(self._transport, "links", ()))
        return {
            "generation": self.generation, **asdict(self.costs), "stages": stages, "links": links, "left_out": left_out,
        }  # fmt: skip

    def _again(self, call: LayerCall, failure: TransportError) -> Tensor:
        """Compute a failed call once more, as often as it takes."""
        started = perf_counter_ns()
        deadline = monotonic() + self._wait_s
        errors: list[tuple[str, str]] = []
        while True:
            self.costs.failures += 1
            logger.warning("layer %d: %s", call.layer, failure)
            if self._route is None or not self._route.addresses:
                raise failure  # there is no other group (local)
            if isinstance(failure, GroupFailed):
                errors.append((self._route.groups[failure.group], f"gave an error: {failure.reason}"))
                if not bool(call.x_TD.isfinite().all()):
                    raise failure
                if may_be_the_calls_own(errors):
                    errors = self._without_broken(errors, call, self._route)
                    if may_be_the_calls_own(errors):
                        raise failure
            if isinstance(failure, (PeerLost, GroupFailed)):
                self._bad[failure.group] = blame = judged(self._route, self._bad, failure)
                if isinstance(failure, PeerLost):
                    self._accuse(self._route.groups[failure.group], blame.reason, blame.charge)
            transport = self._reconnected(call, failure, deadline)
            try:
                y_TD = transport.combine(transport.dispatch(call.layer, call.x_TD, call.expert_ids_TK, call.weights_TK))
                break
            except MENDABLE as error:
                failure = error.with_traceback(None)
            del transport
        for group_id, reason in errors:  # not before: now somebody has computed the same call
            if any(self._route.groups[group] == group_id for group in self._bad):
                self._accuse(group_id, reason, Charge.BAD)
        stalled_us = (perf_counter_ns() - started) / 1e3
        self.costs.stalled(stalled_us)
        logger.warning("layer %d: computed again after %.1f ms", call.layer, stalled_us / 1e3)
        return y_TD

    def _without_broken(self, errors: list[tuple[str, str]], call: LayerCall, route: Route) -> list[tuple[str, str]]:
        """The errors of groups that can compute something else; the others are left out and accused."""
        erring = {group_id for group_id, _ in errors}
        others = {group for group in self._bad if route.groups[group] not in erring}

        def connect(broken: frozenset[int]) -> Transport:
            return self._connected(route, route.absent | others | broken, in_a_hurry=True)

        self._replace(None)  # on a device there is memory for one
        try:
            broken = broken_groups(connect, call.layer, call.x_TD, call.expert_ids_TK, call.weights_TK)
        except TransportError as error:
            logger.warning("layer %d: whether the call is to blame cannot be told now: %s", call.layer, error)
            return []
        for group, failed in broken.items():
            self._bad[group] = blame = judged(route, self._bad, failed)
            self._accuse(route.groups[group], f"{blame.reason} (at rows that are known to be good)", Charge.BAD)
        ids = {route.groups[group] for group in broken}
        return [each for each in errors if each[0] not in ids]

    def _reconnected(self, call: LayerCall, failure: TransportError, deadline: float) -> Transport:
        """A transport that may carry the call now: to the groups that are left, or of a newer route.

        Where the groups that are left do not have all experts, those that may only have been slow are tried again.

        Raises:
            TransportError: none within the time; the failure.
        """
        self._replace(None)
        while True:
            if self._wanted is not self._route:
                self._route, self._bad = self._wanted, {}
            route = self._route
            if route is not None and can_carry(route, self._bad, call.layer, call.expert_ids_TK):
                try:
                    self._replace(self._connected(route, route.absent | frozenset(self._bad), in_a_hurry=True))
                except PeerLost as error:
                    self._bad[error.group] = Blame(error.reason, is_doubtful=True)
                    continue
                except TransportError as error:
                    logger.warning("generation %d cannot be connected: %s", route.generation, error)
                if self._transport is not None:
                    return self._transport
            self._await_news(failure, deadline)
            self._bad = beyond_doubt(self._bad)

    def _await_news(self, failure: TransportError, deadline: float) -> None:
        """Until another route is wanted, or it is worth trying again."""
        if monotonic() >= deadline:
            raise failure
        self._say_waiting(True)
        self.is_waiting = True
        with self._news:
            if self._wanted is self._route:
                self._news.wait(RETRY_S)
        self.is_waiting = False

    def _say_waiting(self, waits: bool) -> None:
        """Once per change: between two tries a call waits still."""
        if waits is not self._said_waiting:
            self._said_waiting = waits
            self._on_waiting(waits)

    def _connected(self, route: Route, absent: frozenset[int], in_a_hurry: bool = False) -> Transport:
        if self._connect is None:
            raise NotConnected("the hop was not set up")
        return self._connect(route, absent, in_a_hurry)

    def _replace(self, transport: Transport | None) -> None:
        """Use this one, close the one before it."""
        old, self._transport = self._transport, transport
        if old is not None:
            old.close()


hop = Hop()
"""This process' hop."""
