"""One tenant's queue is not everybody's: fair shares from the door to vLLM's scheduler, judged by who ends first."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from front_process import Ingress, ShardProcess, chat, until
from tenants import Tenants

CROWD = 40
RUNNING = 2
FEW = 10
"""Of the crowd's, that may end while the other waits: those that ran, and what began before its request got there."""


@pytest.fixture(scope="module")
def narrow(model: Path) -> Iterator[ShardProcess]:
    """A shard that runs two requests at a time."""
    shard = ShardProcess("narrow", model, max_num_seqs=RUNNING)
    assert shard.wait_ready().event == "ready"
    shard.connect(model)
    yield shard
    shard.stop()


@pytest.mark.full
def test_a_tenants_single_request_does_not_wait_behind_anothers_queue(
    model: Path, narrow: ShardProcess, tmp_path: Path
) -> None:
    tenants = Tenants(tmp_path)
    crowd, single = tenants.create("crowd"), tenants.create("single")
    ingress = Ingress(model, **tenants.settings)
    ended: list[str] = []

    def ask(name: str, headers: dict[str, str], max_tokens: int) -> None:
        body = json.dumps(chat(max_tokens=max_tokens, ignore_eos=True)).encode()
        request = urllib.request.Request(
            ingress.http + "/v1/chat/completions", body, {"content-type": "application/json", **headers}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            answer.read()
        ended.append(name)

    try:
        ingress.set_shards(narrow)
        with ThreadPoolExecutor(CROWD) as threads:
            asked = [threads.submit(ask, "crowd", crowd, 24) for _ in range(CROWD)]
            until(lambda: ingress.server.describe()["admission"]["requests"] + len(ended) >= CROWD, 300)
            before = len(ended)
            ask("single", single, 4)
            for each in asked:
                each.result(600)
    finally:
        ingress.stop()
    assert before < CROWD - 2 * FEW, f"{before} had ended: there was no queue to overtake"
    assert ended.index("single") - before <= FEW, f"it waited behind {ended.index('single') - before} of the crowd's"
