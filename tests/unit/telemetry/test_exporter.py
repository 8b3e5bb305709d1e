"""The port of a process, as Prometheus reads it: with its own parser."""

from __future__ import annotations

import socket
import threading
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from moeray.config import TelemetryConfig
from moeray.telemetry import Exporter, ProcessCollector, Sample, SampleCollector, start_exporter
from moeray.telemetry import families as f


def scraped(address: str) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return {
        f"{sample.name}{sample.labels or ''}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def exporters() -> Iterator[list[Exporter]]:
    started: list[Exporter] = []
    yield started
    for each in started:
        each.stop()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def start(exporters: list[Exporter], port: int, registry: CollectorRegistry) -> Exporter:
    started = start_exporter(TelemetryConfig(metrics_port=port), registry)
    assert started is not None
    exporters.append(started)
    return started


def test_samples_of_now_are_read_at_each_scrape(exporters: list[Exporter]) -> None:
    now = [Sample(f.HOP_CALLS, ("attention_shard", "0"), 3), Sample(f.GENERATION, (), 1)]
    registry = CollectorRegistry()
    registry.register(SampleCollector(lambda: now))
    registry.register(ProcessCollector())
    address = start(exporters, free_port(), registry).address
    found = scraped(address)
    assert found["moeray_hop_calls_total{'index': '0', 'role': 'attention_shard'}"] == 3
    assert found["moeray_generation"] == 1
    assert found["process_resident_memory_bytes"] > 0
    now[1] = Sample(f.GENERATION, (), 2)
    assert scraped(address)["moeray_generation"] == 2


def test_each_process_of_a_node_takes_the_next_free_port(exporters: list[Exporter]) -> None:
    port = free_port()
    first = start(exporters, port, CollectorRegistry())
    second = start(exporters, port, CollectorRegistry())
    assert first.address == f"127.0.0.1:{port}"
    assert int(second.address.rpartition(":")[2]) > port


def test_it_is_the_address_of_the_configuration_that_is_bound(exporters: list[Exporter]) -> None:
    started = start_exporter(TelemetryConfig(metrics_host="127.0.0.2", metrics_port=free_port()), CollectorRegistry())
    assert started is not None
    exporters.append(started)
    host, _, port = started.address.rpartition(":")
    scraped(started.address)
    assert host == "127.0.0.2"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(port)), timeout=5)


def test_where_nothing_can_be_bound_the_process_goes_on_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    config = TelemetryConfig(metrics_host="192.0.2.1", metrics_port=9464)  # nobody's address (RFC 5737)
    assert start_exporter(config, CollectorRegistry()) is None
    assert "telemetry.metrics_host" in caplog.text


def test_port_0_shows_nothing() -> None:
    before = threading.active_count()
    assert start_exporter(TelemetryConfig(metrics_port=0), CollectorRegistry()) is None
    assert threading.active_count() == before


def test_a_stopped_exporter_gives_its_port_back(exporters: list[Exporter]) -> None:
    port = free_port()
    started = start_exporter(TelemetryConfig(metrics_port=port), CollectorRegistry())
    assert started is not None
    started.stop()
    assert start(exporters, port, CollectorRegistry()).address == started.address
