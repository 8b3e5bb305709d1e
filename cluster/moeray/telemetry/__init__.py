"""What Prometheus sees of a cluster: the list of its metrics, how reports become samples, the port that shows them."""

from moeray.telemetry.exporter import Exporter, ProcessCollector, SampleCollector, start_exporter
from moeray.telemetry.families import FAMILIES, MAX_TENANTS, Family, Kind, known_series
from moeray.telemetry.members import Sample, samples_of
from moeray.telemetry.requests import RequestMetrics

__all__ = [
    "FAMILIES",
    "MAX_TENANTS",
    "Exporter",
    "Family",
    "Kind",
    "ProcessCollector",
    "RequestMetrics",
    "Sample",
    "SampleCollector",
    "known_series",
    "samples_of",
    "start_exporter",
]
