"""Copies of experts follow the load: other groups get them in the background, and no stream notices."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from clusters import Cluster, cluster
from streams import text_of

WAIT_S = 180.0


@pytest.fixture(scope="module")
def redundant() -> Iterator[Cluster]:
    """Every other expert has a copy; where the copies are is decided anew every few seconds."""
    with cluster({"experts": {"num_groups": 2, "num_redundant": 8, "rebalance_s": 4}}) as running:
        yield running


def held(running: Cluster) -> dict[str, Any]:
    return {group["id"]: group["experts"]["held"] for group in running.processes("expert_group")}


@pytest.mark.full
@pytest.mark.timeout(600)
def test_copies_move_to_where_the_load_is_while_streams_go_on(redundant: Cluster) -> None:
    before, generation = held(redundant), redundant.status()["generation"]
    engines = [shard["engine_pid"] for shard in redundant.processes("attention_shard")]
    undisturbed = text_of(redundant)
    ends = time.monotonic() + WAIT_S
    while redundant.status()["generation"] == generation and time.monotonic() < ends:
        assert text_of(redundant) == undisturbed
    assert redundant.status()["generation"] > generation, "the same question again and again is no even load"
    assert text_of(redundant) == undisturbed
    after = held(redundant)
    assert after.keys() == before.keys() and after != before, "the same groups, other copies"
    assert [shard["engine_pid"] for shard in redundant.processes("attention_shard")] == engines
