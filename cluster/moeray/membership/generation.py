"""A generation, and how one follows from another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moeray.membership.members import Member
from moeray.placement import Layout, Placement, apart, arrange


@dataclass(frozen=True, slots=True)
class Generation:
    """One agreed set of expert groups and its placement.

    Attributes:
        number: 0 is the one before the first.
        groups: member ids, in group order.
        indices: their numbers as members, in the same order; ascending, not always 0..N-1.
        placement: None where no expert is remote.
    """

    number: int
    groups: tuple[str, ...] = ()
    indices: tuple[int, ...] = ()
    placement: Placement | None = None

    def covers(self, absent: frozenset[str]) -> bool:
        """Whether every expert has a copy in a group that is not `absent`."""
        if self.placement is None:
            return True
        return self.placement.covers({place for place, id in enumerate(self.groups) if id in absent})

    def to_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "groups": list(self.groups),
            "indices": list(self.indices),
            "placement": self.placement and self.placement.to_json(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Generation:
        return cls(
            number=int(data["number"]),
            groups=tuple(data["groups"]),
            indices=tuple(data["indices"]),
            placement=data["placement"] and Placement.from_json(data["placement"]),
        )


def succeed(current: Generation, number: int, members: Sequence[Member], layout: Layout) -> Generation:
    """The generation of `members` (in group order), with as few experts as possible in another place than now.

    A group that is new gets the experts of the one that it replaces: the one that had its number and is gone; on
    another node, copies that would then lie beside others change places.
    """
    ids = {member.id for member in members}
    stayed = {id: place for place, id in enumerate(current.groups) if id in ids}
    vacant = {
        index: place
        for place, (id, index) in enumerate(zip(current.groups, current.indices, strict=True))
        if id not in ids
    }
    inherits = [stayed[member.id] if member.id in stayed else vacant.get(member.index) for member in members]
    return Generation(
        number=number,
        groups=tuple(member.id for member in members),
        indices=tuple(member.index for member in members),
        placement=apart(arrange(layout, number, inherits, current.placement), [member.node for member in members]),
    )
