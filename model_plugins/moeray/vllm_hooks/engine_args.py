"""vLLM's engine arguments for a shard and for the front: our defaults, the user's wishes, and what only we may set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeray.config import ConfigError
from moeray.vllm_hooks import plugin
from moeray.vllm_hooks.settings import ADDITIONAL_CONFIG_KEY, ShardSettings

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs

USER_KEY = "attention.engine_args"
WORKER_EXTENSION = "moeray.vllm_hooks.worker.WorkerExtension"
EXECUTOR = "moeray.vllm_hooks.executor.ShardExecutor"
LOAD_FORMAT = "moeray"

# What the front and the shards must agree on, or the front would accept what a shard refuses.
_COMMON_DEFAULTS: Mapping[str, Any] = {
    "tokenizer_mode": "deepseek_v4",
    "reasoning_parser": "deepseek_v4",
    "disable_log_stats": True,
    "max_model_len": 4096,
    "seed": 0,
}
# A step of 512 tokens keeps a decoding request's pause behind somebody's long prompt short; 256 MiB hold about eleven
# requests of 4096 tokens of the bundled model (vLLM logs the exact number at start).
_CPU_DEFAULTS: Mapping[str, Any] = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 256 << 20,
    "enable_prefix_caching": True,
    "enable_chunked_prefill": True,
    "async_scheduling": False,
}
# FULL graphs would leave the hop out of a replay without any error (see remote_experts.py).
_GPU_DEFAULTS: Mapping[str, Any] = {"compilation_config": {"cudagraph_mode": "PIECEWISE"}}

_OURS: Mapping[str, str] = {
    "model": "it is `model` of cluster.yaml",
    "served_model_name": "it is `model` of cluster.yaml",
    "tokenizer": "it comes with the model",
    "skip_tokenizer_init": "the ingress tokenises",
    "load_format": "a shard reads everything but the routed experts",
    "worker_extension_cls": "it connects the shard to its expert groups",
    "worker_cls": "it connects the shard to its expert groups",
    "distributed_executor_backend": "a shard is one process",
    "additional_config": "it carries the shard's settings",
    "data_parallel_size": "raise attention.num_shards instead",
    "tensor_parallel_size": "a shard is one process in this version",
    "pipeline_parallel_size": "a shard is one process in this version",
    "enable_expert_parallel": "raise experts.num_groups instead",
    "enable_eplb": "the placement belongs to the controller",
    "enable_dbo": "vLLM's own overlap needs its expert parallelism",
    "speculative_config": "draft tokens are not supported in this version",
}


def shard_engine_args(
    *, model: Path | str, model_name: str, engine_args: Mapping[str, Any], moeray: ShardSettings | Mapping[str, Any]
) -> AsyncEngineArgs:
    """Arguments of a shard's engine; loads the plugin.

    Args:
        model: checkpoint directory.
        model_name: what clients call it.
        engine_args: `attention.engine_args` of cluster.yaml; they win over our defaults.
        moeray: the shard's settings, or their `to_json`.
    Raises:
        ConfigError: an unknown argument, one that is ours to set, or one that the hop cannot work with.
    """
    settings = moeray if isinstance(moeray, ShardSettings) else ShardSettings.from_json(moeray)
    return _build(
        model,
        model_name,
        engine_args,
        load_format=LOAD_FORMAT,
        worker_extension_cls=WORKER_EXTENSION,
        distributed_executor_backend=EXECUTOR,
        additional_config={ADDITIONAL_CONFIG_KEY: settings.to_json()},
    )


def front_engine_args(*, model: Path | str, model_name: str, engine_args: Mapping[str, Any]) -> AsyncEngineArgs:
    """Arguments of the ingress' front, which has no engine: the shards' limits and parsers.

    Raises:
        ConfigError: as for a shard.
    """
    return _build(model, model_name, engine_args)


def check_engine_args(wanted: Mapping[str, Any]) -> None:
    """Check `attention.engine_args` without building anything.

    Raises:
        ConfigError: an unknown argument, one that is ours to set, or one that the hop cannot work with.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    _check_keys(wanted, {field.name for field in fields(AsyncEngineArgs) if not field.name.startswith("_")})
    _check_graphs(wanted)


def _build(model: Path | str, model_name: str, wanted: Mapping[str, Any], **ours: Any) -> AsyncEngineArgs:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    check_engine_args(wanted)
    plugin.register()
    defaults = {**_COMMON_DEFAULTS, **(_CPU_DEFAULTS if current_platform.is_cpu() else _GPU_DEFAULTS)}
    if isinstance(wanted.get("compilation_config"), Mapping):
        wanted = {
            **wanted,
            "compilation_config": {**defaults.get("compilation_config", {}), **wanted["compilation_config"]},
        }
    try:
        return AsyncEngineArgs(**{**defaults, **wanted, **ours, "model": str(model), "served_model_name": model_name})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{USER_KEY}: vLLM does not accept {dict(wanted)}: {error}") from error


def _check_keys(wanted: Mapping[str, Any], known: set[str]) -> None:
    for key in wanted:
        if key in _OURS:
            raise ConfigError(f"{USER_KEY}.{key}: may not be set: {_OURS[key]}")
        if key not in known:
            close = get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{USER_KEY}.{key}: vLLM has no such engine argument{hint}")


def _check_graphs(wanted: Mapping[str, Any]) -> None:
    compilation = wanted.get("compilation_config")
    if not isinstance(compilation, Mapping):
        return
    mode = str(compilation.get("cudagraph_mode", "PIECEWISE")).upper()
    if mode not in ("PIECEWISE", "NONE"):
        raise ConfigError(
            f"{USER_KEY}.compilation_config.cudagraph_mode: {mode} would replay without the hop: PIECEWISE or NONE"
        )
