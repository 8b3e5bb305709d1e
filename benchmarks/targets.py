"""What the hop is meant to reach, and whether the results reach it. One line of the table per target and batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from records import Record

SMALL_BATCHES = (1, 8, 32)
MAX_HOP, MAX_GLOO, MAX_PACKING_US = 2.0, 3.0, 60.0
MIN_THROUGHPUT = {
    ("moeray-tiny", "1x1", 1): 0.95,
    ("moeray-tiny", "1x1", 8): 0.95,
    ("moeray-tiny", "1x1", 32): 0.9,
    ("bench-large", "1x1", 8): 0.85,
    ("bench-large", "1x1", 32): 0.85,
    ("bench-large", "2x1", 32): 1.0,
}
"""Of the monolithic engine on the same two cores. Of several ways to place a topology the best counts."""


@dataclass(frozen=True)
class Verdict:
    """One measured target. `holds`: what a missed one is held by, "" if it is met."""

    target: str
    measured: str
    met: bool
    holds: str


def verdicts(hop: Iterable[Record], step: Iterable[Record]) -> list[Verdict]:
    """All targets that these results say something about."""
    return [*_of_hop(list(hop)), *_of_step(list(step))]


def _of_hop(found: list[Record]) -> list[Verdict]:
    verdicts = []
    for name, limit in (("channel", MAX_HOP), ("gloo", MAX_GLOO)):
        for each in found:
            if each["transport"] == name and each["batch"] in SMALL_BATCHES:
                where = f"hidden {each['hidden']}, batch {each['batch']}"
                target = f"{name} <= {limit:g} x {each['floor']}, {where}"
                verdicts.append(_verdict(target, each, "ratio", each["ratio"] <= limit, "stages_us"))
    for each in found:
        if each["transport"] == "channel" and each["batch"] == 8:
            pack, combine = each["stages_us"]["pack"], each["stages_us"]["combine"]
            met = pack + combine <= MAX_PACKING_US
            target = f"pack + combine <= {MAX_PACKING_US:g} us, hidden {each['hidden']}, batch 8"
            holds = "" if met else f"pack {pack:.0f}, combine {combine:.0f} us"
            verdicts.append(Verdict(target, f"{pack + combine:.0f} us", met, holds))
    return verdicts


def _of_step(found: list[Record]) -> list[Verdict]:
    verdicts = []
    for (model, topology, batch), least in MIN_THROUGHPUT.items():
        candidates = [
            each
            for each in found
            if (each["model"], each["batch"]) == (model, batch) and each["topology"].split()[0] == topology
        ]
        if candidates:
            best = max(candidates, key=lambda each: each["throughput_ratio"])
            target = f"{model} {best['topology']} >= {least:g} x monolithic, batch {batch}"
            met = best["throughput_ratio"] >= least
            verdicts.append(_verdict(target, best, "throughput_ratio", met, "stages"))
    return verdicts


def _verdict(target: str, record: Record, key: str, met: bool, stages: str) -> Verdict:
    measured = f"{record[key]:.2f} ({record[key + '_min']:.2f}..{record[key + '_max']:.2f})"
    largest = sorted(record[stages].items(), key=lambda stage: -stage[1])[:3]
    holds = ", ".join(f"{name.replace('_', ' ')} {value:.0f} us" for name, value in largest)
    return Verdict(target, measured, met, "" if met else holds)
