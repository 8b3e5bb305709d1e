"""Checkpoints of the published shapes are understood, and planned over many groups, from their headers alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from published_checkpoints import CONFIGS, V4_PRO, num_bytes, tensors, write_published

from moeray.deepseek_v4 import Checkpoint, RoutedExperts
from moeray.deepseek_v4.inspection import inspect
from moeray.deepseek_v4.loading_plan import plan_loading
from moeray.placement import Placement, PlacementError, contiguous


def text(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("text_config", config)


def spread(config: dict[str, Any], num_groups: int, num_redundant: int = 0) -> Placement:
    return contiguous(
        generation=1,
        num_layers=text(config)["num_hidden_layers"],
        num_experts=text(config)["n_routed_experts"],
        num_groups=num_groups,
        num_redundant=num_redundant,
    )


@pytest.fixture(scope="module")
def pro(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_published(tmp_path_factory.mktemp("pro"), V4_PRO))


@pytest.mark.parametrize("name", ["V4-Flash", "V4.1-Flash", "1T"])
def test_a_published_shape_fits_and_every_byte_of_it_has_a_role(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    checkpoint = Checkpoint.open(write_published(tmp_path, config))
    found = inspect(checkpoint)
    assert found.problems == ()
    assert found.num_bytes == sum(num_bytes(tensor) for tensor in tensors(config))
    assert "other" not in found.roles
    experts = found.roles["routed experts"]
    layers, count = text(config)["num_hidden_layers"], text(config)["n_routed_experts"]
    assert (
        experts.num_values == layers * count * 3 * text(config)["hidden_size"] * text(config)["moe_intermediate_size"]
    )
    assert set(experts.formats) == {"FP4 1x32 E8M0"}
    block = text(config)["quantization_config"]["weight_block_size"][0]
    assert f"FP8 {block}x{block} E8M0" in found.roles["attention"].formats
    assert ("Engram tables" in found.roles) == ("engram_layer_ids" in text(config))
    assert checkpoint.shape.top_k == text(config)["num_experts_per_tok"]
    assert found.cpu_problems == ()


@pytest.mark.parametrize("num_redundant", [0, 64])
def test_v4_pro_over_64_groups_loads_every_expert_exactly_once_per_copy(pro: Checkpoint, num_redundant: int) -> None:
    placement = spread(V4_PRO, 64, num_redundant)
    loads = plan_loading(pro, placement)
    copies = Counter(
        (layer, expert)
        for group in range(64)
        for layer in range(61)
        for expert in placement.experts_of_group(group, layer)
    )
    assert len(copies) == 61 * 384
    assert Counter(copies.values()) == Counter(
        {1: 61 * (384 - num_redundant), 2: 61 * num_redundant} if num_redundant else {1: 61 * 384}
    )
    one_expert = sum(pro.expert_matrix(0, 0, part).num_bytes for part in ("w1", "w2", "w3"))
    assert one_expert == 3 * (7168 * 3072 // 2 + 7168 * 3072 // 32)
    assert sum(load.num_bytes for load in loads) == 61 * (384 + num_redundant) * one_expert
    for load in loads:
        assert load.num_bytes == load.num_experts * one_expert
        assert load.value_bytes == load.num_experts * 3 * 7168 * 3072 * 2
        assert load.num_experts == 61 * (7 if load.group < num_redundant else 6)


def test_the_groups_byte_ranges_are_disjoint_and_are_the_experts_bytes(pro: Checkpoint) -> None:
    placement = spread(V4_PRO, 64)
    names = [
        name
        for group in range(64)
        for layer in pro.shape.moe_layers
        for name in pro.expert_names(layer, placement.experts_of_group(group, layer))
    ]
    assert len(names) == len(set(names))
    assert set(names) == {name for name in pro.tensors if pro.is_routed_expert(name)}


def test_a_group_of_v4_pros_shape_reads_what_was_planned_and_nothing_else(pro: Checkpoint) -> None:
    held = {60: (383,)}
    planned = sum(pro.expert_matrix(60, 383, part).num_bytes for part in ("w1", "w2", "w3"))
    experts = RoutedExperts.load(pro, held)
    assert experts.bytes_read == planned == pro.bytes_of(pro.expert_names(60, (383,)))
    assert experts.weight_bytes == 3 * 7168 * 3072 * 2


def test_a_groups_bytes_lie_in_few_runs(pro: Checkpoint) -> None:
    """In the files an expert's tensors lie side by side, and so do neighbouring experts."""
    loads = plan_loading(pro, spread(V4_PRO, 64))
    assert max(load.num_runs for load in loads) <= 61 + max(load.num_files for load in loads)


def test_a_placement_of_another_model_is_refused(pro: Checkpoint) -> None:
    with pytest.raises(PlacementError, match=r"43 layers of 256 experts.*61 layers of 384 experts"):
        plan_loading(pro, spread(CONFIGS["V4-Flash"], 2))
