"""Whole nodes go, announced or not; streams do not notice, and what ran there runs elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from clusters import Cluster, cluster, wait_for
from ray_nodes import ENVIRONMENT, drain, ray_nodes, raylet_of
from streams import text_of, wait_until_healed

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
COPIES = {"num_groups": 2, "num_redundant": 16, "min_copies": 2, "regroup_s": 5}


@pytest.fixture
def spread() -> Iterator[tuple[str, Cluster]]:
    """(Ray's address, a cluster whose expert groups are on two nodes of their own, with copies)"""
    config = {"attention": {"num_shards": 2}, "experts": COPIES}
    with ray_nodes("experts", "experts") as address, cluster(config, env={"RAY_ADDRESS": address, **ENVIRONMENT}) as it:
        assert len({group["node"] for group in it.processes("expert_group")}) == 2
        yield address, it


def test_streams_do_not_notice_the_loss_of_a_node(spread: tuple[str, Cluster]) -> None:
    _, running = spread
    undisturbed = text_of(running)
    victim = running.processes("expert_group")[1]

    def lose_node() -> None:
        raylet = raylet_of(victim["pid"])
        there = raylet.children(recursive=True)
        for process in (raylet, *there):
            process.kill()

    assert text_of(running, lose_node) == undisturbed
    wait_until_healed(running, generation=2)
    assert {group["node"] for group in running.processes("expert_group")} == {
        group["node"] for group in running.processes("expert_group") if group["node"] != victim["node"]
    }


def test_streams_do_not_notice_that_a_node_is_drained(spread: tuple[str, Cluster]) -> None:
    address, running = spread
    undisturbed = text_of(running)
    node = running.processes("expert_group")[0]["node"]
    assert text_of(running, lambda: drain(address, node)) == undisturbed
    wait_for(
        lambda: node not in {process["node"] for process in running.processes("expert_group")}, 240, "an empty node"
    )
    wait_until_healed(running, generation=2)
    assert text_of(running) == undisturbed
