"""Which copies each expert has and where they lie: as equal as possible, by the load that was seen, moving little.

Suffixes: L layers, E logical experts, G groups, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeray.placement.expert_map import Placement, PlacementError, contiguous


@dataclass(frozen=True, slots=True)
class Layout:
    """What must be placed, whatever the groups.

    Attributes:
        num_redundant: slots per layer beside one for each expert, as far as the groups have room for them.
        min_copies: of each expert, in so many different groups; fewer where there are fewer groups.
    """

    num_layers: int
    num_experts: int
    num_redundant: int = 0
    min_copies: int = 1

    def num_slots(self, num_groups: int) -> int:
        """S: no group holds an expert twice."""
        return self.num_experts + min(self.num_redundant, self.num_experts * (num_groups - 1))

    def num_copies(self, num_groups: int) -> tuple[int, int]:
        """(fewest, most) copies of one expert."""
        return min(self.min_copies, num_groups), num_groups


TOLERANCE = 0.05
"""Groups whose load is so near the mean are left alone: a swap costs two experts' bytes."""

Rows = Sequence[Sequence[float]]


def arrange(
    layout: Layout,
    generation: int,
    inherits: Sequence[int | None],
    previous: Placement | None = None,
    *,
    rows_LE: Rows | None = None,
    copies_LE: Sequence[Sequence[int]] | None = None,
) -> Placement:
    """A placement for these groups.

    Every group has S / G slots in each layer, as equal as division allows, and no expert twice; every expert has the
    layout's fewest copies or more. What a group had before stays as far as that permits.

    Args:
        inherits: [G] for each group the number that it, or the one whose place it takes, had in `previous`; None for
            one that starts with nothing.
        rows_LE: rows that were computed per layer and expert: groups are made equal by them, at the price of moves.
            None: nothing is moved for the load's sake.
        copies_LE: wanted copies, corrected where they do not fit the slots; None: as in `previous`, by load.
    Raises:
        PlacementError: no group, or more groups than experts.
    """
    num_groups = len(inherits)
    if not 1 <= num_groups <= layout.num_experts:
        raise PlacementError(
            f"{layout.num_experts} experts cannot be spread over {num_groups} expert groups: "
            f"1..{layout.num_experts} groups can"
        )
    num_slots = layout.num_slots(num_groups)
    nothing_held = previous is None or all(place is None for place in inherits)
    if nothing_held and rows_LE is None and copies_LE is None:
        return contiguous(
            generation=generation, num_layers=layout.num_layers, num_experts=layout.num_experts,
            num_groups=num_groups, num_redundant=num_slots - layout.num_experts,
        )  # fmt: skip
    slots_G = _slots(num_slots, inherits, previous)
    fewest, most = layout.num_copies(num_groups)
    cut: dict[object, tuple[int, ...]] = {}
    layers = []
    for layer in range(layout.num_layers):
        held = [_held(previous, place, layer) for place in inherits]
        rows_E = [1.0] * layout.num_experts if rows_LE is None else [float(rows) for rows in rows_LE[layer]]
        if copies_LE is not None:
            wanted_E = list(copies_LE[layer])
        else:
            wanted_E = [1] * layout.num_experts if previous is None else list(previous.num_copies(layer))
        copies_E = fit_copies(wanted_E, rows_E, num_slots, fewest, most)
        key = (tuple(map(tuple, held)), tuple(copies_E), tuple(rows_E))
        if key not in cut:
            share_E = [rows / copies for rows, copies in zip(rows_E, copies_E, strict=True)]
            cut[key] = _Layer(slots_G, held, copies_E, share_E).arranged(level=rows_LE is not None)
        layers.append(cut[key])
    return Placement(generation, layout.num_experts, slots_G, tuple(layers))


def fit_copies(wanted_E: Sequence[int], rows_E: Sequence[float], num_slots: int, fewest: int, most: int) -> list[int]:
    """[E] copies that fill the slots exactly: as wanted, then more for the busiest and fewer for the idlest."""
    copies_E = [min(max(wanted, fewest), most) for wanted in wanted_E]
    experts = range(len(copies_E))
    while sum(copies_E) > num_slots:
        idlest = min((e for e in experts if copies_E[e] > fewest), key=lambda e: (rows_E[e] / (copies_E[e] - 1), -e))
        copies_E[idlest] -= 1
    while sum(copies_E) < num_slots:
        busiest = max((e for e in experts if copies_E[e] < most), key=lambda e: (rows_E[e] / copies_E[e], -e))
        copies_E[busiest] += 1
    return copies_E


def imbalance(placement: Placement, rows_LE: Rows) -> float:
    """Rows of the busiest group over the mean, summed over the layers: how much longer a step's experts take than need
    be. 1.0 is perfect, and what there is without any load.
    """
    busiest = mean = 0.0
    owners = placement.group_of_slot()
    for layer, rows_E in enumerate(rows_LE):
        copies_E = placement.num_copies(layer)
        load_G = [0.0] * placement.num_groups
        for expert, group in zip(placement.expert_of_slot[layer], owners, strict=True):
            load_G[group] += rows_E[expert] / copies_E[expert]
        busiest += max(load_G)
        mean += sum(load_G) / len(load_G)
    return busiest / mean if mean else 1.0


def num_moves(placement: Placement, inherits: Sequence[int | None], previous: Placement) -> int:
    """Experts, over all layers, that a group must load because it did not have them."""
    return sum(
        len(set(placement.experts_of_group(group, layer)) - set(_held(previous, place, layer)))
        for layer in range(placement.num_layers)
        for group, place in enumerate(inherits)
    )


class _Layer:
    """One layer that is being arranged: what each group has, and how much work that is."""

    def __init__(
        self, slots_G: Sequence[int], held: Sequence[Sequence[int]], copies_E: Sequence[int], share_E: Sequence[float]
    ) -> None:
        self._slots_G = slots_G
        self._before = [set(experts) for experts in held]
        self._groups = [list(experts) for experts in held]
        self._copies_E = copies_E
        self._share_E = share_E
        self._load_G = [sum(share_E[expert] for expert in experts) for experts in self._groups]
        self._mean = sum(share * copies for share, copies in zip(share_E, copies_E, strict=True)) / len(slots_G)

    def arranged(self, *, level: bool) -> tuple[int, ...]:
        """[S] the expert of each slot."""
        self._drop()
        self._fill()
        if level:
            self._level()
        return tuple(expert for experts in self._groups for expert in experts)

    def _drop(self) -> None:
        """Copies that are too many, then those that a group has no slot for."""
        for expert, copies in enumerate(self._copies_E):
            holders = [group for group, experts in enumerate(self._groups) if expert in experts]
            holders.sort(key=lambda group: (self._slots_G[group] - len(self._groups[group]), -self._load_G[group]))
            for group in holders[: max(0, len(holders) - copies)]:
                self._take(group, expert)
        for group, num_slots in enumerate(self._slots_G):
            while (surplus := len(self._groups[group]) - num_slots) > 0:
                each = (self._load_G[group] - self._mean) / surplus
                self._take(
                    group, min(self._groups[group], key=lambda expert: (abs(self._share_E[expert] - each), -expert))
                )

    def _fill(self) -> None:
        """The copies that are missing, the busiest first, each where there is room and least to do."""
        there = [0] * len(self._copies_E)
        for experts in self._groups:
            for expert in experts:
                there[expert] += 1
        missing = [
            expert for expert, copies in enumerate(self._copies_E) for _ in range(copies - there[expert])
        ]  # by number, which the stable sort below keeps among equals
        for expert in sorted(missing, key=lambda expert: -self._share_E[expert]):
            room = [group for group, slots in enumerate(self._slots_G) if len(self._groups[group]) < slots]
            free = [group for group in room if expert not in self._groups[group]]
            if free:
                self._give(min(free, key=lambda group: (self._load_G[group], group)), expert)
            else:
                self._give(self._make_room(expert, room[0]), expert)

    def _make_room(self, expert: int, roomy: int) -> int:
        """A group without `expert` that has room for it, after one of its own went to `roomy`.

        There is one: whoever lacks `expert` is full, so it has no fewer experts than `roomy`, which has `expert`;
        hence it has one that `roomy` lacks.
        """
        lacking = [group for group, experts in enumerate(self._groups) if expert not in experts]
        group = min(lacking, key=lambda group: self._load_G[group])
        others = [other for other in self._groups[group] if other not in self._groups[roomy]]
        moved = min(others, key=lambda other: (other in self._before[group], self._share_E[other]))
        self._take(group, moved)
        self._give(roomy, moved)
        return group

    def _level(self) -> None:
        """Swap experts of the busiest group for lighter ones elsewhere until it is near the mean."""
        for _ in range(sum(self._slots_G)):
            busiest = max(range(len(self._load_G)), key=self._load_G.__getitem__)
            if self._load_G[busiest] <= self._mean * (1 + TOLERANCE) or not self._lighten(busiest):
                return

    def _lighten(self, busiest: int) -> bool:
        """One swap that makes the busier of the two groups less busy than `busiest` was; whether there was one."""
        for group in sorted(range(len(self._load_G)), key=self._load_G.__getitem__):
            gap = self._load_G[busiest] - self._load_G[group]
            swaps = [
                (abs(self._share_E[out] - self._share_E[back] - gap / 2), out, back)
                for out in self._groups[busiest]
                if out not in self._groups[group]
                for back in self._groups[group]
                if back not in self._groups[busiest]
            ]
            if swaps and (best := min(swaps))[0] < gap / 2 - self._mean * 1e-6:
                _, out, back = best
                self._take(busiest, out)
                self._take(group, back)
                self._give(busiest, back)
                self._give(group, out)
                return True
        return False

    def _take(self, group: int, expert: int) -> None:
        self._groups[group].remove(expert)
        self._load_G[group] -= self._share_E[expert]

    def _give(self, group: int, expert: int) -> None:
        self._groups[group].append(expert)
        self._load_G[group] += self._share_E[expert]


def _held(previous: Placement | None, place: int | None, layer: int) -> tuple[int, ...]:
    """What the group at `place` had, in slot order."""
    if previous is None or place is None:
        return ()
    start = sum(previous.slots_per_group[:place])
    return previous.expert_of_slot[layer][start : start + previous.slots_per_group[place]]


def _slots(num_slots: int, inherits: Sequence[int | None], previous: Placement | None) -> tuple[int, ...]:
    """[G] slots of each group; those that had more keep the remainder."""
    base, extra = divmod(num_slots, len(inherits))
    had = [previous.slots_per_group[place] if previous and place is not None else 0 for place in inherits]
    larger = sorted(range(len(inherits)), key=lambda group: (-had[group], group))[:extra]
    return tuple(base + (group in larger) for group in range(len(inherits)))
