"""What dies is noticed, named and replaced; what a client gets meanwhile is an error, not silence."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from clusters import Cluster, cluster, is_running, kill, wait_for

LONG = {
    "model": "moeray-tiny", "messages": [{"role": "user", "content": "What is moeray?"}], "temperature": 0,
    "max_tokens": 2000, "ignore_eos": True, "stream": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def victim() -> Iterator[Cluster]:
    """A cluster that tests may hurt; it must have healed when a test ends."""
    with cluster({"attention": {"num_shards": 2}, "experts": {"num_groups": 2}}) as running:
        yield running


def stream(running: Cluster) -> Iterator[dict[str, Any]]:
    """Events of one long stream, errors included."""
    request = urllib.request.Request(
        f"{running.http}/v1/chat/completions", json.dumps(LONG).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


def wait_until_healed(running: Cluster, generation: int) -> None:
    def healed() -> bool:
        state = running.status()
        ready = [process["role"] for process in state["processes"] if process["state"] == "ready"]
        return (
            state["generation"] >= generation and state["is_complete"]
            and ready.count("attention_shard") == 2 and ready.count("expert_group") == 2
        )  # fmt: skip

    wait_for(healed, 120, "healing")
    wait_for(
        lambda: running.post("/v1/chat/completions", LONG | {"stream": False, "max_tokens": 4})[0] == 200, 30, "serving"
    )


def test_killing_both_expert_groups_ends_the_stream_with_a_clear_error_within_10_s(victim: Cluster) -> None:
    generation = victim.status()["generation"]
    groups = victim.processes("expert_group")
    error, killed_at = None, 0.0
    for count, event in enumerate(stream(victim)):
        if count == 10:
            killed_at = time.monotonic()
            for group in groups:
                kill(group["pid"])
        if "error" in event:
            error = event["error"]
    elapsed_s = time.monotonic() - killed_at
    assert error is not None, "the stream ended as if nothing had happened"
    assert "expert group" in error["message"], error
    assert elapsed_s < 10
    status, answer = victim.post("/v1/chat/completions", LONG | {"stream": False, "max_tokens": 4}, timeout_s=10)
    assert status == 503, answer
    wait_until_healed(victim, generation + 1)


def test_an_idle_loss_of_a_group_costs_no_engine(victim: Cluster) -> None:
    generation = victim.status()["generation"]
    engines = [shard["engine_pid"] for shard in victim.processes("attention_shard")]
    kill(victim.processes("expert_group")[1]["pid"])
    wait_for(lambda: victim.status()["generation"] > generation, 60, "the next generation")
    wait_until_healed(victim, generation + 1)
    assert [shard["engine_pid"] for shard in victim.processes("attention_shard")] == engines


@pytest.mark.parametrize("part", ["pid", "shard_pid", "engine_pid"])
def test_a_shard_dies_as_one_and_is_replaced_while_the_other_serves(victim: Cluster, part: str) -> None:
    shard = victim.processes("attention_shard")[0]
    pids = [shard["pid"], shard["shard_pid"], shard["engine_pid"]]
    kill(shard[part])
    wait_for(lambda: not any(is_running(pid) for pid in pids), 15, f"all of {pids} gone")
    status, answer = victim.post("/v1/chat/completions", LONG | {"stream": False, "max_tokens": 4})
    assert status == 200, answer
    wait_until_healed(victim, 1)


def test_serving_goes_on_without_the_controller_and_it_comes_back_knowing_everybody(victim: Cluster) -> None:
    before = victim.status()
    controller = next(process for process in before["processes"] if process["role"] == "controller")
    events = stream(victim)
    for _ in range(5):
        next(events)
    psutil.Process(controller["pid"]).kill()
    received = 0
    for event in events:
        assert "error" not in event, event
        received += 1
    assert received > 100
    wait_until_healed(victim, 1)
    members = {(p["role"], p["id"]) for p in victim.status()["processes"] if p["state"] == "ready"}
    assert members == {(p["role"], p["id"]) for p in before["processes"] if p["state"] == "ready"}
