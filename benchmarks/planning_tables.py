"""The tables of docs/planning.md and docs/autoscaling.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from records import Record

Markdown = Callable[[Sequence[str], Sequence[Sequence[Any]]], str]


def published_table(found: list[Record], markdown: Markdown) -> str:
    """One line per result that others published."""
    rows = [
        [each["system"], each["devices"], each["phase"], each["published"], each["predicted"], _percent(each["error"])]
        for each in found
    ]
    return markdown(["system", "devices", "phase", "published", "predicted", "error"], rows)


def planning_table(found: list[Record], markdown: Markdown) -> str:
    """One line per topology, its batches beside each other; and memory."""
    steps = [each for each in found if "tokens" in each]
    sizes = sorted({round(each["tokens"]) for each in steps})
    rows = []
    for name in dict.fromkeys(each["topology"] for each in steps):
        own = {round(each["tokens"]): each for each in steps if each["topology"] == name}
        rows.append([name, *(_cell(own[size]) if size in own else "" for size in sizes)])
    predicted = [abs(each["error"]) for each in steps if not each["fitted"]]
    within = sum(each <= 0.15 for each in predicted)
    lines = [markdown(["topology", *(f"{size} per shard" for size in sizes)], rows), ""]
    lines.append(
        f"Measured -> predicted step in ms, and the error; (f): the numbers were found from it. Of {len(predicted)} "
        f"that were predicted only, {within} are within 15 %; the largest error is {100 * max(predicted):.0f} %."
    )
    lines += [
        f"Memory: loading routed experts of {each['predicted_mib']} MiB, as predicted, added {each['measured_mib']} "
        f"MiB to a process ({_percent(each['error'])})."
        for each in found
        if "measured_mib" in each
    ]
    return "\n".join(lines)


def _cell(each: Record) -> str:
    fitted = " (f)" if each["fitted"] else ""
    return f"{each['measured_ms']:.1f} -> {each['predicted_ms']:.1f}, {_percent(each['error'])}{fitted}"


def _percent(share: float) -> str:
    return f"{100 * share:+.0f} %"


def autoscaling_table(found: list[Record], markdown: Markdown) -> str:
    """One line per trace: both policies beside each other."""
    rows, hours = [], {True: 0.0, False: 0.0}
    for name in dict.fromkeys(each["trace"] for each in found):
        ours, theirs = (each for each in found if each["trace"] == name)
        cost = [each["shard_hours"] + each["group_hours"] for each in (ours, theirs)]
        hours[True] += cost[0]
        hours[False] += cost[1]
        rows.append([
            name, f"{ours['requests']:,}", f"{100 * ours['met']:.1f} %", f"{100 * theirs['met']:.1f} %",
            f"{cost[0]:.0f}", f"{cost[1]:.0f}", f"{cost[0] / cost[1]:.2f}",
        ])  # fmt: skip
    met = [
        sum(each["met"] for each in found if (each["policy"] == "goals") is ours) / len(rows) for ours in (True, False)
    ]
    rows.append([
        "together", "", f"{100 * met[0]:.1f} %", f"{100 * met[1]:.1f} %", f"{hours[True]:.0f}", f"{hours[False]:.0f}",
        f"{hours[True] / hours[False]:.2f}",
    ])  # fmt: skip
    theirs_name = next(each["policy"] for each in found if each["policy"] != "goals")
    head = ["trace", "requests", "met, goals", "met, queue", "hours, goals", "hours, queue", "ratio"]
    return f"{markdown(head, rows)}\n\nqueue: {theirs_name}."


def burst_table(found: list[Record], markdown: Markdown) -> str:
    """One line per cluster."""
    rows = [
        [
            each["cluster"], each["requests"], each["failed"], f"{100 * each['met']:.0f} %", each["ttft_p50_s"],
            each["ttft_p95_s"], each["tpot_p95_s"], _sizes(each["most"]), _sizes(each["at_end"]), each["process_s"],
        ]
        for each in found
    ]  # fmt: skip
    head = [
        "cluster", "requests", "failed", "met goals in the burst", "TTFT p50 s", "p95", "TPOT p95 s",
        "most shards, groups", "at the end", "process seconds",
    ]  # fmt: skip
    return markdown(head, rows)


def _sizes(pools: dict[str, int]) -> str:
    return f"{pools['attention']}, {pools['experts']}"
