"""Processes that several integration tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from front_process import Ingress, ShardProcess

from moeray.tiny import checkpoint_path

# Bits are equal between equal numbers of threads, and a group has one. Here, because the first engine of a process (of
# any suite) takes the function away.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model() -> Path:
    """The bundled checkpoint, or the one that MOERAY_TEST_CHECKPOINT names (any DeepSeek-V4 of the tiny size)."""
    named = os.environ.get("MOERAY_TEST_CHECKPOINT")
    return Path(named) if named else checkpoint_path()


@pytest.fixture(scope="session")
def shared_shard(model: Path) -> Iterator[ShardProcess]:
    """One shard process for every test that does it no harm."""
    shard = ShardProcess("s0", model)
    assert shard.wait_ready().event == "ready"
    shard.connect(model)
    yield shard
    shard.stop()


@pytest.fixture(scope="session")
def ingress(model: Path, shared_shard: ShardProcess) -> Iterator[Ingress]:
    """One ingress over the shared shard."""
    ingress = Ingress(model)
    ingress.set_shards(shared_shard)
    yield ingress
    ingress.stop()
