"""What a shard's KV tier is told: from cluster.yaml's `kv_cache` to vLLM's KVTransferConfig; what its blocks are of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeray.config import KvCacheConfig
from moeray.deepseek_v4.checkpoint import fingerprint_of
from moeray.deepseek_v4.weight_files import read_headers, read_json

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig

CONNECTOR = "KvTierConnector"
TIERS_MODULE = "moeray.vllm_hooks.kv_tiers"
FORMAT = 1
"""Of what stands in a block; raise it when the same name would mean other bytes."""
HASH = "sha256_cbor"
"""Names of blocks must be the same in every process and Python version; vLLM's default pickles."""

_SAME_BYTES = frozenset((
    "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes", "gpu_memory_utilization",
    "num_gpu_blocks_override", "enable_prefix_caching", "prefix_cache_retention_interval", "prefix_caching_hash_algo",
    "scheduling_policy", "async_scheduling", "disable_log_stats", "seed", "max_logprobs", "reasoning_parser",
    "tool_call_parser", "allowed_media_domains", "generation_config", "override_generation_config",
))  # fmt: skip
"""Engine arguments that change how much is computed and kept, or what is sampled: not what a block holds."""


def transfer_config(kv_cache: KvCacheConfig, content: Mapping[str, Any]) -> KVTransferConfig:
    """vLLM's configuration of the tier, nearest store first.

    Args:
        content: what else decides the bytes of a block, beside what vLLM knows.
    """
    from vllm.config import KVTransferConfig

    wanted = {"NodeTier": kv_cache.host_bytes, "RedisTier": kv_cache.redis_url}
    told = {"module_path": TIERS_MODULE, "kv_cache": asdict(kv_cache), "content": dict(content)}
    tiers = [{"type": tier, **told} for tier, is_on in wanted.items() if is_on]
    return KVTransferConfig(
        kv_connector=CONNECTOR,
        kv_connector_module_path="moeray.vllm_hooks.kv_connector",
        kv_role="kv_both",
        kv_connector_extra_config={
            "spec_name": "KvTierSpec",
            "spec_module_path": "moeray.vllm_hooks.kv_copy",
            "cpu_bytes_to_use": kv_cache.staging_bytes,
            "offload_prompt_only": False,  # the next turn of a chat begins with this turn's answer
            "secondary_tiers": tiers,
        },
    )


def deciding(engine_args: Mapping[str, Any]) -> dict[str, Any]:
    """The user's engine arguments that may decide a block's bytes: `hf_overrides`, `quantization`, `attention_backend`.

    One that is not known to be harmless is among them: a name too many costs a fetch, one too few is wrong text.
    """
    return {key: value for key, value in engine_args.items() if key not in _SAME_BYTES}


def model_content(directory: Path) -> str:
    """Content id of config and weights; see `Checkpoint.fingerprint`."""
    return fingerprint_of(read_json(directory / "config.json"), read_headers(directory)[0])


def computed_by() -> dict[str, str]:
    """Programs and kind of processor: another one's sums may end in other bits."""
    import torch
    from vllm import __version__ as vllm_version
    from vllm.platforms import current_platform

    instructions = f"{torch.backends.cpu.get_cpu_capability()} amx={torch.cpu._is_amx_tile_supported()}"
    return {
        "moeray": version("moeray"),
        "vllm": vllm_version,
        "torch": torch.__version__,
        "device": instructions if current_platform.is_cpu() else current_platform.get_device_name(),
    }


def namespace(offloading_config: Any, block_bytes: int, content: Mapping[str, Any]) -> str:
    """Blocks of two engines with the same namespace and name have the same bytes.

    Args:
        offloading_config: vLLM's OffloadingConfig: groups, dtype, layout, parallelism.
    """
    from vllm.v1.core.kv_cache_utils import get_none_hash_seed

    parts = {
        "format": FORMAT,
        "computed_by": computed_by(),
        "seed": get_none_hash_seed(),
        "groups": [[group.tokens_per_block, list(group.layer_names)] for group in offloading_config.groups],
        "dtype": offloading_config.model.dtype,
        "layout": offloading_config.kv_cache_layout,
        "parallel": asdict(offloading_config.parallel)
        | {"rank": 0, "data_parallel_index": 0, "data_parallel_rank_local": 0},
        "block_bytes": block_bytes,
        **content,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]
