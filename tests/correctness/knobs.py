"""The knobs a DeepSeek-V4 checkpoint can turn in its MoE layers, and the values that are measured.

Each entry is one random checkpoint: the keys are those of `write_random_checkpoint`, for the most part of config.json.
Values are paired, not multiplied: every value occurs, and values that meet in one line of code occur together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Knobs:
    """One checkpoint; `num_groups` slices of its experts."""

    changes: Mapping[str, Any]
    num_groups: int = 2
    quick: bool = field(default=False, kw_only=True)

    def __str__(self) -> str:
        words = [f"{key}={value}" for key, value in self.changes.items()] or ["defaults"]
        return " ".join([*words, f"groups={self.num_groups}"]).replace("num_experts_per_tok", "top_k")


MATRIX = (
    Knobs({"num_experts_per_tok": 1, "num_hash_layers": 0}, quick=True),
    Knobs({"num_experts_per_tok": 16, "n_routed_experts": 17, "n_shared_experts": 2}, 3, quick=True),
    Knobs({"n_shared_experts": 0, "swiglu_limit": 0.0, "num_hash_layers": 4, "engram": False}, 4, quick=True),
    Knobs({"dtype": "float32", "num_files": 3, "routed_scaling_factor": 2.5, "swiglu_limit": 0.5}, 1, quick=True),
    Knobs({}),
    Knobs({"num_experts_per_tok": 3, "num_hash_layers": 1}),
    Knobs({"num_experts_per_tok": 6, "n_routed_experts": 24}, 5),
    Knobs({"num_experts_per_tok": 8, "n_routed_experts": 256, "moe_intermediate_size": 32}, 4),
    Knobs({"num_experts_per_tok": 16, "n_routed_experts": 16, "num_hash_layers": 4}),
    Knobs({"num_experts_per_tok": 1, "n_routed_experts": 17, "num_hash_layers": 4}, 4),
    Knobs({"n_routed_experts": 17, "num_hash_layers": 0, "engram": False}, 4),
    Knobs({"routed_scaling_factor": 1.0, "n_shared_experts": 0}),
    Knobs({"routed_scaling_factor": 2.5, "n_shared_experts": 2}),
    Knobs({"swiglu_limit": None, "n_shared_experts": 1}),
    Knobs({"swiglu_limit": 10.0, "n_shared_experts": 2}),
    Knobs({"swiglu_limit": 1, "num_experts_per_tok": 4}),
    Knobs({"dtype": "float32", "n_shared_experts": 0, "num_experts_per_tok": 5}, 3),
    Knobs({"dtype": "float32", "engram": False, "num_hash_layers": 0}),
    Knobs({"num_files": 5, "compress_ratios": [0, 4, 128]}),
    Knobs({"compress_ratios": [128, 4], "engram": False, "num_hash_layers": 1}),
)
