"""One 2x2 cluster for every test that does no harm to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from clusters import Cluster, cluster

from moeray.tiny import checkpoint_path


@pytest.fixture(scope="session")
def golden() -> list[dict[str, Any]]:
    """Prompts whose exact answers are known (margin >= 1)."""
    prompts: list[dict[str, Any]] = json.loads((checkpoint_path() / "golden.json").read_text())
    return prompts


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    """2 attention shards, 2 expert groups, 1 ingress: the default topology."""
    with cluster() as running:
        yield running
