"""The catalogue of devices: data/hardware.yaml, each constant with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from moeray.planning.formats import WIDER, FormatName

GB = 1e9


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device.

    Attributes:
        memory, host_memory: bytes; the host's is its share of a node's.
        bandwidth: of its memory, bytes/s.
        tflops: by arithmetic, 1e12/s.
        near, far: bytes/s each way, to devices of its domain and to others.
        domain: devices that are near each other.
        near_us, far_us: of one message, one way.
        price: per hour.
    """

    name: str
    memory: float
    host_memory: float
    bandwidth: float
    tflops: Mapping[str, float] = field(repr=False)
    near: float
    far: float
    domain: int
    near_us: float
    far_us: float
    price: float

    def flops(self, arithmetic: FormatName) -> float:
        """Per second in this arithmetic, or in the next wider one that there is."""
        wanted: FormatName | None = arithmetic
        while wanted is not None:
            if wanted in self.tflops:
                return 1e12 * self.tflops[wanted]
            wanted = WIDER.get(wanted)
        return 1e12 * max(self.tflops.values())  # nothing wider: what there is computes it

    def link(self, devices: int) -> tuple[float, float]:
        """Between devices that so many share: bytes/s each way, and microseconds of a message."""
        return (self.near, self.near_us) if devices <= self.domain else (self.far, self.far_us)


@cache
def sources() -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """Device -> constant -> value and source."""
    text = (files("moeray.planning") / "data" / "hardware.yaml").read_text(encoding="utf-8")
    found: Mapping[str, Mapping[str, Mapping[str, Any]]] = yaml.safe_load(text)
    return found


@cache
def catalogue() -> Mapping[str, Hardware]:
    """All devices by name."""
    return {name: _device(name, constants) for name, constants in sources().items()}


def _device(name: str, constants: Mapping[str, Mapping[str, Any]]) -> Hardware:
    value = {key: constant["value"] for key, constant in constants.items()}
    near_us, far_us = value["hop_us"]
    return Hardware(
        name=name,
        memory=GB * value["memory"],
        host_memory=GB * value["host_memory"],
        bandwidth=GB * value["bandwidth"],
        tflops={key.removesuffix("_tflops"): each for key, each in value.items() if key.endswith("_tflops")},
        near=GB * value["near"],
        far=GB * value["far"],
        domain=value["domain"],
        near_us=near_us,
        far_us=far_us,
        price=value["price"],
    )
