"""`moeray bench` against a running cluster: over HTTP, over gRPC, and two servers in one run."""

from __future__ import annotations

import json
from pathlib import Path

from clusters import Cluster

LOAD = ("--requests", "12", "--users", "4", "--prompt", "40", "--answer", "16")


def test_both_front_doors_answer_the_same_load(shared_cluster: Cluster, tmp_path: Path) -> None:
    for arguments in ((), ("--grpc",), ("--rate", "20", "--users", "0")):
        out, page = tmp_path / "run.json", tmp_path / "run.html"
        done = shared_cluster.moeray("bench", *LOAD, *arguments, "--json", str(out), "--html", str(page))
        assert done.returncode == 0, done.stderr
        [found] = json.loads(out.read_text(encoding="utf-8")).values()
        assert (found["completed"], found["errors"], found["answer_tokens"]) == (12, {}, 12 * 16)
        assert 30 * 12 <= found["prompt_tokens"] <= 55 * 12 and found["ttft_ms"]["p50"] < found["e2e_ms"]["p50"]
        assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_server_is_compared_with_another_one(shared_cluster: Cluster) -> None:
    same = shared_cluster.http.replace("127.0.0.1", "localhost")
    done = shared_cluster.moeray("bench", *LOAD, "--compare", same)
    assert done.returncode == 0 and f"{same} over {shared_cluster.http}" in done.stdout, done.stderr


def test_wrong_loads_are_refused_by_their_option(shared_cluster: Cluster, tmp_path: Path) -> None:
    for arguments, said in (
        (("--shared", "50", "--prompt", "10"), "--shared"),
        (("--rate", "0"), "--rate, --burstiness"),
        (("--trace", str(tmp_path / "none")), "--trace"),
        (("--url", shared_cluster.http, "--grpc"), "--grpc: with --url"),
    ):
        done = shared_cluster.moeray("bench", *arguments)
        assert done.returncode == 2 and said in done.stderr, done.stderr
