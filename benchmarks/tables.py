"""The tables of docs/performance.md, planning.md and autoscaling.md, from benchmarks/results.

    python benchmarks/tables.py

Each table stands between two comments of its name; what is between them is replaced, the text around it is a person's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import planning_tables
import records
import targets
import traced
from records import Record

DOCUMENTS = [records.ROOT / "docs" / name for name in ("performance.md", "planning.md", "autoscaling.md")]
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text(encoding="utf-8"), records.RESULTS), encoding="utf-8")


def filled(text: str, results: Path) -> str:
    """The document with every table made anew; a table without results says how to get them.

    Raises:
        KeyError: the document names a table that nobody makes.
    """

    def replaced(match: re.Match[str]) -> str:
        name = match[2]
        if name == "targets":
            body = targets_table(results)
        else:
            file, make = TABLES[name]
            found = results / file
            body = (
                _with_source(make, found)
                if found.exists()
                else f"Not measured yet: `make bench-{file[:-5].partition('_')[0]}`."
            )
        return f"{match[1]}{body}\n{match[3]}"

    return BLOCK.sub(replaced, text)


def _with_source(make: Callable[[list[Record]], str], file: Path) -> str:
    found, facts = records.read(file)
    source = f"{facts['machine']}; commit {facts['commit']}, {facts['date']}, load {facts['load']} at the end."
    return f"{source}\n\n{make(found)}\n\n`{facts['command']}`"


def hop_table(found: list[Record]) -> str:
    """One line per width and batch; channel, Gloo and TLS beside their floors."""
    rows = []
    for hidden, batch in dict.fromkeys((each["hidden"], each["batch"]) for each in found):
        at = {each["transport"]: each for each in found if (each["hidden"], each["batch"]) == (hidden, batch)}
        channel, gloo, tls = at["channel"], at["gloo"], at["tls"]
        packed = channel["stages_us"]["pack"] + channel["stages_us"]["combine"]
        rows.append(
            [hidden, batch, _us(at["local"], "floor_us"), _us(at["socket"]),
             f"{_us(channel)} / {_us(channel, 'p99_us')}", _ratio(channel), f"{packed:.0f}",
             _us(channel, "call_us"), _us(at["gloo_p2p"]),
             f"{_us(gloo)} / {_us(gloo, 'p99_us')}", _ratio(gloo), _us(gloo, "call_us"),
             f"{_us(tls)} / {_us(tls, 'p99_us')}", _ratio(tls), _us(tls, "call_us")]
        )  # fmt: skip
    head = [
        "hidden", "batch", "memcpy", "socket", "channel p50 / p99", "x socket", "its pack + combine", "its whole call",
        "Gloo p2p", "Gloo p50 / p99", "x Gloo p2p", "its whole call", "TLS p50 / p99", "x Gloo p2p", "its whole call",
    ]  # fmt: skip
    return markdown(head, rows)


def step_table(found: list[Record]) -> str:
    """One line per model, batch and topology."""
    rows = [
        [each["model"], each["batch"], each["topology"], f"{each['ms']:.1f}", f"{each['tokens_per_s']:.0f}",
         _ratio(each, "throughput_ratio")]
        for each in found
    ]  # fmt: skip
    return markdown(["model", "batch", "topology", "ms per token of each request", "tokens/s", "x monolithic"], rows)


def stage_table(found: list[Record]) -> str:
    """Microseconds per layer call of the split topologies."""
    split = [each for each in found if each["stages"]]
    stages = list(split[0]["stages"]) if split else []
    rows = [
        [each["model"], each["batch"], each["topology"], *(f"{each['stages'][stage]:.0f}" for stage in stages)]
        for each in split
    ]
    return markdown(["model", "batch", "topology", *(stage.replace("_", " ") for stage in stages)], rows)


def network_table(found: list[Record]) -> str:
    """One line per link, width and batch."""
    rows = []
    for link, hidden, batch in dict.fromkeys((each["link"], each["hidden"], each["batch"]) for each in found):
        at = {
            each["transport"]: each
            for each in found
            if (each["link"], each["hidden"], each["batch"]) == (link, hidden, batch)
        }
        cells = [f"{_us(at[name])} / {_us(at[name], 'p99_us')}" for name in ("tcp", "gloo_p2p", "gloo")]
        rows.append([f"{link} ({at['tcp']['made_by']})", hidden, batch, *cells, _ratio(at["gloo"])])
    return markdown(["link", "hidden", "batch", "TCP p50 / p99", "Gloo p2p", "Gloo transport", "x TCP"], rows)


def ingress_table(found: list[Record]) -> str:
    """One line per number of clients and door."""
    rows = [
        [each["clients"], each["door"], f"{each['ttft_p50_ms']:.1f} / {each['ttft_p95_ms']:.1f}",
         f"{each['added_ms']:+.2f} ({each['added_ms_min']:+.2f}..{each['added_ms_max']:+.2f})",
         f"{each['tokens_per_s']:.0f}", _ratio(each, "throughput_ratio"),
         ", ".join(f"{role} {value:.1f}" for role, value in each["cpu_ms"].items())]
        for each in sorted(found, key=lambda each: each["clients"])
    ]  # fmt: skip
    head = ["clients", "door", "TTFT p50 / p95, ms", "added, ms", "tokens/s", "x vllm serve", "CPU ms per request"]
    return markdown(head, rows)


def routing_table(found: list[Record]) -> str:
    """One line per way to choose a shard."""
    rows = [
        [each["routing"], f"{each['later_ttft_p50_ms']:.0f} / {each['later_ttft_p95_ms']:.0f}",
         _ratio(each["ttft_ratio"], "ratio"), _ratio(each["ttft_p95_ratio"], "ratio"),
         f"{each['first_ttft_p50_ms']:.0f}", f"{100 * each['cached']:.0f} %"]
        for each in found
    ]  # fmt: skip
    head = ["routing", "TTFT p50 / p95 of later turns, ms", "p50 x round robin", "p95 x round robin",
            "TTFT p50 of first turns, ms", "prompt tokens cached"]  # fmt: skip
    return markdown(head, rows)


def kv_cache_table(found: list[Record]) -> str:
    """One line per store and prefix."""
    ways = ("cold", "device", "fetched", "computed", "chosen")
    rows = [
        [each["store"], each["prefix"], *(f"{each[way + '_ms']:.0f}" for way in ways), _ratio(each),
         f"{each['chose_to_fetch']} of {each['rounds']}", f"{each['regret']:.2f}"]
        for each in found if each["bench"] == "paths"
    ]  # fmt: skip
    head = ["store", "prefix", "cold, ms", *ways[1:], "fetched / computed", "chose to fetch", "regret"]
    return markdown(head, rows)


def chats_table(found: list[Record]) -> str:
    """One line per way to keep KV."""
    rows = [
        [each["way"], each["users"], f"{100 * each['cached']:.0f} %",
         f"{each['ttft_p50_ms']:.0f} / {each['ttft_p95_ms']:.0f}", f"{each['later_p50_ms']:.0f}"]
        for each in found if each["bench"] == "chats"
    ]  # fmt: skip
    head = ["KV is kept in", "users", "prompt tokens not computed", "TTFT p50 / p95, ms", "p50 of later turns"]
    return markdown(head, rows)


def engram_table(found: list[Record]) -> str:
    """One line per table and step."""
    rows = [
        [*(each[key] for key in ("table_gib", "tokens")), f"{each['rows_per_s'] / 1e6:.2f}",
         *(each[key] for key in ("us_per_token", "times_memcpy", "small_pages")),
         _ratio(each) if "ratio" in each else ""]
        for each in found if each["bench"] == "gather"
    ]  # fmt: skip
    head = [
        "table, GiB",
        "tokens a step",
        "M rows/s",
        "us per token",
        "x memcpy",
        "x with small pages",
        "speed, mapped / private",
    ]
    decode = [
        [*(each[key] for key in ("placement", "batch", "tokens_per_s")), _ratio(each)]
        for each in found if each["bench"] == "decode"
    ]  # fmt: skip
    gate = [
        [*(each[key] for key in ("tokens", "us", "times_memcpy")), _ratio(each)]
        for each in found
        if each["bench"] == "gate"
    ]
    sizes = ("process", "Rss", "Pss", "Anonymous")
    memory = [[each[name] for name in sizes] for each in found if each["bench"] == "memory"]
    return "\n\n".join(
        [
            markdown(head, rows),
            markdown(["gate: tokens a step", "us", "x memcpy", "speed, compiled / torch"], gate),
            markdown(["decode: placement", "requests", "tokens/s", "beside device"], decode),
            markdown(["process", "RSS, GiB", "PSS", "private"], memory),
        ]
    )


def layers_table(found: list[Record]) -> str:
    """One line per layer; microseconds to the first token, and of each later one, for every door."""
    names = list(dict.fromkeys(name for each in found for name in each["first_token_us"]))
    points = [name for name, *_ in traced.POINTS]
    order = [*(name for name in points if name in names), *(name for name in names if name not in points)]
    rows = [
        [name, *(each[way].get(name, "") for each in found for way in ("first_token_us", "later_token_us"))]
        for name in order
    ]
    head = ["layer", *(f"{each['door']}, {which} token" for each in found for which in ("first", "later"))]
    return markdown(head, rows)


def targets_table(results: Path) -> str:
    """Every target, met or with what holds it; empty without results."""
    hop, step = (
        records.read(results / name)[0] if (results / name).exists() else [] for name in ("hop.json", "step.json")
    )
    rows = [
        [each.target, each.measured, "yes" if each.met else "no", each.holds] for each in targets.verdicts(hop, step)
    ]
    return markdown(["target", "measured", "met", "largest stages of what is missed"], rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _us(record: Record, key: str = "p50_us") -> str:
    value = record[key]
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _ratio(record: Record, key: str = "ratio") -> str:
    return f"{record[key]:.2f} ({record[key + '_min']:.2f}..{record[key + '_max']:.2f})"


TABLES: dict[str, tuple[str, Callable[[list[Record]], str]]] = {
    "hop": ("hop.json", hop_table),
    "step": ("step.json", step_table),
    "stages": ("step.json", stage_table),
    "network": ("network.json", network_table),
    "published": ("planning_published.json", lambda found: planning_tables.published_table(found, markdown)),
    "planning": ("planning.json", lambda found: planning_tables.planning_table(found, markdown)),
    "autoscaling": ("autoscaling.json", lambda found: planning_tables.autoscaling_table(found, markdown)),
    "burst": ("burst.json", lambda found: planning_tables.burst_table(found, markdown)),
    "ingress": ("ingress.json", ingress_table),
    "layers": ("ingress_layers.json", layers_table),
    "routing": ("routing.json", routing_table),
    "engram": ("engram.json", engram_table),
    "kv_cache": ("kv_cache.json", kv_cache_table),
    "chats": ("kv_cache.json", chats_table),
}
"""Name in the document -> (file of results, what makes it)."""

if __name__ == "__main__":
    main()
