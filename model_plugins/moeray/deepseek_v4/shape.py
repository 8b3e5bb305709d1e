"""The numbers of config.json that decide shapes: read once, checked, frozen.

Families: DeepSeek-V4 (`deepseek_v4`), V4.1 (`deepseek_v41`, its text model nested under `text_config`), and the V2,
V3 and V3.2 style (Hugging Face's tensor names, no swiglu clamp, dense layers first).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeray.deepseek_v4.errors import CheckpointError
from moeray.deepseek_v4.formats import fp8_block_of

CLAMPED_FAMILIES = ("deepseek_v4", "deepseek_v41")
"""Their routed experts clamp gate and up; leaving the clamp out changes the answers without any error."""
UNCLAMPED_FAMILIES = ("deepseek_v2", "deepseek_v3", "deepseek_v32")
DTYPES = ("bfloat16", "float16", "float32")
FAMILIES = (*CLAMPED_FAMILIES, *UNCLAMPED_FAMILIES)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The shape of a model of the family.

    Attributes:
        family: model_type of config.json.
        num_layers: decoder layers; draft (MTP) layers are not counted.
        intermediate_size: width of one routed expert.
        swiglu_limit: clamp of gate (above) and up (both sides); `math.inf` where the config sets none (0 or null).
        dtype: torch's name of the activations' dtype ("bfloat16", ...); see `activations_of`.
        fp8_block: rows and columns of an FP8 weight that share a scale, where config.json says so.
        num_moe_layers: how many layers have routed experts by config.json.
        moe_layers: layer indices for which weight files hold routed experts, ascending.
        hash_layers: those of them that route by a token-id table.
        engram_layers: layer indices with an Engram, ascending; empty without Engram.
    """

    family: str
    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_experts: int
    num_shared_experts: int
    top_k: int
    intermediate_size: int
    swiglu_limit: float
    dtype: str
    fp8_block: tuple[int, int] | None
    num_moe_layers: int
    moe_layers: tuple[int, ...]
    hash_layers: tuple[int, ...]
    engram_layers: tuple[int, ...]


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's keys: V4.1 nests them under `text_config`, the others have them at the top."""
    nested = config.get("text_config")
    return {**config, **nested, "model_type": config.get("model_type")} if isinstance(nested, Mapping) else dict(config)


def activations_of(config: Mapping[str, Any]) -> str:
    """torch's name of the dtype that a (text) config's model computes in: what config.json says, but for V4 in float32.

    Its hyper-connections run in kernels that take 16 bits only: float32 weights are rounded to bfloat16 when read.
    """
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return "bfloat16" if stored == "float32" and config.get("model_type") in CLAMPED_FAMILIES else stored


def read_shape(file: Path, config: Mapping[str, Any], moe_layers: Iterable[int]) -> ModelShape:
    """Check the keys of a parsed config.json (`file` is only for messages).

    Args:
        moe_layers: the layers for which the weight files hold routed experts.
    Raises:
        CheckpointError: a key is missing or out of range; names the key and its value.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(
            file, f"model_type is {family!r}, none of {', '.join(FAMILIES)}", "give a checkpoint of the DeepSeek family"
        )
    architectures = config.get("architectures") or ["DeepseekV4ForCausalLM"]
    if not isinstance(architectures, list) or not isinstance(architectures[0], str):
        raise CheckpointError(file, f"architectures is {architectures!r}", "it must be a list of one name")
    config = text_config(config)
    num_layers = _positive_int(file, config, "num_hidden_layers")
    num_experts = _positive_int(file, config, "n_routed_experts")
    top_k = _positive_int(file, config, "num_experts_per_tok")
    if top_k > num_experts:
        raise CheckpointError(
            file, f"num_experts_per_tok is {top_k}, but n_routed_experts is {num_experts}", "correct one of them"
        )
    num_hash = _whole_number(file, config, "num_hash_layers")
    layers = tuple(sorted(moe_layers))
    return ModelShape(
        family=str(family),
        architecture=architectures[0],
        num_layers=num_layers,
        hidden_size=_positive_int(file, config, "hidden_size"),
        vocab_size=_positive_int(file, config, "vocab_size"),
        num_experts=num_experts,
        num_shared_experts=_whole_number(file, config, "n_shared_experts"),
        top_k=top_k,
        intermediate_size=_positive_int(file, config, "moe_intermediate_size"),
        swiglu_limit=_swiglu_limit(file, config) if family in CLAMPED_FAMILIES else math.inf,
        dtype=_dtype(file, config),
        fp8_block=fp8_block_of(config),
        num_moe_layers=_num_moe_layers(file, config, num_layers),
        moe_layers=layers,
        hash_layers=tuple(layer for layer in layers if layer < num_hash),
        engram_layers=_engram_layers(file, config, num_layers),
    )


def _dtype(file: Path, config: Mapping[str, Any]) -> str:
    dtype = activations_of(config)
    if dtype not in DTYPES:
        raise CheckpointError(file, f"dtype is {dtype!r}", f"it must be one of {', '.join(DTYPES)}")
    return dtype


def _num_moe_layers(file: Path, config: Mapping[str, Any], num_layers: int) -> int:
    """V4: every layer; before, from `first_k_dense_replace` on every `moe_layer_freq`-th."""
    first = _whole_number(file, config, "first_k_dense_replace")
    every = _whole_number(file, config, "moe_layer_freq") or 1
    if config.get("model_type") in CLAMPED_FAMILIES:
        return num_layers
    return len(range(-(-first // every) * every, num_layers, every))


def _whole_number(file: Path, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key) or 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(file, f"{key} is {value!r}", "it must be a whole number")
    return value


def _positive_int(file: Path, config: Mapping[str, Any], key: str) -> int:
    value = _required(file, config, key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(file, f"{key} is {value!r}", "it must be a whole number of at least 1")
    return value


def _required(file: Path, config: Mapping[str, Any], key: str) -> Any:
    if key not in config:
        raise CheckpointError(file, f"key {key!r} is missing", "copy config.json from the model's source again")
    return config[key]


def _swiglu_limit(file: Path, config: Mapping[str, Any]) -> float:
    value = _required(file, config, "swiglu_limit")
    if value is None or value == 0:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise CheckpointError(file, f"swiglu_limit is {value!r}", "it must be a positive number, or 0 for no clamp")
    return float(value)


def _engram_layers(file: Path, config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    layers = config.get("engram_layer_ids") or []
    if not isinstance(layers, list):
        raise CheckpointError(file, f"engram_layer_ids is {layers!r}", "it must be a list of layers")
    outside = [layer for layer in layers if not (isinstance(layer, int) and 0 <= layer < num_layers)]
    if outside:
        raise CheckpointError(file, f"engram_layer_ids names {outside}", f"layers are 0..{num_layers - 1}")
    return tuple(sorted(layers))
