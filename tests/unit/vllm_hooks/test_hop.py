"""The hop: one transport at a time, failed calls are computed again where copies are, costs are counted."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from moeray.membership import Charge
from moeray.placement import Placement, contiguous
from moeray.transport import (
    DispatchHandle,
    ExpertsMissing,
    GroupFailed,
    GroupServer,
    HandshakeRefused,
    ModelIdentity,
    PeerLost,
    Transport,
    TransportError,
    TransportSpec,
    connect,
)
from moeray.transport.all_to_all import AllToAllTransport
from moeray.vllm_hooks import hop as hop_module
from moeray.vllm_hooks.hop import Hop, NotConnected
from moeray.vllm_hooks.route import Route

LOST = PeerLost(1, "connection closed by peer")
X, IDS, WEIGHTS = torch.ones(3, 4), torch.tensor([[0, 1]] * 3, dtype=torch.int32), torch.ones(3, 2)


@dataclass
class Doubling:
    """A transport whose experts double x; `fails` once per entry, at the stage it names."""

    generation: int = 1
    absent: frozenset[int] = frozenset()
    fails: list[tuple[str, TransportError]] = field(default_factory=list)
    closed: int = 0
    kept: list[Tensor] = field(default_factory=list)
    asked: list[Tensor] = field(default_factory=list)

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> DispatchHandle:
        self._fail("dispatch")
        self.asked.append(x_TD)
        self.kept.append(x_TD * 2)
        return self

    def combine(self, handle: DispatchHandle) -> Tensor:
        self._fail("combine")
        return self.kept.pop()

    def _fail(self, stage: str) -> None:
        if self.fails and self.fails[0][0] == stage:
            raise self.fails.pop(0)[1]

    def close(self) -> None:
        self.closed += 1


class Cluster:
    """Two groups with both experts each (or one each); what the hop connects to, and what it says."""

    def __init__(self, copies: bool = True) -> None:
        self.placement = contiguous(
            generation=1, num_layers=1, num_experts=2, num_groups=2, num_redundant=2 if copies else 0
        )
        self.made: list[Doubling] = []
        self.fails: list[list[tuple[str, TransportError]]] = []
        self.refusals: list[TransportError] = []
        self.dead: set[str] = set()
        self.accused: list[tuple[str, str, bool]] = []
        self.waits: list[bool] = []

    def connect(self, route: Route, absent: frozenset[int], in_a_hurry: bool) -> Transport:
        if self.refusals:
            raise self.refusals.pop(0)
        for group, address in enumerate(route.addresses):
            if group not in absent and address in self.dead:
                raise PeerLost(group, f"no handshake with {address}: connection refused")
        self.made.append(Doubling(route.generation, absent, self.fails.pop(0) if self.fails else []))
        return self.made[-1]

    def accuse(self, group: str, reason: str, charge: Charge) -> None:
        self.accused.append((group, reason, charge))

    def route(self, generation: int = 1, addresses: tuple[str, ...] = ("a:1", "b:2")) -> Route:
        placement = self.placement
        now = Placement(generation, placement.num_experts, placement.slots_per_group, placement.expert_of_slot)
        return Route(now, tuple(f"group-{index}" for index in range(2)), addresses)

    def hop(self, wait_s: float = 60.0) -> Hop:
        hop = Hop()
        hop.set_up(self.connect, self.accuse, wait_s, self.waits.append)
        return hop


def layer_call(hop: Hop) -> Tensor:
    hop.dispatch(0, X, IDS, WEIGHTS)
    return hop.combine()


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def wait_until_it_waits(hop: Hop) -> None:
    for _ in range(6000):
        if hop.is_waiting:
            return
        threading.Event().wait(0.01)
    raise AssertionError("the hop does not wait")


def test_a_layer_call_goes_there_and_back_and_is_counted() -> None:
    hop = Cluster().hop()
    hop.follow(Cluster().route(4))
    assert torch.equal(layer_call(hop), X * 2)
    report = hop.report()
    assert (report["generation"], report["calls"], report["tokens"], report["failures"]) == (4, 1, 3, 0)


def test_without_a_route_the_error_says_so_and_the_next_call_may_go() -> None:
    cluster = Cluster()
    hop = cluster.hop()
    assert hop.generation is None
    for _ in range(2):
        with pytest.raises(NotConnected, match="not connected to its expert groups"):
            hop.dispatch(0, X, IDS, WEIGHTS)
    hop.follow(cluster.route())
    assert torch.equal(layer_call(hop), X * 2)


def test_the_old_transport_serves_until_the_new_one_can() -> None:
    cluster = Cluster()
    hop = cluster.hop()
    hop.follow(cluster.route(1))
    cluster.refusals = [HandshakeRefused("generation is 2 there")]
    with pytest.raises(HandshakeRefused):
        hop.follow(cluster.route(2))
    assert torch.equal(layer_call(hop), X * 2) and hop.generation == 1
    hop.follow(cluster.route(3))
    assert ([each.closed for each in cluster.made], hop.generation) == ([1, 0], 3)


def test_a_new_route_waits_for_the_end_of_the_layer_call() -> None:
    cluster = Cluster()
    hop = cluster.hop()
    hop.follow(cluster.route(1))
    hop.dispatch(0, X, IDS, WEIGHTS)
    moving = in_thread(lambda: hop.follow(cluster.route(2)))
    moving.join(0.2)
    assert moving.is_alive() and hop.generation == 1
    assert torch.equal(hop.combine(), X * 2)
    moving.join(60)
    assert hop.generation == 2


def test_a_replaced_transport_is_not_kept_alive() -> None:
    cluster = Cluster()
    hop = cluster.hop()
    hop.follow(cluster.route())
    cluster.fails = [[]]
    layer_call(hop)
    gone = weakref.ref(cluster.made.pop())
    hop.close()
    assert gone() is None, "the groups wait until the last reference to the connection is gone"


@pytest.mark.parametrize("stage", ["dispatch", "combine"])
def test_a_lost_groups_copies_are_asked_at_once(stage: str) -> None:
    cluster = Cluster()
    cluster.fails = [[(stage, LOST)]]
    hop = cluster.hop()
    hop.follow(cluster.route())
    assert torch.equal(layer_call(hop), X * 2)
    assert [each.absent for each in cluster.made] == [frozenset(), {1}]
    assert hop.left_out == {1: "connection closed by peer"}
    assert cluster.accused == [("group-1", "connection closed by peer", Charge.BAD)]
    report = hop.report()
    assert (report["failures"], report["calls"]) == (1, 1)
    assert 0 < report["longest_stall_us"] <= report["stalled_us"]


def test_a_late_group_is_left_out_and_accused_of_being_slow_only() -> None:
    cluster = Cluster()
    cluster.fails = [[("combine", PeerLost(0, "no answer within 1 s"))]]
    hop = cluster.hop()
    hop.follow(cluster.route())
    assert torch.equal(layer_call(hop), X * 2)
    assert cluster.accused == [("group-0", "no answer within 1 s", Charge.SLOW)]
    hop.heal()
    assert hop.left_out == {} and cluster.made[-1].absent == frozenset()


def test_a_group_that_cannot_be_reached_again_is_left_out_too() -> None:
    cluster = Cluster()
    cluster.placement = contiguous(generation=1, num_layers=1, num_experts=3, num_groups=3, num_redundant=6)
    route = Route(cluster.placement, ("g0", "g1", "g2"), ("a:1", "b:2", "c:3"))
    cluster.fails = [[("combine", LOST)]]
    hop = cluster.hop()
    hop.follow(route)
    cluster.refusals = [PeerLost(2, "no handshake with c:3: timed out")]
    assert torch.equal(layer_call(hop), X * 2)
    assert cluster.made[-1].absent == {1, 2}


def test_without_a_copy_the_call_waits_for_the_next_route() -> None:
    cluster = Cluster(copies=False)
    cluster.fails = [[("combine", LOST)]]
    hop = cluster.hop()
    hop.follow(cluster.route(1))
    cluster.dead = {"b:2"}
    results: list[Tensor] = []
    calling = in_thread(lambda: results.append(layer_call(hop)))
    wait_until_it_waits(hop)
    blocked = in_thread(lambda: hop.follow(cluster.route(2, ("a:1", ""))))  # of no help: the group is still away
    hop.announce(cluster.route(3, ("a:1", "c:3")))
    for thread in (calling, blocked):
        thread.join(60)
    assert torch.equal(results[0], X * 2)
    assert hop.generation == 3
    assert cluster.waits == [True, False], "said once, however often it was tried in between"
    assert cluster.accused == [("group-1", "connection closed by peer", Charge.BAD)]


def test_a_call_that_needs_no_lost_expert_does_not_wait() -> None:
    cluster = Cluster(copies=False)
    cluster.fails = [[("combine", LOST)]]
    hop = cluster.hop()
    hop.follow(cluster.route())
    hop.dispatch(0, X, torch.zeros_like(IDS), WEIGHTS)
    assert torch.equal(hop.combine(), X * 2)
    assert cluster.made[-1].absent == {1}
    assert not cluster.waits


def test_a_wait_has_an_end_and_names_what_was_lost() -> None:
    cluster = Cluster(copies=False)
    cluster.fails = [[("combine", LOST)]]
    hop = cluster.hop(wait_s=0.1)
    hop.follow(cluster.route())
    cluster.dead = {"b:2"}
    with pytest.raises(PeerLost, match="expert group 1 lost: connection closed by peer"):
        layer_call(hop)
    assert cluster.waits == [True, False]


def test_a_group_that_was_only_late_is_tried_again_while_a_call_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hop_module, "RETRY_S", 0.01)
    cluster = Cluster(copies=False)
    cluster.fails = [[("combine", PeerLost(1, "no answer within 10 s"))]]
    hop = cluster.hop()
    hop.follow(cluster.route())
    assert torch.equal(layer_call(hop), X * 2)
    assert cluster.made[-1].absent == frozenset()


def test_an_error_that_two_groups_give_is_the_calls_own() -> None:
    cluster = Cluster()
    cluster.fails = [[("combine", GroupFailed(1, "NaN"))], [("combine", GroupFailed(0, "NaN"))]]
    hop = cluster.hop()
    hop.follow(cluster.route())
    with pytest.raises(GroupFailed, match="expert group 0 failed"):
        layer_call(hop)
    assert cluster.accused == [], "nobody knows that a group is to blame"


def test_two_groups_that_fail_at_good_rows_too_are_broken_and_the_call_waits_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hop_module, "RETRY_S", 60.0)
    cluster = Cluster()
    cluster.fails = [[("combine", GroupFailed(group, "NaN"))] for group in (1, 0, 1, 0)]
    cluster.fails.append([("dispatch", ExpertsMissing(0, [0, 1]))])
    hop = cluster.hop()
    hop.follow(cluster.route())
    found: list[Tensor] = []
    call = in_thread(lambda: found.append(layer_call(hop)))
    wait_until_it_waits(hop)
    trials = cluster.made[2:5]
    assert [trial.absent for trial in trials] == [frozenset(), {1}, {0, 1}]
    assert all(trial.closed for trial in trials)
    assert [(group, charge) for group, _, charge in cluster.accused] == [
        ("group-1", Charge.BAD), ("group-0", Charge.BAD)
    ]  # fmt: skip
    hop.announce(cluster.route(2))
    call.join(60)
    assert torch.equal(found[0], X * 2) and hop.left_out == {}


def test_without_copies_a_group_that_fails_at_good_rows_too_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hop_module, "RETRY_S", 0.01)
    cluster = Cluster(copies=False)
    refused = [("combine", GroupFailed(1, "NaN"))]
    missing: list[tuple[str, TransportError]] = [("dispatch", ExpertsMissing(0, [1]))]
    cluster.fails = [refused[:], refused[:], refused[:], refused[:], missing]
    hop = cluster.hop()
    hop.follow(cluster.route())
    assert torch.equal(layer_call(hop), X * 2)
    assert [group for group, _, _ in cluster.accused] == ["group-1"]


def test_the_trial_has_other_rows_of_the_same_shape() -> None:
    cluster = Cluster()
    cluster.fails = [[("combine", GroupFailed(1, "NaN"))], [("combine", GroupFailed(0, "NaN"))]]
    hop = cluster.hop()
    hop.follow(cluster.route())
    with pytest.raises(GroupFailed):
        layer_call(hop)
    (trial,) = cluster.made[2:]
    assert not trial.asked[0].equal(X) and trial.asked[0].shape == X.shape and trial.asked[0].isfinite().all()


def test_an_error_of_a_group_is_told_once_another_has_computed_the_call() -> None:
    cluster = Cluster()
    cluster.fails = [[("combine", GroupFailed(1, "NaN"))]]
    hop = cluster.hop()
    hop.follow(cluster.route())
    assert torch.equal(layer_call(hop), X * 2)
    assert cluster.accused == [("group-1", "gave an error: NaN", Charge.BAD)]


def test_without_copies_an_error_is_asked_again_and_then_the_calls_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hop_module, "RETRY_S", 0.01)
    cluster = Cluster(copies=False)
    hop = cluster.hop()
    cluster.fails = [[("combine", GroupFailed(1, "NaN"))]]
    hop.follow(cluster.route())
    assert torch.equal(layer_call(hop), X * 2)
    assert (cluster.accused, hop.left_out) == ([], {})
    cluster.made[-1].fails.append(("combine", GroupFailed(1, "NaN")))
    cluster.fails = [[("combine", GroupFailed(1, "NaN"))] for _ in range(2)]
    with pytest.raises(GroupFailed):
        layer_call(hop)
    assert cluster.accused == []


def test_a_group_that_gives_errors_is_not_tried_again() -> None:
    cluster = Cluster()
    cluster.fails = [[("combine", GroupFailed(1, "NaN"))]]
    hop = cluster.hop()
    hop.follow(cluster.route())
    assert torch.equal(layer_call(hop), X * 2)
    hop.heal()
    assert list(hop.left_out) == [1]


def test_an_error_from_input_that_is_not_finite_is_nobody_elses() -> None:
    cluster = Cluster()
    cluster.fails = [[("combine", GroupFailed(1, "NaN"))]]
    hop = cluster.hop()
    hop.follow(cluster.route())
    hop.dispatch(0, X * torch.nan, IDS, WEIGHTS)
    with pytest.raises(GroupFailed):
        hop.combine()
    assert cluster.accused == []


def test_a_callers_error_is_raised_at_once_and_the_next_call_may_go() -> None:
    cluster = Cluster()
    cluster.fails = [[("dispatch", TransportError("x is torch.float64"))]]
    hop = cluster.hop()
    hop.follow(cluster.route())
    with pytest.raises(TransportError, match="float64"):
        hop.dispatch(0, X, IDS, WEIGHTS)
    assert torch.equal(layer_call(hop), X * 2)


def test_a_step_that_failed_elsewhere_leaves_the_hop_usable() -> None:
    cluster = Cluster()
    hop = cluster.hop()
    hop.follow(cluster.route())
    hop.dispatch(0, X, IDS, WEIGHTS)
    hop.abandon()
    with pytest.raises(NotConnected, match="without a dispatch"):
        hop.combine()
    assert torch.equal(layer_call(hop), X * 2)


def test_memory_of_the_largest_profiled_call_is_held_and_used_by_the_transport() -> None:
    """As on a device, where vLLM sizes its KV cache by what its profile run leaves."""
    model = ModelIdentity(fingerprint="f", hidden_size=8, top_k=2, num_experts=4, num_layers=1, dtype="bfloat16")
    hop = Hop()
    for num_tokens in (3, 300, 7):
        hop.reserve(torch.zeros((num_tokens, 8), dtype=torch.bfloat16), top_k=2)
    assert hop.reserved is not None
    reserved = range(hop.reserved.data_ptr(), hop.reserved.data_ptr() + len(hop.reserved))
    placement = contiguous(generation=1, num_layers=1, num_experts=4, num_groups=2)
    servers = [GroupServer(lambda *_: torch.empty(0), model, positions={1: group}) for group in range(2)]
    spec = TransportSpec(
        shard="s", backend="gloo", identity=model, max_tokens=300, channel="off", reserved=hop.reserved
    )
    transport = connect(spec, placement, [server.start() for server in servers])
    assert isinstance(transport, AllToAllTransport)
    assert transport._replies.data_ptr() in reserved
    assert transport._replies.data_ptr() + transport._replies.nbytes - 1 in reserved
    transport.close()
    for server in servers:
        server.stop()
