"""Two real shards tell one real ingress what their caches hold: a chat's next turn goes where its first one ran."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from front_process import Ingress, ShardProcess, until

TURN = "the expert group answers the attention shard " * 60
"""Longer than one block of the bundled model's cache."""


@pytest.fixture(scope="module")
def pair(model: Path) -> Iterator[tuple[Ingress, list[ShardProcess]]]:
    shards = [ShardProcess(name, model) for name in ("s0", "s1")]
    for shard in shards:
        shard.wait_ready()
        shard.connect(model)
    ingress = Ingress(model)
    ingress.set_shards(*shards)
    yield ingress, shards
    ingress.stop()
    for shard in shards:
        shard.stop()


def complete(ingress: Ingress, prompt: str) -> dict[str, Any]:
    body = {"model": "moeray-tiny", "prompt": prompt, "max_tokens": 2, "temperature": 0}
    status, answer, _ = ingress.post("/v1/completions", body, 300)
    assert status == 200, answer
    return answer


def test_a_second_turn_goes_to_the_shard_that_has_the_first(pair: tuple[Ingress, list[ShardProcess]]) -> None:
    ingress, _ = pair
    pool = ingress.server._pool
    assert pool is not None
    complete(ingress, TURN)
    until(lambda: any(pool.prefixes.num_blocks(name) for name in ("s0", "s1")), 60)
    holder = next(name for name in ("s0", "s1") if pool.prefixes.num_blocks(name))
    before = pool._served.copy()

    for turn in range(3):  # least loaded alone would take turns
        complete(ingress, TURN + f"turn {turn}")

    assert pool._served - before == {holder: 3}
