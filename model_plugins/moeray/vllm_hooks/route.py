"""Where a shard finds its experts: one generation's placement and who is there of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeray.placement import Placement


@dataclass(frozen=True, slots=True)
class Route:
    """What the controller's view means for the hop.

    Attributes:
        placement: of the generation in force.
        groups: ids of its expert groups, in the placement's order; only to name one that is found bad.
        addresses: "host:port" of each; "" for one that is not there.
    """

    placement: Placement
    groups: tuple[str, ...]
    addresses: tuple[str, ...]

    @property
    def generation(self) -> int:
        return self.placement.generation

    @property
    def absent(self) -> frozenset[int]:
        """Numbers of the groups that are not there."""
        return frozenset(group for group, address in enumerate(self.addresses) if not address)

    def to_json(self) -> dict[str, Any]:
        return {
            "placement": self.placement.to_json(),
            "groups": list(self.groups),
            "addresses": list(self.addresses),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Route:
        return cls(Placement.from_json(data["placement"]), tuple(data["groups"]), tuple(data["addresses"]))
