"""The hop: one transport at a time, errors pass through, costs are counted."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from moeray.placement import contiguous
from moeray.transport import (
    DispatchHandle,
    GroupServer,
    ModelIdentity,
    PeerLost,
    TransportError,
    TransportSpec,
    connect,
)
from moeray.transport.all_to_all import AllToAllTransport
from moeray.vllm_hooks.hop import Hop, NotConnected


@dataclass
class Doubling:
    """A transport whose experts double x."""

    generation: int = 1
    closed: int = 0
    fail_dispatch: TransportError | None = None
    fail_combine: TransportError | None = None
    kept: list[Tensor] = field(default_factory=list)

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> DispatchHandle:
        if self.fail_dispatch:
            raise self.fail_dispatch
        self.kept.append(x_TD * 2)
        return self

    def combine(self, handle: DispatchHandle) -> Tensor:
        if self.fail_combine:
            raise self.fail_combine
        return self.kept.pop()

    def close(self) -> None:
        self.closed += 1


X, IDS, WEIGHTS = torch.ones(3, 4), torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2)


def test_a_layer_call_goes_there_and_back_and_is_counted() -> None:
    hop = Hop()
    hop.replace(Doubling(generation=4))
    hop.dispatch(0, X, IDS, WEIGHTS)
    assert torch.equal(hop.combine(), X * 2)
    report = hop.report()
    assert (report["generation"], report["calls"], report["tokens"], report["failures"]) == (4, 1, 3, 0)


def test_without_a_transport_the_error_says_so() -> None:
    hop = Hop()
    assert hop.generation is None
    with pytest.raises(NotConnected, match="not connected to its expert groups"):
        hop.dispatch(0, X, IDS, WEIGHTS)


def test_the_old_transport_is_closed_before_the_new_one_serves() -> None:
    hop, old, new = Hop(), Doubling(1), Doubling(2)
    hop.replace(old)
    hop.dispatch(0, X, IDS, WEIGHTS)
    hop.replace(new)
    assert (old.closed, new.closed, hop.generation) == (1, 0, 2)
    with pytest.raises(NotConnected, match="replaced"):
        hop.combine()
    hop.replace(None)
    assert (new.closed, hop.generation) == (1, None)


def test_a_replaced_transport_is_not_kept_alive() -> None:
    import weakref

    class Watched(Doubling):
        pass

    hop, old = Hop(), Watched()
    gone = weakref.ref(old)
    hop.replace(old)
    del old
    hop.replace(None)
    assert gone() is None, "the groups wait until the last reference to the connection is gone"


def layer_call(hop: Hop) -> Tensor:
    hop.dispatch(0, X, IDS, WEIGHTS)
    return hop.combine()


@pytest.mark.parametrize("stage", ["fail_dispatch", "fail_combine"])
def test_a_lost_group_is_reported_as_it_was_raised(stage: str) -> None:
    hop = Hop()
    hop.replace(Doubling(**{stage: PeerLost(1, "connection closed by peer")}))
    with pytest.raises(PeerLost, match="expert group 1 lost: connection closed by peer") as lost:
        layer_call(hop)
    assert lost.value.group == 1
    assert hop.report()["failures"] == 1


def test_costs_start_again_with_a_new_transport() -> None:
    hop = Hop()
    hop.replace(Doubling())
    hop.dispatch(0, X, IDS, WEIGHTS)
    hop.combine()
    hop.replace(Doubling())
    assert hop.report()["calls"] == 0


def test_memory_of_the_largest_profiled_call_is_held_and_used_by_the_transport() -> None:
    """As on a device, where vLLM sizes its KV cache by what its profile run leaves."""
    model = ModelIdentity(fingerprint="f", hidden_size=8, top_k=2, num_experts=4, num_layers=1, dtype="bfloat16")
    hop = Hop()
    for num_tokens in (3, 300, 7):
        hop.reserve(torch.zeros((num_tokens, 8), dtype=torch.bfloat16), top_k=2)
    assert hop.reserved is not None
    reserved = range(hop.reserved.data_ptr(), hop.reserved.data_ptr() + len(hop.reserved))
    placement = contiguous(generation=1, num_layers=1, num_experts=4, num_groups=2)
    servers = [GroupServer(lambda *_: torch.empty(0), model, group=group, generation=1) for group in range(2)]
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
