"""`moeray demo`: the whole way once, on this machine, without a question; what `make demo` runs."""

from __future__ import annotations

import dataclasses
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moeray.cli.chat import ask_grpc, ask_http
from moeray.cli.connection import cluster_state
from moeray.cli.errors import CommandError
from moeray.cli.preflight import preflight
from moeray.cli.status import render, us_per_call
from moeray.cli.up import running
from moeray.config import ClusterConfig, load_config
from moeray.ingress.ports import free_ports

OVER_GRPC = "What is an expert group?"
OVER_HTTP = "What is an attention shard?"
START_S = 300.0
REPORT_WAIT_S = 1.5  # processes publish their counters twice a second


def demo(file: Path | None) -> int:
    config = _with_free_ports(load_config(file))
    os.environ.pop("RAY_ADDRESS", None)  # a demo brings its own Ray and touches no cluster that is there
    with tempfile.TemporaryDirectory(prefix="moeray-demo-") as folder:
        os.environ["MOERAY_STATE_DIR"] = folder
        return _demo(config, file)


def _demo(config: ClusterConfig, file: Path | None) -> int:
    if config.tenants.needs_credential or config.ingress.tls.is_on:
        raise CommandError(
            f"{file}: the demo asks without a key and without TLS; use `moeray up -f {file}` and `moeray chat` "
            "with MOERAY_API_KEY, --ca-file",
            status=2,
        )
    preflight(config)
    print("starting 1 ingress, 2 attention shards, 2 expert groups on embedded Ray (loopback only; no TLS, no API keys)"
          if file is None else f"starting the cluster of {file}", flush=True)  # fmt: skip
    with running(config, START_S) as cluster:
        time.sleep(REPORT_WAIT_S)
        before = cluster_state()
        print(f"\n{render(before)}\n")
        _ask("gRPC", OVER_GRPC, ask_grpc(cluster.grpc, OVER_GRPC))
        _ask("HTTP", OVER_HTTP, ask_http(cluster.http, OVER_HTTP))
        time.sleep(REPORT_WAIT_S)
        _print_work(before, cluster_state())
    print("stopped")
    return 0


def _ask(protocol: str, question: str, pieces: Iterator[str]) -> None:
    print(f"[{protocol}] > {question}\n[{protocol}] < ", end="", flush=True)
    started = time.perf_counter()
    arrivals = []
    for piece in pieces:
        arrivals.append(time.perf_counter())
        print(piece, end="", flush=True)
    if not arrivals:
        raise CommandError(f"the answer over {protocol} was empty")
    first_ms = (arrivals[0] - started) * 1e3
    each_ms = (arrivals[-1] - arrivals[0]) * 1e3 / max(1, len(arrivals) - 1)
    print(f"\n       first token after {first_ms:.0f} ms, then {each_ms:.1f} ms per token ({len(arrivals)} pieces)\n")


def _print_work(before: dict[str, Any], state: dict[str, Any]) -> None:
    """What the two answers took; what shards sent to measure themselves when they connected is left out."""
    groups = [process for process in state["processes"] if process["role"] == "expert_group"]
    known = {process["id"]: process.get("experts", {}).get("routed_tokens", 0) for process in before["processes"]}
    routed = {group["id"]: group["experts"]["routed_tokens"] - known.get(group["id"], 0) for group in groups}
    total = sum(routed.values()) or 1
    print("routed tokens per expert group (a token counts once per expert it visits, per layer):")
    for group in groups:
        share = routed[group["id"]] / total
        print(f"  group {group['index']}: {routed[group['id']]:7d}  {'#' * round(40 * share)} {share:.0%}")
    for shard in (process for process in state["processes"] if process["role"] == "attention_shard"):
        if (hop := shard.get("hop")) and hop["calls"]:
            print(f"  shard {shard['index']}: {hop['calls']} layer calls over the hop, {us_per_call(hop):.0f} us each")


def _with_free_ports(config: ClusterConfig) -> ClusterConfig:
    """The configured ports, or free ones where something else has them: a demo asks nothing and disturbs nobody."""
    ingress = config.ingress
    http_port = _free_port(ingress.host, ingress.http_port)
    grpc_port = _free_port(ingress.host, ingress.grpc_port)
    for key, wanted, port in (("http", ingress.http_port, http_port), ("grpc", ingress.grpc_port, grpc_port)):
        if port != wanted:
            print(f"port {wanted} is taken, the demo uses {port} as ingress.{key}_port")
    ingress = dataclasses.replace(ingress, http_port=http_port, grpc_port=grpc_port)
    return dataclasses.replace(config, ingress=ingress)


def _free_port(host: str, wanted: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, wanted))
        except OSError:
            return free_ports(host, 1)[0]
    return wanted
