"""Parameters are counted as transformers builds them, and come out as published."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moeray.planning import ShapeError, shape_of
from moeray.planning.formats import FORMATS, KV_BYTES, Formats
from moeray.planning.memory import expert_weights, kv_bytes, shard_weights
from moeray.planning.spec import bundled_models, load_shape
from moeray.tiny import checkpoint_path

MILLION = 1 << 20


def bundled(name: str) -> dict[str, Any]:
    from importlib.resources import files

    text = (files("moeray.planning") / "data" / "models" / f"{name}.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    return config


def tiny() -> dict[str, Any]:
    config: dict[str, Any] = json.loads((checkpoint_path() / "config.json").read_text(encoding="utf-8"))
    return config


@pytest.mark.parametrize("name", [*bundled_models(), "moeray-tiny"])
def test_parameters_are_those_that_transformers_builds(name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV4Config

    config = tiny() if name == "moeray-tiny" else bundled(name)
    kind = DeepseekV3Config if config["model_type"] == "deepseek_v3" else DeepseekV4Config
    keys = {key: value for key, value in config.items() if key != "model_type" and not key.startswith("engram")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(kind(**keys))
    assert shape_of(config, name).parameters == sum(each.numel() for each in model.parameters())


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [  # billions, as the models' cards say
        ("deepseek-v3", 671, 37), ("deepseek-v4-flash", 284, 13), ("deepseek-v4-pro", 1600, 49),
        ("moe-1t-a32b", 1000, 32),
    ],
)  # fmt: skip
def test_parameters_are_as_published(name: str, total: float, active: float) -> None:
    shape = load_shape(name)
    assert shape.parameters / 1e9 == pytest.approx(total, rel=0.03)
    assert shape.active_parameters / 1e9 == pytest.approx(active, rel=0.08)


def test_kv_of_a_million_tokens_is_as_published() -> None:
    assert kv_bytes(load_shape("deepseek-v4-pro"), Formats(), MILLION) / 2**30 == pytest.approx(9.62, rel=0.005)


@pytest.mark.parametrize(("name", "gigabytes"), [("deepseek-v4-flash", 160), ("deepseek-v4-pro", 865)])
def test_weights_are_as_large_as_the_downloads(name: str, gigabytes: float) -> None:
    """Within 5 %: a download has a draft layer, too."""
    shape, formats = load_shape(name), Formats(routed="fp4", other="fp8")
    assert (shard_weights(shape, formats) + expert_weights(shape, formats, 1)) / 1e9 == pytest.approx(
        gigabytes, rel=0.05
    )


def test_what_ranks_hold_is_together_at_least_the_whole() -> None:
    shape, formats = load_shape("deepseek-v3"), Formats(routed="fp8", other="fp8")
    for ranks in (2, 8, 32):
        assert ranks * shard_weights(shape, formats, ranks) >= shard_weights(shape, formats) * 0.999
        assert ranks * expert_weights(shape, formats, ranks) == pytest.approx(expert_weights(shape, formats, 1))
    assert expert_weights(shape, formats, 8, redundant=32) / expert_weights(shape, formats, 8) == pytest.approx(
        288 / 256
    )


def test_scales_are_counted() -> None:
    assert FORMATS["fp8"].bytes_each > 1 and FORMATS["fp4"].bytes_each == 0.53125
    assert KV_BYTES["fp8"][0] * 512 == 584  # vLLM's entry


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "llama"}, "model_type: 'llama'"),
        ({"hidden_size": None}, "hidden_size: is missing"),
        ({"hidden_size": "4096"}, "hidden_size: '4096' is not"),
        ({"compress_ratios": [3, 4]}, "compress_ratios"),
        ({"compress_ratios": None, "layer_types": ["full"]}, "layer_types"),
    ],
)
def test_a_configuration_that_cannot_be_planned_names_its_key(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ShapeError, match=said):
        shape_of(bundled("deepseek-v4-flash") | change, "bad")
