"""The split is real, and its answers do not depend on how it is split."""

from __future__ import annotations

import json
from typing import Any

import grpc
import psutil
import pytest
from clusters import Cluster, answer_text, cluster, golden_request
from ray_nodes import ray_nodes

from moeray.attention_shard import link as wire
from moeray.tiny import checkpoint_path

PROMPTS_COMPARED = 12


def answers(running: Cluster, golden: list[dict[str, Any]]) -> list[str]:
    """Text, tokens and logprobs of some golden prompts, one after the other (the batches are then the same)."""
    seen = []
    for prompt in golden[:: max(1, len(golden) // PROMPTS_COMPARED)]:
        status, answer = running.post(
            "/v1/chat/completions", golden_request(prompt) | {"logprobs": True, "top_logprobs": 2}
        )
        assert status == 200, answer
        choice = answer["choices"][0]
        seen.append(json.dumps([answer_text(choice["message"]), choice["logprobs"]["content"]]))
    return seen


@pytest.fixture(scope="module")
def reference(shared_cluster: Cluster, golden: list[dict[str, Any]]) -> list[str]:
    """What the default topology, 2 x 2, answers."""
    return answers(shared_cluster, golden)


@pytest.mark.parametrize(
    ("shards", "groups", "backend"),
    [
        pytest.param(1, 1, "gloo", marks=pytest.mark.full),
        pytest.param(1, 2, "gloo", marks=pytest.mark.full),
        (2, 4, "gloo"),
        pytest.param(1, 2, "local", marks=pytest.mark.full),
        (1, 0, "gloo"),  # the same experts in the shard as `local`
    ],
    ids=["1x1", "1x2", "2x4", "local", "not-split"],
)
def test_answers_and_logprobs_are_byte_equal_to_2x2(
    shards: int, groups: int, backend: str, reference: list[str], golden: list[dict[str, Any]]
) -> None:
    halves = "always" if (shards, groups, backend) == (1, 2, "gloo") else "measured"
    config = {
        "attention": {"num_shards": shards, "micro_batches": halves},
        "experts": {"num_groups": groups},
        "transport": {"backend": backend},
    }  # fmt: skip
    with cluster(config) as running:
        assert len(running.processes("expert_group")) == (0 if backend == "local" else groups)
        assert answers(running, golden) == reference
        pids = pids_of(running)
        assert all(psutil.pid_exists(pid) for pid in pids)
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    assert not alive, "`moeray down` leaves no process behind"


def pids_of(running: Cluster) -> list[int]:
    keys = ("pid", "shard_pid", "engine_pid")
    return [process[key] for process in running.status()["processes"] for key in keys if key in process]


def test_shards_hold_no_routed_expert_and_groups_hold_every_one_exactly_once(shared_cluster: Cluster) -> None:
    from moeray.deepseek_v4.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(checkpoint_path())
    everything = {layer: list(range(checkpoint.shape.num_experts)) for layer in checkpoint.shape.moe_layers}
    held: dict[int, list[int]] = {layer: [] for layer in everything}
    num_bytes = 0
    for group in shared_cluster.processes("expert_group"):
        num_bytes += group["experts"]["bytes"]
        for layer, experts in group["experts"]["held"].items():
            held[int(layer)] += experts
    assert {layer: sorted(experts) for layer, experts in held.items()} == everything
    names = [name for layer in everything for name in checkpoint.expert_names(layer, everything[layer])]
    assert num_bytes == checkpoint.bytes_of(names)  # bf16 takes as much in memory as on disk
    for shard in shared_cluster.processes("attention_shard"):
        tensors = shard_info(shard["address"]).tensors
        assert tensors is not None
        assert not [name for name in tensors["parameters"] if ".experts." in name and ".shared_experts." not in name]
        assert tensors["bytes_read"] + num_bytes <= tensors["checkpoint_bytes"]
        assert set(tensors["skipped"]) >= set(names)


def shard_info(address: str) -> wire.ShardInfo:
    with grpc.insecure_channel(address, options=wire.CHANNEL_OPTIONS) as channel:
        return wire.decode_shard_info(channel.unary_unary(wire.INFO)(wire.encode(wire.Info(tensors=True)), timeout=30))


def test_two_ray_nodes_with_labels_split_shards_from_groups(reference: list[str], golden: list[dict[str, Any]]) -> None:
    with ray_nodes("experts") as address, cluster(env={"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}) as running:
        shards = {process["node"] for process in running.processes("attention_shard")}
        groups = {process["node"] for process in running.processes("expert_group")}
        assert len(shards) == len(groups) == 1
        assert shards != groups
        assert answers(running, golden) == reference
