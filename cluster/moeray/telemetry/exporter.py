"""Where Prometheus reads a process' metrics."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from wsgiref.simple_server import WSGIServer

from prometheus_client import REGISTRY, CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moeray.config.telemetry import NUM_METRICS_PORTS, TelemetryConfig
from moeray.telemetry.families import Family, Kind
from moeray.telemetry.members import Sample

logger = logging.getLogger(__name__)


class SampleCollector(Collector):
    """Asks for samples at each scrape, in the exporter's thread: `sample` reads what others only replace."""

    def __init__(self, sample: Callable[[], Iterable[Sample]]) -> None:
        self._sample = sample

    def describe(self) -> Iterator[Metric]:
        """Nothing: a registry would ask for the samples to learn the names."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """A counter or gauge for each family that has samples."""
        samples = sorted(self._sample(), key=lambda each: each.family.name)
        for family, found in groupby(samples, key=lambda each: each.family):
            metric = _metric(family)
            for each in found:
                metric.add_metric(each.labels, each.value)
            yield metric


class ProcessCollector(Collector):
    """What libraries count in this process' default registry: its memory and threads, and vLLM's own."""

    def describe(self) -> Iterator[Metric]:
        """Nothing: they come and go."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Theirs."""
        yield from REGISTRY.collect()


def _metric(family: Family) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if family.kind is Kind.COUNTER else GaugeMetricFamily
    return kind(family.name, family.help, labels=family.labels)


@dataclass(frozen=True, slots=True)
class Exporter:
    """A port at which a registry can be read, by a thread of its own."""

    address: str
    _server: WSGIServer

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def start_exporter(config: TelemetryConfig, registry: CollectorRegistry) -> Exporter | None:
    """Serve `registry` at the first free port; None where `telemetry.metrics_port` is 0, or no port is free.

    A process whose numbers cannot be read is of use all the same, so that is only logged.
    """
    if not config.metrics_port:
        return None
    for port in range(config.metrics_port, config.metrics_port + NUM_METRICS_PORTS):
        try:
            server, _ = start_http_server(port, config.metrics_host, registry)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            logger.error("telemetry.metrics_host: no metrics of this process at %s: %s", config.metrics_host, error)
            return None
        return Exporter(f"{config.metrics_host}:{port}", server)
    last = config.metrics_port + NUM_METRICS_PORTS - 1
    logger.error("telemetry.metrics_port: %d to %d are taken: no metrics of this process", config.metrics_port, last)
    return None
