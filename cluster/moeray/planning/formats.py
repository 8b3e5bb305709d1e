"""How many bytes a value takes: weights by format with their scales, cached keys and values, messages of the hop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

FormatName = Literal["float32", "bf16", "fp8", "fp4", "int4"]


@dataclass(frozen=True, slots=True)
class Format:
    """Of weights.

    Attributes:
        bytes_each: with scales.
        computed: the hardware's arithmetic, where it has it; else the next wider one (`Hardware.flops`).
    """

    bytes_each: float
    computed: FormatName


FORMATS: Mapping[FormatName, Format] = {
    "float32": Format(4.0, "float32"),
    "bf16": Format(2.0, "bf16"),
    "fp8": Format(1 + 4 / (128 * 128), "fp8"),  # a float32 scale per block of 128 x 128
    "fp4": Format(0.5 + 1 / 32, "fp4"),  # e2m1, an e8m0 scale per 32
    "int4": Format(0.5 + 2 / 128, "bf16"),  # bf16 scales per 128; kernels compute in bf16
}

WIDER: Mapping[FormatName, FormatName] = {"fp4": "fp8", "int4": "bf16", "fp8": "bf16", "bf16": "float32"}


@dataclass(frozen=True, slots=True)
class Formats:
    """Of one served model.

    Attributes:
        routed: of routed experts.
        other: of all other matrices; embedding, head, router and hyper-connections stay in bf16 where this is fp8.
        kv_bytes: per cached value. vLLM's FP8 entry of 512 values is 584 bytes (448 in FP8, 64 in bf16, 8 of scales).
        index_bytes: per value by which entries are chosen; FP8 with a scale of four bytes per 128.
        dispatch_bytes, combine_bytes: per value of a row on its way to the experts, and back.
    """

    routed: FormatName = "bf16"
    other: FormatName = "bf16"
    kv_bytes: float = 2.0
    index_bytes: float = 2.0
    dispatch_bytes: float = 2.0
    combine_bytes: float = 2.0


KV_BYTES: Mapping[str, tuple[float, float]] = {
    "float32": (4.0, 4.0),
    "bf16": (2.0, 2.0),
    "fp8": (584 / 512, 132 / 128),
}
"""Name -> `Formats.kv_bytes`, `Formats.index_bytes`."""
