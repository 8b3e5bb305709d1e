"""The contract between nodes: shard and groups in network namespaces of their own, over links that are slow or lossy.

The shard's own node has an expert group, too, so one dispatch goes by channel to that and by Gloo to the other.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transport_peers import NUM_LAYERS, Group, Model, Peer, ServerSettings, Shard, eventually, spec_of, spread
from two_nodes import DEVICE, Link, Node, TwoNodes, link_missing, missing, two_nodes

from moeray.transport import PeerLost

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SMALL, SLOTS = Model(), (4, 4)
TOKENS = (0, 1, 5, 64, 300)
PATIENCE_S = 60.0  # for what must happen at once; the transports below wait far longer by themselves
LINKS = {
    "fast": Link(),
    "1 ms": Link(delay_ms=1),
    "5 ms": Link(delay_ms=5),
    "1 % lost": Link(loss_percent=1),
}


@dataclass
class NodeGroup(Group):
    """An expert group's process on a node."""

    def enter(self, node: Node) -> None:
        node.enter()


@dataclass
class NodeShard(Shard):
    """An attention shard's process on a node."""

    def enter(self, node: Node) -> None:
        node.enter()

    def links(self) -> tuple[str, ...]:
        return self.transport.links  # type: ignore[union-attr]

    def call(self, layer: int, num_tokens: int) -> list[list[float]]:
        """The rows of one layer call."""
        assert self.transport is not None
        batch = SMALL.batch(num_tokens, seed=layer)
        return self.transport.combine(self.transport.dispatch(layer, *batch)).tolist()

    def call_until_lost(self) -> tuple[int, str, float]:
        """(group, reason, seconds since the last call that went well)"""
        while True:
            started = time.monotonic()
            try:
                self.call(0, 5)
            except PeerLost as error:
                return error.group, str(error), time.monotonic() - started


@dataclass
class Cluster:
    """A shard and group 0 on node a, group 1 on node b."""

    nodes: TwoNodes
    shard: Peer
    groups: list[Peer]

    def connect(self, **changes: Any) -> None:
        hosts, placement = [self.nodes.a.host, self.nodes.b.host], spread(SMALL, SLOTS)
        addresses = [
            peer.ask("serve", "it", ServerSettings(SMALL, placement, group, host=hosts[group]))
            for group, peer in enumerate(self.groups)
        ]
        self.shard.ask("connect", spec_of(SMALL, host=hosts[0], **changes), placement, addresses)

    def connected_shards(self, group: int) -> list[Any]:
        return list(self.groups[group].ask("shards", "it"))


@contextmanager
def cluster(link: Link) -> Iterator[Cluster]:
    reason = link_missing(link)
    if reason is not None:
        pytest.skip(reason)
    peers = [Peer(NodeShard), Peer(NodeGroup), Peer(NodeGroup)]
    try:
        with two_nodes(link) as nodes:
            for peer, node in zip(peers, (nodes.a, nodes.a, nodes.b), strict=True):
                peer.ask("enter", node)
            yield Cluster(nodes, peers[0], peers[1:])
    finally:
        for peer in peers:
            peer.end()


@pytest.fixture
def fast() -> Iterator[Cluster]:
    with cluster(LINKS["fast"]) as found:
        yield found


@pytest.mark.parametrize("name", LINKS)
def test_two_nodes_give_the_oracles_bits_over_any_link(name: str) -> None:
    oracle = SMALL.oracle()
    with cluster(LINKS[name]) as found:
        found.connect(timeout_s=PATIENCE_S)
        assert found.shard.ask("links") == ("channel", "gloo")
        for layer, num_tokens in itertools.product(range(NUM_LAYERS), TOKENS):
            expected = oracle.combine(oracle.dispatch(layer, *SMALL.batch(num_tokens, seed=layer)))
            rows = torch.tensor(found.shard.ask("call", layer, num_tokens), dtype=expected.dtype)
            assert torch.equal(rows.view(expected.shape), expected), (layer, num_tokens)


def lost(found: Cluster, how: Callable[[], None]) -> tuple[int, str, float]:
    """What a shard that calls without pause is told after `how`."""
    found.shard.tell("call_until_lost")
    time.sleep(0.3)  # in the middle of calls
    how()
    group, reason, seconds = found.shard.answer(2 * PATIENCE_S)
    return group, reason, seconds


def test_a_cut_link_is_the_far_group_lost_within_the_timeout_and_frees_both(fast: Cluster) -> None:
    fast.connect(timeout_s=8.0)
    group, reason, seconds = lost(fast, fast.nodes.cut)
    assert (group, reason) == (1, "expert group 1 lost: no answer within 8 s")
    assert seconds < PATIENCE_S
    assert eventually(lambda: not any(fast.connected_shards(group) for group in range(2)), PATIENCE_S)


def test_a_group_killed_on_the_other_node_is_lost_long_before_the_timeout(fast: Cluster) -> None:
    fast.connect(timeout_s=10 * PATIENCE_S)
    group, reason, seconds = lost(fast, fast.groups[1].kill)
    assert group == 1
    assert "closed by peer" in reason
    assert seconds < PATIENCE_S


def test_a_shard_killed_on_the_other_node_frees_the_groups(fast: Cluster) -> None:
    fast.connect()
    fast.shard.tell("loop", SMALL)
    assert eventually(lambda: all(fast.connected_shards(group) for group in range(2)), PATIENCE_S)
    fast.shard.kill()
    assert eventually(lambda: not any(fast.connected_shards(group) for group in range(2)), PATIENCE_S)


def test_the_machines_own_network_is_left_as_it_was() -> None:
    before = interfaces()
    with cluster(LINKS["fast"]) as found:
        assert interfaces() == before
        assert DEVICE in found.nodes.a.run("cat", "/proc/net/dev").stdout


def interfaces() -> list[str]:
    return [line.partition(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
