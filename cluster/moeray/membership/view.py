"""What the controller tells its members about the cluster, at one version of its state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class View:
    """What shards, expert groups and ingresses need to know.

    Attributes:
        epoch: which life of the controller this is of; versions of different epochs do not compare.
        version: grows with every event that changed the state.
        generation: in force; 0 until the first one formed.
        groups: member ids in group order of the generation in force.
        addresses: of `groups`, in their order; "" for one that is lost or not ready. A draining one still serves.
        is_complete: every group of the generation in force serves.
        is_covered: every expert of every layer has a copy in a group that serves.
        missing: of an incomplete generation, each group that is not there and why.
        proposed: the generation that is being prepared; 0 if none.
        proposed_groups: its groups' ids, in its group order.
        oldest: no living shard uses a generation before this one; equal to `generation` once all have adopted that.
        lost: expert groups that were given up and may still run: who finds itself here ends.
        draining: members that take nothing new and are to go, by themselves or because they were told to.
        may_leave: draining expert groups that no living shard needs any more.
        shards: ready attention shards, id -> relay address.
        row_servers: ready Engram row servers, number -> address.
        mismatches: id -> how a member's model differs from the others'; such a member takes no part.
    """

    epoch: int
    version: int
    generation: int
    groups: tuple[str, ...]
    addresses: tuple[str, ...]
    is_complete: bool
    is_covered: bool
    missing: tuple[str, ...]
    proposed: int
    proposed_groups: tuple[str, ...]
    oldest: int
    lost: frozenset[str]
    draining: frozenset[str]
    may_leave: frozenset[str]
    shards: Mapping[str, str]
    row_servers: Mapping[int, str]
    mismatches: Mapping[str, str]
