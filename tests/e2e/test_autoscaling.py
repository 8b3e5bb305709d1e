"""Numbers that follow the load: a cluster grows while clients wait, shrinks when they are gone, and loses nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from clusters import Cluster, answer_text, cluster, expected_text, golden_request, wait_for

CONFIG: dict[str, Any] = {
    "attention": {"num_shards": 1}, "experts": {"num_groups": 1},
    "autoscaling": {
        "tpot_p95_s": 0.001, "ttft_p95_s": 0.001,  # nobody can: whatever comes, it grows
        "attention": {"most": 2}, "out_s": 1, "in_s": 15, "join_s": 0,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def scaled() -> Iterator[Cluster]:
    with cluster(CONFIG) as running:
        yield running


def shards(running: Cluster) -> int:
    return len([shard for shard in running.processes("attention_shard") if shard["state"] == "ready"])


def test_numbers_follow_the_load_and_no_request_notices(scaled: Cluster, golden: list[dict[str, Any]]) -> None:
    stop, wrong, asked = threading.Event(), list[str](), list[int]()

    def ask(first: int) -> None:
        number = first
        while not stop.is_set():
            prompt = golden[number % len(golden)]
            status, answer = scaled.post("/v1/chat/completions", golden_request(prompt), 120)
            asked.append(status)
            if status != 200:
                wrong.append(f"{status}: {answer}")
            elif (text := answer_text(answer["choices"][0]["message"])) != expected_text(prompt):
                wrong.append(text)
            number += 7

    clients = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
    for client in clients:
        client.start()
    try:
        wait_for(lambda: shards(scaled) == 2, 120, "a second shard")
        assert "autoscaling, attention:" in scaled.moeray("status").stdout
    finally:
        stop.set()
        for client in clients:
            client.join()
    assert not wrong and len(asked) > 20
    wait_for(lambda: shards(scaled) == 1, 120, "one shard again")
    assert not wrong
    refused = scaled.moeray("scale", "attention=2")
    assert refused.returncode == 2 and "its number follows the load" in refused.stderr
