"""Do all members serve the same model? Shards and groups that do not must never share a generation.

A member's identity is a mapping that the model's layer fills in (content of weights and config.json, shape, dtype,
version); here only its equality counts. The realistic cause of a difference: nodes with other files under one path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeray.membership.members import Member

Identity = Mapping[str, Any]


def disagreements(members: Sequence[Member], served: Identity | None) -> dict[str, str]:
    """Who serves something else than the others.

    Args:
        members: those that have loaded their part of the model, expert groups first.
        served: the identity of the generation in force; whoever has it is right. None before the first: then the
            first of `members` is what the others are compared with, although nobody can know who is right.
    Returns:
        id of each member that differs -> one line that names both sides and every value that differs.
    """
    if not members:
        return {}
    right = next((member for member in members if served is not None and member.identity == served), members[0])
    return {
        member.id: _difference(member, right)
        for member in members
        if member.identity is not right.identity and member.identity != right.identity
    }


def agree(members: Sequence[Member]) -> bool:
    """Whether all have the same identity (or none at all)."""
    return all(member.identity == members[0].identity for member in members)


def _difference(one: Member, other: Member) -> str:
    mine, theirs = one.identity or {}, other.identity or {}
    keys = [key for key in {**theirs, **mine} if mine.get(key) != theirs.get(key)]
    return f"{one.name} has {_values(keys, mine)}; {other.name} has {_values(keys, theirs)}"


def _values(keys: Sequence[str], identity: Identity) -> str:
    return ", ".join(f"{key} {identity.get(key)!r}" for key in keys)
