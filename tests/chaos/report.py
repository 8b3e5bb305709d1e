"""What a run found: one line per kind of fault, as text, as markdown for docs/faults.md, and as JSON for a replay."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from chaos.clients import Outcome

COLUMNS = (
    "fault", "count", "noticed after", "longest stall", "later stall", "streams moved", "failed", "wrong",
    "connections cut", "whole again after",
)  # fmt: skip
NO_FAULT = "(none)"
STALL_S = 8.0
"""Later gaps are not the fault's but its repair's: processes that start take the cores of those that serve."""
LONG_S = 1.0
CUT_S = 1.0
"""After the end of what a client was connected to, it knows."""
BLOCK = re.compile(r"(<!-- chaos -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass
class Event:
    """One injected fault and what it did; times in seconds, of the monotonic clock or since the injection.

    Attributes:
        noticed_s: until the cluster's account showed a sign of it; None if it never did.
        recovered_s: until the cluster was whole again; None if it was not in time.
        stall_s: longest gap in a stream that flows, of those that meet the first STALL_S after the injection.
        repair_stall_s: of those that come later, until the cluster was whole again.
        moved_ids: requests that went on on another shard meanwhile, by the ingresses' own word.
        moved: streams that flow among them.
        moved_stall_s: longest gap of these.
        victims_gone: when the last process that it ends had ended; None if it did not.
        skipped: why it was not injected.
        lacks_means: because this machine has nothing to do it with.
    """

    name: str
    seed: int
    what: str = ""
    began: float = 0.0
    injected: float = 0.0
    ended: float = 0.0
    cuts_clients: bool = False
    skipped: str = ""
    lacks_means: bool = False
    noticed_s: float | None = None
    recovered_s: float | None = None
    stall_s: float = 0.0
    repair_stall_s: float = 0.0
    moved_ids: list[str] = field(default_factory=list)
    moved: int = 0
    moved_stall_s: float = 0.0
    victims_gone: float | None = None
    failed: int = 0
    wrong: int = 0
    cut: int = 0

    def meets(self, begin: float, end: float) -> bool:
        """Whether a wait from `begin` to `end` may be its doing."""
        return self.injected <= end and self.injected + STALL_S >= begin

    def excuses(self, when: float) -> bool:
        """Whether it broke a connection that broke then."""
        gone = self.ended if self.victims_gone is None else self.victims_gone
        return self.cuts_clients and self.began <= when <= gone + CUT_S


@dataclass
class Findings:
    """A whole run; what it must have seen is in `chaos.criteria`.

    Attributes:
        failures: each begins with "failed: " or "wrong: ".
        quiet_stall_s: longest gap in a stream that flows and met no fault.
        reprefill_s: `chaos.load.reprefill_s`.
        first_chunk_s: what is usual under load, see `first_chunk_s`.
        long_gaps: (from, to, name of the ask) of every gap of LONG_S and more, on the clock of `Event.injected`.
        own_pauses: (from, to) when this process itself, with its clients, did not run. They excuse nothing: they tell
            where to look for the reason of a stall.
    """

    seed: int
    events: list[Event]
    num_requests: int
    failures: list[str] = field(default_factory=list)
    quiet_stall_s: float = 0.0
    reprefill_s: float = 0.0
    first_chunk_s: float = 0.0
    long_gaps: list[tuple[float, float, str]] = field(default_factory=list)
    own_pauses: list[tuple[float, float]] = field(default_factory=list)

    @property
    def injected(self) -> list[Event]:
        return [each for each in self.events if not each.skipped]


def first_chunk_s(outcomes: Iterable[Outcome]) -> float:
    """Median seconds to the first chunk of the streams that flow; 0.0 without one."""
    times = [outcome.times[0] - outcome.started for outcome in outcomes if outcome.ask.flows and outcome.times]
    return median(times) if times else 0.0


def attribute(
    events: Sequence[Event],
    outcomes: Iterable[Outcome],
    wrong: Callable[[Outcome], str],
    *,
    first_chunk_s: float = 0.0,
) -> tuple[list[str], float]:
    """Charge every outcome to the latest fault that began before it ended, and every stall to the faults it meets.

    A broken connection counts as a failure unless it broke when the fault killed what clients were connected to.

    Args:
        first_chunk_s: how long a stream's first chunk takes as a rule; what is beyond is a stall.
    Returns:
        What failed or was wrong, in words; and the longest gap that met no fault.
    """
    failures, quiet_stall_s = [], 0.0
    done = [each for each in events if not each.skipped]
    for outcome in outcomes:
        met = [each for each in done if each.began <= outcome.ended and each.ended >= outcome.started]
        gaps = list(outcome.gaps(first_chunk_s))
        hurt = [each for each in met if outcome.request_id in each.moved_ids]
        for each in hurt:
            each.moved += 1
        for begin, end in gaps:
            stall_s = end - begin
            for each in (each for each in done if each.meets(begin, end)):
                each.stall_s = max(each.stall_s, stall_s)
                if each in hurt:
                    each.moved_stall_s = max(each.moved_stall_s, stall_s)
            for each in done:
                if each.injected + STALL_S < begin <= each.ended:
                    each.repair_stall_s = max(each.repair_stall_s, stall_s)
            if not any(each.began <= end and each.ended >= begin for each in done):
                quiet_stall_s = max(quiet_stall_s, stall_s)
        blamed = met[-1] if met else None
        excused = all(any(each.excuses(when) for each in met) for when in outcome.cuts)
        if blamed is not None:
            blamed.cut += len(outcome.cuts)
        if outcome.answer is None or not excused:
            failures.append(
                f"failed: {outcome.ask.name}, during {_name(blamed)}: {outcome.failure or 'connection cut'}"
            )
            if blamed is not None:
                blamed.failed += 1
        elif text := wrong(outcome):
            failures.append(f"wrong: {outcome.ask.name}, during {_name(blamed)}: {text}")
            if blamed is not None:
                blamed.wrong += 1
    return failures, quiet_stall_s


def long_gaps(outcomes: Iterable[Outcome], first_chunk_s: float = 0.0) -> list[tuple[float, float, str]]:
    """See `Findings`."""
    gaps = [(begin, end, outcome.ask.name) for outcome in outcomes for begin, end in outcome.gaps(first_chunk_s)]
    return sorted(gap for gap in gaps if gap[1] - gap[0] >= LONG_S)


def _name(event: Event | None) -> str:
    return f"{event.name} ({event.what})" if event is not None else "no fault"


def rows(findings: Findings) -> list[tuple[str, ...]]:
    """One per kind of fault; medians, with the worst in brackets where there were several."""
    by_name: dict[str, list[Event]] = {}
    for event in findings.events:
        by_name.setdefault(event.name, []).append(event)
    table: list[tuple[str, ...]] = [COLUMNS]
    for name, events in sorted(by_name.items()):
        done = [each for each in events if not each.skipped]
        if not done:
            table.append((name, "0", f"not injected: {events[0].skipped}", *[""] * (len(COLUMNS) - 3)))
            continue
        table.append((
            name, str(len(done)),
            _seconds([each.noticed_s for each in done]), _seconds([each.stall_s for each in done]),
            _seconds([each.repair_stall_s or None for each in done]),
            _number(each.moved for each in done), str(sum(each.failed for each in done)),
            str(sum(each.wrong for each in done)), str(sum(each.cut for each in done)),
            _seconds([each.recovered_s for each in done], missing="never"),
        ))  # fmt: skip
    table.append((NO_FAULT, "", "", _seconds([findings.quiet_stall_s]), *[""] * (len(COLUMNS) - 4)))
    return table


def _number(values: Iterable[int]) -> str:
    return str(sum(values) or "-")


def _seconds(values: Sequence[float | None], missing: str = "-") -> str:
    known = [each for each in values if each is not None]
    if not known:
        return missing
    text = f"{median(known):.2f} s" + (f" ({max(known):.2f})" if len(known) > 1 else "")
    return text if len(known) == len(values) else f"{text}, {len(values) - len(known)} x {missing}"


def as_text(table: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )


def as_markdown(table: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


def fill(document: Path, findings: Findings, facts: Mapping[str, str]) -> None:
    """Put the table between the markers of docs/faults.md."""
    source = "; ".join(f"{key} {value}" for key, value in facts.items())
    body = f"{source}. {findings.num_requests} requests.\n\n{as_markdown(rows(findings))}"
    text = document.read_text(encoding="utf-8")
    document.write_text(BLOCK.sub(lambda match: f"{match[1]}{body}\n{match[2]}", text), encoding="utf-8")
