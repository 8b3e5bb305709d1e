"""cluster.yaml's `telemetry`: what can be seen of a running cluster, and from where."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from moeray.config.fields import FROM_FILE

NUM_METRICS_PORTS = 64
"""Processes of one node that can have a port each."""


@dataclass(frozen=True, config=FROM_FILE)
class TelemetryConfig:
    """Numbers for Prometheus.

    Attributes:
        metrics_host: the address at which every process of the cluster shows its metrics, to everybody who reaches it.
        metrics_port: each process of a node takes the first free port from this one on, of 64; 0 shows them nowhere
            but at the ingress' own HTTP port.
    """

    metrics_host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    metrics_port: Annotated[int, Field(strict=True, ge=0, le=65535 - NUM_METRICS_PORTS)] = 9464
