"""What must be known of a model before anything starts: its config.json in a few words, and where its experts are.

Every process decides from the same two things, the cluster's configuration and the model's config.json, so that
ingress, shards and controller agree without asking each other. Does not import vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from moeray.config import ClusterConfig, ConfigError
from moeray.deepseek_v4.checkpoint import CONFIG_FILE
from moeray.deepseek_v4.shape import activations_of, text_config
from moeray.vllm_hooks.architecture import MODEL_MODULES

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tekken.json", "vocab.json")

SPLIT_ARCHITECTURES = tuple(MODEL_MODULES)
"""Models whose routed experts can leave the shard: moeray has a class for each."""

NEEDS_GPU = ("DeepseekV32ForCausalLM", "DeepseekV41ForCausalLM", "GlmMoeDsaForCausalLM")
"""vLLM has no sparse attention (V3.2), or no model file at all (V4.1), for CPU."""

ENGRAM_ON_CPU = ("DeepseekV4ForCausalLM",)
"""Our Engram layers on a V4 body; V4.1 has vLLM's own, on GPUs."""

OWN_EXPERTS_ON_CPU = ("DeepseekV4ForCausalLM",)
"""vLLM's CPU kernels ignore the `swiglu_limit` of their routed experts without an error: other answers. Where such a
model is not split on CPU, moeray's own experts run inside the shard: the answers are those of the split model."""

_NUM_EXPERTS_KEYS = ("n_routed_experts", "num_local_experts", "num_experts")


class ExpertsIn(StrEnum):
    """Where the routed experts are computed."""

    GROUPS = "expert groups"
    SHARD = "attention shard, by moeray"
    VLLM = "attention shard, by vLLM"


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a model's prompts are written and its answers read; all of them names that vLLM knows.

    Attributes:
        tokenizer_mode: also chooses the chat encoding; `auto` is the tokenizer's own chat template.
        tool_parser, reasoning_parser: None for none: calls and thoughts then stay in the text.
        roles: the only roles that a chat may have; None where the chat template decides.
    """

    tokenizer_mode: str = "auto"
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    roles: tuple[str, ...] | None = None


_DEEPSEEK_ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")

_DIALECTS: Mapping[str, Dialect] = {
    "deepseek_v4": Dialect("deepseek_v4", "deepseek_v4", "deepseek_v4", _DEEPSEEK_ROLES),
    "deepseek_v41": Dialect("deepseek_v41", "deepseek_v41", "deepseek_v41", _DEEPSEEK_ROLES),
    "deepseek_v32": Dialect("deepseek_v32", "deepseek_v32", "deepseek_v3"),
}
"""By model_type, where the format comes with the architecture. Other architectures are trained on many formats, and
nothing is guessed for them: `attention.engine_args.reasoning_parser` and `.tool_call_parser` set them."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What config.json says that matters here.

    Attributes:
        num_experts: routed experts per MoE layer; 0 for a dense model.
        context_tokens: the longest sequence it was made for; None where it does not say.
        dtype: torch's name of its activations' dtype.
        has_engram: some of its layers look up n-grams.
    """

    directory: Path
    architecture: str
    model_type: str
    num_layers: int
    num_experts: int
    context_tokens: int | None
    dtype: str
    has_engram: bool
    dialect: Dialect

    @property
    def can_be_split(self) -> bool:
        return self.architecture in SPLIT_ARCHITECTURES and self.num_experts > 0


def describe_model(directory: Path) -> ServedModel:
    """Read a model directory's config.json.

    Raises:
        ConfigError: there is none, it is not JSON, or it names no architecture.
    """
    file = directory / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"model: {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"model: {file} is not JSON: {error}") from error
    architectures = config.get("architectures") if isinstance(config, Mapping) else None
    if not isinstance(architectures, list) or not architectures:
        raise ConfigError(f"model: {file} names no `architectures`: vLLM cannot tell which model it is")
    text = text_config(config)
    model_type = str(config.get("model_type") or "")
    return ServedModel(
        directory=directory,
        architecture=str(architectures[0]),
        model_type=model_type,
        num_layers=_number(text, "num_hidden_layers", "n_layer"),
        num_experts=_number(text, *_NUM_EXPERTS_KEYS),
        context_tokens=_number(text, "max_position_embeddings", "n_positions") or None,
        dtype=activations_of(text),
        has_engram=bool(text.get("engram_layer_ids")),
        dialect=_DIALECTS.get(model_type, Dialect()),
    )


def experts_in(config: ClusterConfig, model: ServedModel) -> ExpertsIn:
    """Where the routed experts are computed: the one place that decides it.

    Raises:
        ConfigError: expert groups are asked for, but the model cannot be split; or it cannot run without a GPU.
    """
    on_gpu = config.attention.num_gpus > 0
    if model.architecture in NEEDS_GPU and not on_gpu:
        raise ConfigError(f"model: vLLM runs {model.architecture} on GPUs only; set attention.num_gpus")
    if model.architecture in ENGRAM_ON_CPU and model.has_engram and on_gpu:
        raise ConfigError(f"model: Engram in {model.architecture} runs on CPU only; set attention.num_gpus 0")
    if config.experts.num_groups:
        if not model.can_be_split:
            raise ConfigError(
                f"experts.num_groups: {config.experts.num_groups} asked for, but {_why_not(model)}; set 0"
            )
        return ExpertsIn.GROUPS if config.num_remote_groups else ExpertsIn.SHARD
    return ExpertsIn.SHARD if model.architecture in OWN_EXPERTS_ON_CPU and not on_gpu else ExpertsIn.VLLM


def limits(model: ServedModel) -> tuple[str, ...]:
    """What this version cannot do with it, one line each; `experts_in` refuses the same."""
    found = []
    if model.architecture in NEEDS_GPU:
        found.append(f"vLLM runs {model.architecture} on GPUs only (attention.num_gpus)")
    if not model.can_be_split:
        found.append(f"{_why_not(model)}: not split only (experts.num_groups 0)")
    if model.architecture in ENGRAM_ON_CPU and model.has_engram:
        found.append(f"Engram in {model.architecture} runs on CPU only (attention.num_gpus 0)")
    return tuple(found)


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def _why_not(model: ServedModel) -> str:
    if not model.num_experts:
        return f"{model.architecture} has no routed experts"
    return (
        f"the {model.num_experts} experts of {model.architecture} cannot leave the attention shard "
        f"(those of {', '.join(SPLIT_ARCHITECTURES)} can)"
    )


def _number(config: Mapping[str, Any], *keys: str) -> int:
    """The first of these keys that holds a whole number; 0 if none does."""
    found = (config.get(key) for key in keys)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), 0)
