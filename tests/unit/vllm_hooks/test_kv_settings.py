"""Blocks of a namespace have the same bytes: whatever may change them is part of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from moeray.vllm_hooks import kv_settings
from moeray.vllm_hooks.kv_settings import computed_by, namespace


@dataclass
class Parallel:
    rank: int = 0
    data_parallel_index: int = 0
    data_parallel_rank_local: int = 0
    tensor_parallel_size: int = 1


@dataclass
class Offloading:
    groups: list[Any] = field(default_factory=lambda: [SimpleNamespace(tokens_per_block=64, layer_names=["a"])])
    model: Any = field(default_factory=lambda: SimpleNamespace(dtype="bfloat16"))
    kv_cache_layout: str = "NHD"
    parallel: Parallel = field(default_factory=Parallel)


def test_ranks_of_one_shard_and_two_processes_share_a_namespace() -> None:
    assert namespace(Offloading(), 10, {"model": "m"}) == namespace(
        Offloading(parallel=Parallel(3)), 10, {"model": "m"}
    )


@pytest.mark.parametrize("part", ["moeray", "vllm", "torch", "device"])
def test_another_version_or_processor_has_a_namespace_of_its_own(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here, before = computed_by(), namespace(Offloading(), 10, {})
    assert here[part]
    monkeypatch.setattr(kv_settings, "computed_by", lambda: here | {part: "another"})
    assert namespace(Offloading(), 10, {}) != before


@pytest.mark.parametrize(
    "other", [Offloading(kv_cache_layout="HND"), Offloading(model=SimpleNamespace(dtype="float32")),
              Offloading(parallel=Parallel(tensor_parallel_size=2)), Offloading(groups=[])],
)  # fmt: skip
def test_another_form_of_the_cache_has_a_namespace_of_its_own(other: Offloading) -> None:
    assert namespace(other, 10, {}) != namespace(Offloading(), 10, {})


def test_another_size_or_content_has_a_namespace_of_its_own() -> None:
    assert len({namespace(Offloading(), size, content) for size in (10, 11) for content in ({}, {"model": "m"})}) == 4
