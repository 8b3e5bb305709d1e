"""Write the chart's Grafana dashboards: rows of panels, each a question and its queries.

python helm/dashboards.py            write them
python helm/dashboards.py --check    say which are out of date, and fail
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "moeray" / "monitoring" / "dashboards"
HERE = 'namespace="$namespace", moeray_io_release="$release"'
"""What every query selects by; `<>` in a query stands for it."""
WIDTH, HEIGHT = 24, 8
SOURCE = {"type": "prometheus", "uid": "$datasource"}


@dataclass(frozen=True, slots=True)
class Panel:
    """One question.

    Attributes:
        queries: PromQL -> legend.
        unit: Grafana's name of it.
        kind: Grafana's panel type.
    """

    title: str
    queries: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    about: str = ""


def quantiles(metric: str) -> dict[str, str]:
    """p50, p95 and p99 of a histogram."""
    of_all = f"sum by (le) (rate({metric}_bucket{{<>}}[$__rate_interval]))"
    return {f"histogram_quantile({q}, {of_all})": f"p{100 * q:g}" for q in (0.5, 0.95, 0.99)}


def rates(metric: str, by: str = "", more: str = "") -> str:
    """Per second, added up over all processes but for the labels `by`."""
    return f"sum{f' by ({by}) ' if by else ''}(rate({metric}{{<>{more}}}[$__rate_interval]))"


CACHED = rates("moeray_tokens_total", more=', kind="cached"')
PROMPTS = rates("moeray_tokens_total", more=', kind="prompt"')

REQUESTS = {
    "Requests": [
        Panel("Requests by code", {rates("moeray_requests_total", "protocol, code"):
              "{{protocol}} {{code}}"}, "reqps"),
        Panel("Requests by tenant", {rates("moeray_requests_total", "tenant"): "{{tenant}}"},
              "reqps"),
        Panel("Duration", quantiles("moeray_request_seconds"), "s"),
    ],
    "Waiting": [
        Panel("Time to the first token", quantiles("moeray_ttft_seconds"), "s"),
        Panel("Time between tokens", quantiles("moeray_tpot_seconds"), "s"),
        Panel("Time until a shard has it", quantiles("moeray_queue_seconds"), "s"),
    ],
    "Tokens": [
        Panel("Tokens", {rates("moeray_tokens_total", "kind"): "{{kind}}"}, "tps"),
        Panel("Tokens by tenant", {
            rates("moeray_tenant_tokens_total", "tenant, kind"): "{{tenant}} {{kind}}"}, "tps"),
        Panel("Refused by limits", {
            rates("moeray_quota_rejections_total", "tenant, limit"): "{{tenant}} {{limit}}"},
            "reqps"),
    ],
    "How full": [
        Panel("Sequences", {"sum(moeray_in_flight_sequences{<>})": "in flight", "sum(moeray_waiting_sequences{<>})":
              "without a shard", 'sum(moeray_shard_sequences{<>, state="waiting"})': "waiting in shards"}),
        Panel("Tokens admitted", {"sum(moeray_admitted_tokens{<>})": "admitted, at most",
              "max(moeray_kv_capacity_tokens{<>})": "KV caches hold"}),
        Panel("Went on elsewhere", {rates("moeray_replays_total"): "replays"}, "reqps",
              about="Requests that went on on another shard after theirs was lost; no client sees it."),
    ],
}  # fmt: skip

CLUSTER = {
    "Cluster": [
        Panel("Generation", {"max(moeray_generation{<>})": "in force"}, kind="stat"),
        Panel("Experts", {"min(moeray_expert_copies_fewest{<>, counted=\"living\"})": "fewest living copies",
              "max(moeray_experts_lost{<>})": "lost"}, kind="stat"),
        Panel("Processes", {"max by (role, state) (moeray_members{<>})": "{{role}} {{state}}"}),
    ],
    "What happened": [
        Panel("Losses", {"max by (role) (increase(moeray_losses_total{<>}[$__rate_interval]))": "{{role}}"}),
        Panel("Wanted", {"max by (pool) (moeray_pool_wanted{<>})": "{{pool}}"}),
        Panel("Scaling decisions", {
            "max by (pool, direction, cause) (increase(moeray_scaling_decisions_total{<>}[$__rate_interval]))":
            "{{pool}} {{direction}}: {{cause}}"}),
    ],
    "The token's way": [
        Panel("Step", {f"{rates('moeray_step_seconds_total', 'index')} / {rates('moeray_steps_total', 'index')}":
              "shard {{index}}"}, "s"),
        Panel("Layer call, by part", {f"{rates('moeray_hop_seconds_total', 'part')} / on () group_left "
              f"{rates('moeray_hop_calls_total')}": "{{part}}"}, "s",
              about="Dispatch, the shared expert meanwhile, and the wait for the groups."),
        Panel("Waited for lost experts", {rates("moeray_hop_stalled_seconds_total", "index"):
              "shard {{index}}"}, "percentunit"),
    ],
    "Experts": [
        Panel("Groups are busy", {rates("moeray_expert_seconds_total", "index"):
              "group {{index}}"}, "percentunit"),
        Panel("Load of groups", {rates("moeray_expert_layer_tokens_total", "index"):
              "group {{index}}"}, about="Token-expert pairs per second, all layers."),
        Panel("The busiest expert's share of its layer", {
            "max by (layer) (rate(moeray_expert_layer_hottest_tokens_total{<>}[$__rate_interval])) / "
            f"{rates('moeray_expert_layer_tokens_total', 'layer')}": "layer {{layer}}"},
            "percentunit"),
    ],
    "Caches": [
        Panel("Tokens of prompts", {
            f"{CACHED} / {PROMPTS}": "found in a cache",
            f"{rates('moeray_kv_fetched_tokens_total')} / {PROMPTS}": "fetched from a tier"}, "percentunit"),
        Panel("KV blocks", {rates("moeray_kv_blocks_total", "tier, what"):
              "{{tier}} {{what}}"}),
        Panel("Engram rows", {rates("moeray_engram_rows_sent_total", "index"):
              "server {{index}}"}, "rowsps"),
    ],
    "Processes": [
        Panel("Memory", {"process_resident_memory_bytes{<>}": "{{pod}} {{instance}}"}, "bytes"),
        Panel("Weights", {"sum by (role, index) (moeray_weight_bytes{<>})": "{{role}} {{index}}"}, "bytes"),
        Panel("CPU", {"rate(process_cpu_seconds_total{<>}[$__rate_interval])": "{{pod}} {{instance}}"}, "percentunit"),
    ],
}  # fmt: skip


def panel_json(panel: Panel, number: int, x: int, y: int, width: int) -> dict[str, Any]:
    """As Grafana stores it."""
    targets = [
        {
            "refId": chr(ord("A") + index),
            "expr": query.replace("<>", HERE),
            "legendFormat": legend,
            "datasource": SOURCE,
        }
        for index, (query, legend) in enumerate(panel.queries.items())
    ]
    return {
        "id": number, "type": panel.kind, "title": panel.title, "description": panel.about, "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": width, "h": HEIGHT}, "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []}, "options": {},
    }  # fmt: skip


def variable(name: str, label: str) -> dict[str, Any]:
    """A choice among the values of a label."""
    query = f"label_values(moeray_member_serving, {label})"
    return {"name": name, "type": "query", "datasource": SOURCE, "query": query, "refresh": 2, "sort": 1}


def dashboard(uid: str, title: str, rows: dict[str, list[Panel]]) -> dict[str, Any]:
    """As Grafana's provisioning reads it."""
    panels: list[dict[str, Any]] = []
    for at, (row, members) in enumerate(rows.items()):
        y = at * (HEIGHT + 1)
        panels.append({"id": len(panels) + 1, "type": "row", "title": row, "collapsed": False, "panels": [],
                       "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}})  # fmt: skip
        width = WIDTH // len(members)
        for place, member in enumerate(members):
            panels.append(panel_json(member, len(panels) + 1, place * width, y + 1, width))
    source = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "data source"}
    variables = [source, variable("namespace", "namespace"), variable("release", "moeray_io_release")]
    return {
        "uid": uid, "title": title, "tags": ["moeray"], "schemaVersion": 39, "version": 1, "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"}, "timezone": "", "editable": True, "graphTooltip": 1,
        "templating": {"list": variables}, "panels": panels,
    }  # fmt: skip


def dashboards() -> dict[str, str]:
    """File name -> text."""
    made = {
        "requests.json": dashboard("moeray-requests", "moeray: requests", REQUESTS),
        "cluster.json": dashboard("moeray-cluster", "moeray: cluster", CLUSTER),
    }
    return {name: json.dumps(content, indent=1) + "\n" for name, content in made.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = 0
    for name, text in dashboards().items():
        path = FOLDER / name
        if path.exists() and path.read_text() == text:
            continue
        stale += 1
        if not check:
            path.write_text(text)
        print(f"{path}: {'out of date: run python helm/dashboards.py' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
