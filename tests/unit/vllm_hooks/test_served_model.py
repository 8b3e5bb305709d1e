"""What is known of a model from its config.json, and where its experts go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moeray.config import ConfigError, parse_config
from moeray.tiny import checkpoint_path
from moeray.vllm_hooks.served_model import ExpertsIn, describe_model, experts_in

V4 = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "n_routed_experts": 16}
V3 = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "n_routed_experts": 16}
V32 = {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "n_routed_experts": 16}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 2048}
QWEN = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 128}


def model(directory: Path, config: dict[str, Any]) -> Any:
    (directory / "config.json").write_text(json.dumps(config))
    return describe_model(directory)


def cluster(num_groups: int, *, backend: str = "gloo", num_gpus: float = 0) -> Any:
    return parse_config(
        {
            "experts": {"num_groups": num_groups},
            "transport": {"backend": backend},
            "attention": {"num_gpus": num_gpus},
        }
    )


@pytest.mark.parametrize(
    ("config", "num_groups", "backend", "num_gpus", "where"),
    [
        (V4, 2, "gloo", 0, ExpertsIn.GROUPS),
        (V4, 2, "local", 0, ExpertsIn.SHARD),
        (V4, 0, "gloo", 0, ExpertsIn.SHARD),
        (V4, 0, "gloo", 1, ExpertsIn.VLLM),
        (V3, 2, "gloo", 0, ExpertsIn.GROUPS),
        (V3, 0, "gloo", 0, ExpertsIn.VLLM),
        (V32, 2, "nccl", 1, ExpertsIn.GROUPS),
        (LLAMA, 0, "gloo", 0, ExpertsIn.VLLM),
        (QWEN, 0, "gloo", 0, ExpertsIn.VLLM),
    ],
)
def test_experts_are_where_topology_platform_and_architecture_say(
    tmp_path: Path, config: dict[str, Any], num_groups: int, backend: str, num_gpus: float, where: ExpertsIn
) -> None:
    assert experts_in(cluster(num_groups, backend=backend, num_gpus=num_gpus), model(tmp_path, config)) is where


@pytest.mark.parametrize(
    ("config", "why"),
    [(LLAMA, "LlamaForCausalLM has no routed experts"), (QWEN, "the 128 experts of Qwen3MoeForCausalLM cannot leave")],
)
def test_a_model_that_cannot_be_split_is_refused_with_what_to_set(
    tmp_path: Path, config: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=rf"experts\.num_groups: 2 asked for, but .*{why}.*set 0"):
        experts_in(cluster(2), model(tmp_path, config))


@pytest.mark.parametrize("num_groups", [0, 2])
def test_sparse_attention_is_refused_without_a_gpu(tmp_path: Path, num_groups: int) -> None:
    with pytest.raises(ConfigError, match=r"model: .*DeepseekV32ForCausalLM on GPUs only.*attention\.num_gpus"):
        experts_in(cluster(num_groups), model(tmp_path, V32))


def test_the_dialect_is_the_models_own_and_nothing_is_guessed(tmp_path: Path) -> None:
    assert describe_model(checkpoint_path()).dialect.tool_parser == "deepseek_v4"
    dialect = model(tmp_path, LLAMA).dialect
    assert (dialect.tokenizer_mode, dialect.tool_parser, dialect.reasoning_parser, dialect.roles) == (
        "auto",
        None,
        None,
        None,
    )


def test_numbers_are_read_from_a_nested_text_configuration(tmp_path: Path) -> None:
    nested = {"num_hidden_layers": 5, "num_experts": 7, "max_position_embeddings": 99}
    described = model(tmp_path, {"architectures": ["X"], "text_config": nested})
    assert (described.num_layers, described.num_experts, described.context_tokens) == (5, 7, 99)


@pytest.mark.parametrize(
    ("text", "why"), [(None, "cannot be read"), ("{", "is not JSON"), ("{}", "names no `architectures`")]
)
def test_an_unusable_configuration_is_named(tmp_path: Path, text: str | None, why: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"model: .*config\.json.*{why}"):
        describe_model(tmp_path)
