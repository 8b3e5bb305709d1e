"""What a user may say in `attention.engine_args`, and what reaches vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moeray.config import ConfigError
from moeray.vllm_hooks.engine_args import front_engine_args, shard_engine_args
from moeray.vllm_hooks.settings import ShardSettings, shard_settings

SETTINGS = ShardSettings(shard="s1", backend="gloo", checkpoint=Path("/models/x"), timeout_s=3.0, host="127.0.0.2")


def shard(**wanted: Any) -> Any:
    return shard_engine_args(model=Path("/models/x"), model_name="x", engine_args=wanted, moeray=SETTINGS)


def test_the_users_arguments_win_over_our_defaults() -> None:
    assert (shard().max_model_len, shard(max_model_len=128).max_model_len) == (4096, 128)


def test_shard_and_front_agree_on_every_limit_the_front_checks() -> None:
    wanted = {"max_model_len": 777, "max_logprobs": 5}
    front = front_engine_args(model="/models/x", model_name="x", engine_args=wanted)
    names = (
        "model",
        "served_model_name",
        "max_model_len",
        "max_logprobs",
        "tokenizer_mode",
        "reasoning_parser",
        "seed",
    )
    assert [getattr(front, name) for name in names] == [getattr(shard(**wanted), name) for name in names]


def test_the_front_carries_nothing_of_a_shard() -> None:
    front = front_engine_args(model="/models/x", model_name="x", engine_args={})
    assert not front.additional_config
    assert not front.worker_extension_cls


@pytest.mark.parametrize(
    "build", [shard, lambda **wanted: front_engine_args(model="m", model_name="x", engine_args=wanted)]
)
def test_an_unknown_argument_is_named_with_the_nearest_one(build: Any) -> None:
    with pytest.raises(ConfigError, match=r"attention\.engine_args\.max_model_length: .*did you mean max_model_len\?"):
        build(max_model_length=1)


def test_an_argument_that_is_ours_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"attention\.engine_args\.data_parallel_size: .*attention\.num_shards"):
        shard(data_parallel_size=2)


@pytest.mark.parametrize("mode", ["FULL", "full_and_piecewise"])
def test_graphs_that_would_skip_the_hop_are_refused(mode: str) -> None:
    with pytest.raises(ConfigError, match="without the hop"):
        shard(compilation_config={"cudagraph_mode": mode})


def test_settings_survive_the_way_through_json() -> None:
    arguments = shard()
    again = shard_settings(
        type("VllmConfig", (), {"additional_config": json.loads(json.dumps(arguments.additional_config))})
    )
    assert again == SETTINGS


def test_settings_may_come_as_a_mapping_with_defaults_left_out() -> None:
    given = {"backend": "local", "checkpoint": "/models/x"}
    arguments = shard_engine_args(model="/models/x", model_name="x", engine_args={}, moeray=given)
    assert (
        arguments.additional_config["moeray"] == ShardSettings(backend="local", checkpoint=Path("/models/x")).to_json()
    )


def test_vllm_without_our_settings_has_none() -> None:
    assert shard_settings(type("VllmConfig", (), {"additional_config": {}})) is None


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'tcp' is none of gloo, nccl, local"):
        ShardSettings(backend="tcp", checkpoint=Path("x"))
