"""What an ingress counts, and that no client can make it count without end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeray.telemetry import MAX_TENANTS, RequestMetrics
from moeray.telemetry.families import OTHER_TENANTS


def value(metrics: RequestMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def end(metrics: RequestMetrics, tenant: str = "", code: str = "200", seconds: float = 0.2) -> None:
    metrics.ended(tenant=tenant, protocol="http", endpoint="/v1/chat/completions", code=code, seconds=seconds)


def test_a_request_is_counted_with_its_code_and_its_time() -> None:
    metrics = RequestMetrics("m")
    end(metrics, "a")
    end(metrics, "a", code="503", seconds=0.04)
    who = {"model": "m", "tenant": "a", "protocol": "http"}
    for code in ("200", "503"):
        labels = {**who, "endpoint": "/v1/chat/completions", "code": code}
        assert value(metrics, "moeray_requests_total", **labels) == 1
    assert value(metrics, "moeray_request_seconds_count", **who) == 2
    assert value(metrics, "moeray_request_seconds_bucket", le="0.05", **who) == 1
    assert value(metrics, "moeray_request_seconds_sum", **who) == pytest.approx(0.24)


def test_first_tokens_and_later_ones_are_different_times() -> None:
    metrics = RequestMetrics("m")
    metrics.placed(0.5, 100)
    metrics.answered(0.3, 1, 64)
    metrics.answered(0.04, 2, None)
    assert value(metrics, "moeray_queue_seconds_sum", model="m") == 0.5
    assert value(metrics, "moeray_ttft_seconds_sum", model="m") == 0.3
    assert value(metrics, "moeray_tpot_seconds_count", model="m") == 2
    assert value(metrics, "moeray_tpot_seconds_sum", model="m") == 0.04
    tokens = {
        kind: value(metrics, "moeray_tokens_total", model="m", kind=kind) for kind in ("prompt", "cached", "answer")
    }
    assert tokens == {"prompt": 100, "cached": 64, "answer": 3}


def test_what_tenants_took_and_were_refused() -> None:
    metrics = RequestMetrics("m")
    metrics.charged("a", {"prompt": 3, "answer": 4})
    metrics.quota_refused("a", "tokens_per_minute")
    metrics.replayed()
    assert value(metrics, "moeray_tenant_tokens_total", model="m", tenant="a", kind="answer") == 4
    assert value(metrics, "moeray_quota_rejections_total", tenant="a", limit="tokens_per_minute") == 1
    assert value(metrics, "moeray_replays_total", model="m") == 1


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(max_size=8), min_size=MAX_TENANTS * 3, max_size=MAX_TENANTS * 4))
def test_tenants_have_few_labels_however_many_there_are(tenants: list[str]) -> None:
    metrics = RequestMetrics("m")
    for tenant in tenants:
        end(metrics, tenant)
    counted = [s for m in metrics.registry.collect() for s in m.samples if s.name == "moeray_requests_total"]
    assert len(counted) <= MAX_TENANTS + 2  # nobody's, and the others'
    assert sum(each.value for each in counted) == len(tenants)
    if len(set(tenants) - {""}) > MAX_TENANTS:
        assert OTHER_TENANTS in {each.labels["tenant"] for each in counted}
