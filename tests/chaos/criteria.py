"""What a run must have seen to be good: data, judged in one place, one line for each criterion that is missed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median

from chaos.faults import FAULTS
from chaos.report import Event, Findings


@dataclass(frozen=True)
class StallBound:
    """How long the streams that flow may stand still after these kinds of faults, taken together.

    Attributes:
        kinds: of which each must have been injected `min_count` times, or there is no median to speak of.
        median_s, worst_s: of `Event.stall_s`; None bounds nothing.
        moves: streams must go on elsewhere, where their text so far is computed anew: `Findings.reprefill_s` is allowed
            beside `median_s`. Of these streams alone, by `Event.moved_stall_s`.
    """

    kinds: frozenset[str]
    median_s: float
    worst_s: float | None = None
    moves: bool = False
    min_count: int = 3

    def missed(self, findings: Findings) -> list[str]:
        """In words. A fault that no flowing stream met has no stall, and counts for nothing."""
        name = ", ".join(sorted(self.kinds))
        injected = [each for each in findings.injected if each.name in self.kinds]
        met = [each for each in injected if (each.moved if self.moves else each.stall_s > 0)]
        counts = {kind: sum(each.name == kind for each in met) for kind in sorted(self.kinds)}
        told = [
            f"stall: {kind} met a stream {count} times, at least {self.min_count}"
            for kind, count in counts.items() if count < self.min_count
        ]  # fmt: skip
        stalls = [each.moved_stall_s if self.moves else each.stall_s for each in met]
        bound = self.median_s + (findings.reprefill_s if self.moves else 0.0)
        if stalls and median(stalls) > bound:
            told.append(f"median stall: {name}: {median(stalls):.2f} s, bound {bound:.2f} s")
        if stalls and self.worst_s is not None and max(stalls) > self.worst_s:
            told.append(f"worst stall: {name}: {max(stalls):.2f} s, bound {self.worst_s:.2f} s")
        return told


STALLS = (
    StallBound(frozenset({"kill group"}), median_s=0.5, worst_s=2.0),
    StallBound(frozenset({"kill engine", "kill shard process", "kill shard replica"}), median_s=0.5, moves=True),
)


@dataclass(frozen=True)
class Criteria:
    """Of one run. No request may fail or be wrong and every fault must heal, whatever these say.

    Attributes:
        kinds: each must have been injected. One that the machine has no means for, such as a server, is excused and
            told by name.
        min_requests, min_faults: that the run has seen.
        stalls: their kinds must be injected alone, or none can say whose a stall is.
    """

    kinds: frozenset[str] = frozenset()
    min_requests: int = 1
    min_faults: int = 1
    stalls: tuple[StallBound, ...] = ()

    @property
    def repeats(self) -> dict[str, int]:
        """How often a schedule must have each of the kinds whose stalls are judged."""
        return {kind: bound.min_count for bound in self.stalls for kind in bound.kinds}

    @property
    def alone(self) -> frozenset[str]:
        """The kinds that no other fault may overlap."""
        return frozenset().union(*(bound.kinds for bound in self.stalls))

    @property
    def must_move(self) -> frozenset[str]:
        """The kinds that count only where a watched stream had to go on elsewhere."""
        return frozenset().union(*(bound.kinds for bound in self.stalls if bound.moves))

    def missed(self, findings: Findings) -> list[str]:
        """One line per criterion that is not met, its name first; none if the run was good."""
        told = [
            f"every kind: {kind} was not injected: {why.skipped}"
            for kind, why in missing_kinds(self.kinds, findings) if not why.lacks_means
        ]  # fmt: skip
        if findings.num_requests < self.min_requests:
            told.append(f"requests: {findings.num_requests}, at least {self.min_requests}")
        if (count := len(findings.injected)) < self.min_faults:
            told.append(f"faults: {count}, at least {self.min_faults}")
        bad = Counter(each.split(":")[0] for each in findings.failures)
        told += [f"{word}: {count} requests, none allowed" for word, count in sorted(bad.items())]
        broken = [each for each in findings.injected if each.recovered_s is None]
        told += [f"whole again: never after {each.name} ({each.what})" for each in broken]
        return told + [line for bound in self.stalls for line in bound.missed(findings)]

    def excused(self, findings: Findings) -> list[str]:
        """The kinds that this machine has no means for, in words."""
        absent = missing_kinds(self.kinds, findings)
        return [f"{kind}: {why.skipped}" for kind, why in absent if why.lacks_means]


def of_run(names: Iterable[str], every_kind: bool, overlap: bool) -> Criteria:
    """Of `run.py` with these options: all there are for a run of every kind; the least for one that leaves kinds out.

    Stalls are judged where each kind is wanted; where faults overlap, with one sample of each way to kill a shard.
    """
    kinds = frozenset(names)
    if not every_kind:
        return Criteria()
    stalls = tuple(bound for bound in STALLS if bound.kinds <= kinds)
    if overlap:
        stalls = tuple(replace(bound, min_count=-(-bound.min_count // len(bound.kinds))) for bound in stalls)
    if kinds < frozenset(FAULTS):
        return Criteria(kinds, stalls=stalls)
    return Criteria(kinds, min_requests=200, min_faults=20, stalls=stalls)


def missing_kinds(kinds: Iterable[str], findings: Findings) -> list[tuple[str, Event]]:
    """Those never injected, each with the last attempt."""
    injected = {each.name for each in findings.injected}
    attempts = {each.name: each for each in findings.events}
    never = "the run ended before"
    return [(kind, attempts.get(kind) or Event(kind, 0, skipped=never)) for kind in sorted(set(kinds) - injected)]
