"""Whole nodes go, announced or not; streams do not notice, and what ran there runs elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from clusters import Cluster, cluster, kill, wait_for
from ray_nodes import ENVIRONMENT, drain, lose_node_of, ray_nodes
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


@pytest.fixture
def two_shard_nodes() -> Iterator[Cluster]:
    """A cluster with a shard on the head, beside the ingress, and one on a node of its own."""
    config = {
        "attention": {"num_shards": 2}, "experts": {"num_groups": 1}, "ingress": {"label_selector": {"at": "head"}}
    }  # fmt: skip
    with (
        ray_nodes("attention", "experts") as address,
        cluster(config, env={"RAY_ADDRESS": address, **ENVIRONMENT}) as running,
    ):
        yield running


def test_streams_do_not_notice_the_loss_of_a_node(spread: tuple[str, Cluster]) -> None:
    _, running = spread
    undisturbed = text_of(running)
    victim = running.processes("expert_group")[1]

    assert text_of(running, lambda: lose_node_of(victim["pid"])) == undisturbed
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


def test_streams_do_not_notice_the_loss_of_a_shards_node(two_shard_nodes: Cluster) -> None:
    """Both shards have a stream; one goes on at the other. The new shard finds room on the node that is left."""
    running = two_shard_nodes
    undisturbed = text_of(running)
    (ingress,), shards = running.processes("ingress"), running.processes("attention_shard")
    (victim,) = (shard for shard in shards if shard["node"] != ingress["node"])
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(text_of, running)
        assert text_of(running, lambda: lose_node_of(victim["pid"])) == undisturbed
        assert other.result() == undisturbed
    wait_for(lambda: answers(running), 240, "a controller")
    wait_until_healed(running, groups=1)
    after = running.processes("attention_shard")
    assert {shard["node"] for shard in after} == {ingress["node"]}
    assert {shard["pid"] for shard in shards} - {victim["pid"]} < {shard["pid"] for shard in after}
    assert text_of(running) == undisturbed


def test_streams_do_not_notice_the_loss_of_the_controllers_node(spread: tuple[str, Cluster]) -> None:
    """A group is lost with it. The controller that came back elsewhere has the next one that dies replaced."""
    _, running = spread
    undisturbed = text_of(running)
    move_controller_to_a_group(running)
    before = running.status()
    lost = controller(running)
    assert text_of(running, lambda: lose_node_of(lost["pid"])) == undisturbed
    wait_for(lambda: answers(running), 240, "a controller")
    wait_until_healed(running, before["generation"] + 1)
    assert controller(running)["node"] != lost["node"]
    kept = {process["id"] for process in before["processes"] if process["node"] != lost["node"]}
    there = {process["id"] for process in running.status()["processes"] if process["state"] == "ready"}
    assert kept <= there, "who was elsewhere has joined again as itself"

    generation = running.status()["generation"]
    group = running.processes("expert_group")[0]
    assert text_of(running, lambda: kill(group["pid"])) == undisturbed
    wait_until_healed(running, generation + 1)
    assert group["id"] not in {each["id"] for each in running.processes("expert_group")}


def controller(running: Cluster) -> dict[str, Any]:
    (found,) = running.processes("controller")
    return found


def answers(running: Cluster) -> bool:
    """Whether there is a controller to ask: Ray needs some seconds to find that a node is gone."""
    return running.moeray("status", "--json").returncode == 0


def move_controller_to_a_group(running: Cluster) -> None:
    """Ray starts it on any node; until that is one with an expert group, it starts it again."""
    nodes = {group["node"] for group in running.processes("expert_group")}
    for _ in range(20):
        if controller(running)["node"] in nodes:
            wait_until_healed(running)
            return
        kill(controller(running)["pid"])
        wait_for(lambda: answers(running), 120, "a controller")
    raise AssertionError("the controller did not come to any of the expert groups' nodes")
