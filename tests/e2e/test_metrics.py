"""What Prometheus reads of a running cluster, at the port of every process and at the ingress."""

from __future__ import annotations

import urllib.request
from collections import defaultdict
from typing import Any

from clusters import Cluster
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from moeray.telemetry import FAMILIES, known_series

AT_NEED = {
    "moeray_quota_rejections_total", "moeray_tenant_tokens_total",  # with tenants
    "moeray_scaling_decisions_total",  # with autoscaling
    "moeray_engram_rows_sent_total",  # with row servers
}  # fmt: skip


def scraped(url: str) -> list[Sample]:
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def everything(cluster: Cluster) -> dict[str, list[Sample]]:
    """Samples of all processes, by metric."""
    found = defaultdict(list)
    processes = [each for each in cluster.status()["processes"] if each["role"] != "controller"]
    assert all("metrics" in each for each in processes)
    for process in processes:
        for sample in scraped(f"http://{process['metrics']}/metrics"):
            found[sample.name].append(sample)
    return found


def total(samples: list[Sample], **labels: str) -> float:
    return sum(each.value for each in samples if labels.items() <= each.labels.items())


def ask(cluster: Cluster, **more: Any) -> dict[str, Any]:
    prompt = {"model": "moeray-tiny", "prompt": "one two three four", "max_tokens": 8, "ignore_eos": True}
    status, answer = cluster.post("/v1/completions", prompt | more)
    assert status == 200, answer
    usage: dict[str, Any] = answer["usage"]
    return usage


def test_every_process_shows_what_it_counts_under_the_names_that_are_listed(shared_cluster: Cluster) -> None:
    ask(shared_cluster, stream=False)
    found = everything(shared_cluster)
    ours = {name for name in found if name.startswith("moeray_") and not name.endswith("_created")}
    assert ours <= known_series(), "not in moeray.telemetry.families"
    listed = {name for family in FAMILIES if family.name not in AT_NEED for name in family.series}
    assert listed <= ours, "in the list, and nobody shows it"
    assert total(found["moeray_members"], state="ready") == len(shared_cluster.status()["processes"]) - 1
    assert {each.labels["role"] for each in found["moeray_member_serving"]} == {
        "ingress", "attention_shard", "expert_group",
    }  # fmt: skip
    assert all(each.value == 1 for each in found["moeray_member_serving"])
    assert len(found["process_resident_memory_bytes"]) == len(found["moeray_member_serving"])


def test_what_one_request_adds_is_what_its_answer_tells(shared_cluster: Cluster) -> None:
    ask(shared_cluster)  # whatever happens once has happened
    before = everything(shared_cluster)
    usage = ask(shared_cluster)
    after = everything(shared_cluster)

    def added(name: str, **labels: str) -> float:
        return total(after[name], **labels) - total(before[name], **labels)

    assert added("moeray_requests_total", endpoint="/v1/completions", code="200", protocol="http") == 1
    assert added("moeray_request_seconds_count", protocol="http") == 1
    assert added("moeray_ttft_seconds_count") == 1
    assert added("moeray_tokens_total", kind="answer") == usage["completion_tokens"] == 8
    assert added("moeray_tokens_total", kind="prompt") == usage["prompt_tokens"]
    assert added("moeray_tpot_seconds_count") == 7
    assert 0 < added("moeray_ttft_seconds_sum") <= added("moeray_request_seconds_sum", protocol="http")


def test_the_ingress_shows_its_own_and_vllms_at_its_http_port(shared_cluster: Cluster) -> None:
    ask(shared_cluster)
    names = {sample.name for sample in scraped(f"{shared_cluster.http}/metrics")}
    assert {"moeray_requests_total", "moeray_ttft_seconds_bucket", "moeray_kv_capacity_tokens"} <= names
    assert {name for name in names if name.startswith("vllm:")}, "vLLM's front counts nothing here any more"


def test_a_hop_is_counted_by_the_shards_and_by_the_groups(shared_cluster: Cluster) -> None:
    before = everything(shared_cluster)
    ask(shared_cluster, max_tokens=32)
    after = everything(shared_cluster)
    for name in ("moeray_hop_calls_total", "moeray_hop_seconds_total", "moeray_steps_total",
                 "moeray_expert_calls_total", "moeray_expert_layer_tokens_total"):  # fmt: skip
        assert total(after[name]) > total(before[name]), name
    assert total(after["moeray_generation"]) == shared_cluster.status()["generation"]
