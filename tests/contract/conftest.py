"""Processes shared by the contract suites."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Child processes import the same modules by name.
sys.path.insert(0, str(Path(__file__).parent))
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in sys.path if path))

from transport_peers import LINKS, Group, Peer, group_peers, use_links

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def groups() -> Iterator[list[Peer]]:
    """Four processes for tests that do no harm to them."""
    yield from group_peers(4)


@pytest.fixture
def mortal_groups() -> Iterator[list[Peer]]:
    """Two processes that a test may kill."""
    yield from group_peers(2)


@pytest.fixture
def mortal_group() -> Iterator[Peer]:
    """One process that a test may kill."""
    peer = Peer(Group)
    yield peer
    peer.end()


@pytest.fixture(params=LINKS)
def links(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every kind of link in turn; see `transport_peers.LINKS`."""
    use_links(request.param)
    yield request.param
    use_links("channel")


@pytest.fixture
def mixed_links() -> Iterator[None]:
    """Groups of even numbers by channel, the others by gloo."""
    use_links("mixed")
    yield
    use_links("channel")


@pytest.fixture
def gloo_links() -> Iterator[None]:
    """Gloo alone."""
    use_links("gloo")
    yield
    use_links("channel")
