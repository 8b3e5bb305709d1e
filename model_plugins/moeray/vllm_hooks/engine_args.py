"""vLLM's engine arguments for a shard and for the front: our defaults, the user's wishes, and what only we may set.

A shard whose experts are computed by vLLM itself (`ExpertsIn.VLLM`) is plain vLLM: any model, vLLM's own parallelism.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from moeray.config import ConfigError, KvCacheConfig
from moeray.deepseek_v4.errors import CheckpointError
from moeray.deepseek_v4.shape import UNCLAMPED_FAMILIES
from moeray.vllm_hooks import plugin
from moeray.vllm_hooks.kv_settings import HASH, deciding, model_content, transfer_config
from moeray.vllm_hooks.served_model import ExpertsIn, ServedModel, describe_model
from moeray.vllm_hooks.settings import ADDITIONAL_CONFIG_KEY, ShardSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

logger = logging.getLogger(__name__)

USER_KEY = "attention.engine_args"
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  where vLLM's staging regions are
SPARED_SHARE = 2
"""Of the staging region must be free there: other shards and the hop's channels take theirs, too."""
WORKER_EXTENSION = "moeray.vllm_hooks.worker.WorkerExtension"
EXECUTOR = "moeray.vllm_hooks.executor.ShardExecutor"
LOAD_FORMAT = "moeray"
MAX_REASON = 400

MAX_MODEL_LEN = 4096
"""Default context. The model's own may be a million tokens, for which the default KV cache has no room."""

# What the front and the shards must agree on, or the front would accept what a shard refuses.
# Requests of equal priority are scheduled as they came.
_COMMON_DEFAULTS: Mapping[str, Any] = {
    "disable_log_stats": True,
    "seed": 0,
    "scheduling_policy": "priority",
    # With a cache the front sends a shard only the hash of an image that it has sent before, perhaps to another shard.
    "mm_processor_cache_gb": 0,
    # vLLM would fetch any URL for a client, from where the ingress stands. No host has this name; a refusal shows it.
    "allowed_media_domains": [f"(none; {USER_KEY}.allowed_media_domains names those that are)"],
}

# A step of 512 tokens keeps a decoding request's pause behind somebody's long prompt short; 256 MiB hold about eleven
# requests of 4096 tokens of the bundled model (vLLM logs the exact number at start).
_CPU_DEFAULTS: Mapping[str, Any] = {
    "enforce_eager": True,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 256 << 20,
    "enable_prefix_caching": True,
    "enable_chunked_prefill": True,
    "async_scheduling": False,
}
# The reference MLA kernels: with AMX vLLM would take others, which know bfloat16 only and have not been run here.
_CPU_MLA_DEFAULTS: Mapping[str, Any] = {"attention_backend": "CPU_MLA"}
# vLLM's FP8 linear layers ask for AMX on CPU: a shard there computes with the values of quantised tensors (loader.py).
_PLAIN_LAYERS_ON_CPU: Mapping[str, Any] = {"quantization_config": None}
# FULL graphs would leave the hop out of a replay without any error (see remote_experts.py).
_GPU_HOP_DEFAULTS: Mapping[str, Any] = {"compilation_config": {"cudagraph_mode": "PIECEWISE"}}

_OURS: Mapping[str, str] = {
    "model": "it is `model` of cluster.yaml",
    "served_model_name": "it is `model` of cluster.yaml",
    "tokenizer": "it comes with the model",
    "skip_tokenizer_init": "the ingress tokenises",
    "worker_extension_cls": "it connects the shard to its expert groups",
    "worker_cls": "it connects the shard to its expert groups",
    "additional_config": "it carries the shard's settings",
    "data_parallel_size": "raise attention.num_shards instead",
    "mm_processor_cache_gb": "an image must go whole to whichever shard runs its request",
    "speculative_config": "draft tokens are not supported in this version",
}
# Where experts leave vLLM: with experts.num_groups 0 and a model that vLLM runs whole these are the user's.
_OURS_WITH_HOP: Mapping[str, str] = {
    "hf_overrides": "expert groups read config.json as it is, and so must the shards",
    "dtype": "expert groups compute in the checkpoint's own, and so must the shards",
    "load_format": "a shard reads everything but the routed experts",
    "distributed_executor_backend": "a shard is one process",
    "tensor_parallel_size": "a shard is one process in this version",
    "pipeline_parallel_size": "a shard is one process in this version",
    "prefill_context_parallel_size": "a shard is one process in this version",
    "decode_context_parallel_size": "a shard is one process in this version",
    "enable_expert_parallel": "raise experts.num_groups instead",
    "enable_eplb": "the placement belongs to the controller",
    "enable_dbo": "vLLM's own overlap needs its expert parallelism",
    "ubatch_size": "set attention.micro_batches instead",
}
# Measured on vLLM 0.32: its workers end with a segmentation fault in `cpu_fused_moe` at the first token.
_NOT_ON_CPU: Mapping[str, str] = {
    "enable_expert_parallel": "vLLM's CPU kernels cannot do it; tensor_parallel_size alone they can"
}
# How a shard is laid out over processes and devices: the front has neither.
_ONLY_OF_SHARDS = (
    "load_format",
    "distributed_executor_backend",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "prefill_context_parallel_size",
    "decode_context_parallel_size",
    "enable_expert_parallel",
    "enable_eplb",
    "eplb_config",
    "enable_dbo",
    "all2all_backend",
    "expert_placement_strategy",
    "kv_transfer_config",
)
TOOL_PARSER = "tool_call_parser"
"""Of `vllm serve` and not of its engine, but chosen together with `reasoning_parser`; only the front reads it."""


def shard_engine_args(
    *,
    model: Path | str,
    model_name: str,
    engine_args: Mapping[str, Any],
    moeray: ShardSettings | Mapping[str, Any] | None,
    kv_cache: KvCacheConfig | Mapping[str, Any] | None = None,
) -> AsyncEngineArgs:
    """Arguments of a shard's engine; loads the plugin.

    Args:
        model: checkpoint directory.
        model_name: what clients call it.
        engine_args: `attention.engine_args` of cluster.yaml; they win over our defaults.
        moeray: the shard's settings, or their `to_json`; None for plain vLLM.
        kv_cache: `kv_cache` of cluster.yaml; None keeps KV blocks in the engine.
    Raises:
        ConfigError: an unknown argument, one that is ours to set, or one that the hop cannot work with.
    """
    described = describe_model(Path(model))
    settings = (
        None if moeray is None else moeray if isinstance(moeray, ShardSettings) else ShardSettings.from_json(moeray)
    )
    tiers = _kv_tiers(described, engine_args, settings, kv_cache)
    if settings is None:
        plain = {"worker_extension_cls": WORKER_EXTENSION, **tiers}
        if _is_one_process(engine_args):
            plain["distributed_executor_backend"] = EXECUTOR
        return _build(described, model_name, engine_args, ExpertsIn.VLLM, plain)
    ours = {
        "load_format": LOAD_FORMAT,
        "worker_extension_cls": WORKER_EXTENSION,
        "distributed_executor_backend": EXECUTOR,
        "additional_config": {ADDITIONAL_CONFIG_KEY: settings.to_json()},
        **tiers,
    }
    place = ExpertsIn.SHARD if settings.backend == "local" else ExpertsIn.GROUPS
    return _build(described, model_name, engine_args, place, ours)


def _kv_tiers(
    model: ServedModel,
    engine_args: Mapping[str, Any],
    settings: ShardSettings | None,
    kv_cache: KvCacheConfig | Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Arguments that share KV blocks; none where there is no prefix cache, or the user has a connector of his own."""
    if kv_cache is None or "kv_transfer_config" in engine_args or engine_args.get("enable_prefix_caching") is False:
        return {}
    stores = kv_cache if isinstance(kv_cache, KvCacheConfig) else KvCacheConfig(**kv_cache)
    if not stores.is_on:
        return {}
    if (free := shutil.disk_usage(SHARED_MEMORY).free) < SPARED_SHARE * stores.staging_bytes:
        logger.warning(
            "KV blocks are not shared: %s has %d MiB left, kv_cache.staging_bytes is %d MiB; give it more (docker run "
            "--shm-size, a medium of Memory), or less staging",
            SHARED_MEMORY, free >> 20, stores.staging_bytes >> 20,
        )  # fmt: skip
        return {}
    try:
        weights = model_content(model.directory)
    except CheckpointError as error:
        logger.warning("KV blocks are not shared: what the weights are is not known: %s", error)
        return {}
    algorithm = engine_args.get("prefix_caching_hash_algo", HASH)
    threads = os.environ.get("OMP_NUM_THREADS", "")  # bits of two thread counts differ
    content = {"weights": weights, "threads": threads, "hash": algorithm, "engine": deciding(engine_args)}
    if settings is not None:
        content["rows"] = settings.dispatch_format
    return {"kv_transfer_config": transfer_config(stores, content), "prefix_caching_hash_algo": algorithm}


def front_engine_args(
    *,
    model: Path | str,
    model_name: str,
    engine_args: Mapping[str, Any],
    experts_in: ExpertsIn = ExpertsIn.GROUPS,
) -> AsyncEngineArgs:
    """Arguments of the ingress' front, which has no engine: the shards' limits and parsers.

    Raises:
        ConfigError: as for a shard.
    """
    check_engine_args(engine_args, experts_in)
    kept = {key: value for key, value in engine_args.items() if key not in _ONLY_OF_SHARDS}
    return _build(describe_model(Path(model)), model_name, kept, experts_in, {})


def engine_config(engine_args: AsyncEngineArgs) -> VllmConfig:
    """vLLM's configuration, which reads the model's files.

    Raises:
        ConfigError: vLLM does not know the architecture, or cannot serve it with these arguments.
    """
    from vllm.usage.usage_lib import UsageContext

    try:
        return engine_args.create_engine_config(UsageContext.API_SERVER)
    except ValidationError as error:
        reasons = "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())
        reason = shorten(reasons, MAX_REASON)  # vLLM lists every architecture that it knows
        raise ConfigError(f"model: vLLM does not serve {engine_args.model} so: {reason}") from error


def check_engine_args(wanted: Mapping[str, Any], experts_in: ExpertsIn = ExpertsIn.GROUPS) -> None:
    """Check `attention.engine_args` without building anything.

    Raises:
        ConfigError: an unknown argument, one that is ours to set, or one that the hop cannot work with.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    known = {field.name for field in fields(AsyncEngineArgs) if not field.name.startswith("_")} | {TOOL_PARSER}
    has_hop = experts_in is not ExpertsIn.VLLM
    ours = {**_OURS, **(_OURS_WITH_HOP if has_hop else _NOT_ON_CPU if current_platform.is_cpu() else {})}
    _check_keys(wanted, known, ours)
    if has_hop:
        _check_graphs(wanted)


def _build(
    model: ServedModel,
    model_name: str,
    wanted: Mapping[str, Any],
    experts_in: ExpertsIn,
    ours: Mapping[str, Any],
) -> AsyncEngineArgs:
    from vllm.config import ReasoningConfig, StructuredOutputsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    check_engine_args(wanted, experts_in)
    plugin.register()
    defaults = _defaults(model, experts_in)
    wanted = {key: value for key, value in wanted.items() if key != TOOL_PARSER}
    if isinstance(wanted.get("compilation_config"), Mapping):
        wanted["compilation_config"] = {**defaults.get("compilation_config", {}), **wanted["compilation_config"]}
    kinds = {"structured_outputs_config": StructuredOutputsConfig, "reasoning_config": ReasoningConfig}
    merged = {**defaults, **wanted, **ours, "model": str(model.directory), "served_model_name": model_name}
    if defaults.get("enforce_eager") and not merged["enforce_eager"] and experts_in is not ExpertsIn.VLLM:
        raise ConfigError(f"{USER_KEY}.enforce_eager: graphs of {model.architecture} would replay without the hop")
    try:
        for key, kind in kinds.items():  # vLLM reads every other mapping by itself
            if isinstance(merged.get(key), Mapping):
                merged[key] = kind(**merged[key])
        return AsyncEngineArgs(**merged)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{USER_KEY}: vLLM does not accept {wanted}: {error}") from error


def _defaults(model: ServedModel, experts_in: ExpertsIn) -> dict[str, Any]:
    from vllm.platforms import current_platform

    defaults = {
        **_COMMON_DEFAULTS,
        "max_model_len": min(MAX_MODEL_LEN, model.context_tokens or MAX_MODEL_LEN),
        "tokenizer_mode": model.dialect.tokenizer_mode,
        "reasoning_parser": model.dialect.reasoning_parser or "",
    }
    has_hop = experts_in is not ExpertsIn.VLLM
    if current_platform.is_cpu():
        defaults |= {**_CPU_DEFAULTS, **(_CPU_MLA_DEFAULTS if model.model_type in UNCLAMPED_FAMILIES else {})}
    if has_hop:
        # What the expert groups are sent. vLLM's own default would turn a float32 checkpoint into bfloat16.
        defaults["dtype"] = model.dtype
        defaults |= {"hf_overrides": _PLAIN_LAYERS_ON_CPU} if current_platform.is_cpu() else _GPU_HOP_DEFAULTS
    if has_hop and not current_platform.is_cpu():
        defaults["enforce_eager"] = not _breaks_graphs(model.architecture)
    return defaults


def _breaks_graphs(architecture: str) -> bool:
    """Whether vLLM captures this model in breakable graphs, the only ones that run the hop on every replay."""
    from vllm.config.vllm import default_breakable_cudagraph_architectures

    return architecture in default_breakable_cudagraph_architectures()


def _is_one_process(wanted: Mapping[str, Any]) -> bool:
    """Whether vLLM would run a single worker, which then lives in EngineCore's process (see executor.py)."""
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size")
    return "distributed_executor_backend" not in wanted and all(wanted.get(size, 1) == 1 for size in sizes)


def _check_keys(wanted: Mapping[str, Any], known: set[str], ours: Mapping[str, str]) -> None:
    for key, value in wanted.items():
        if key in ours and value is not False:  # to leave out what is not there asks for nothing
            raise ConfigError(f"{USER_KEY}.{key}: may not be set: {ours[key]}")
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
