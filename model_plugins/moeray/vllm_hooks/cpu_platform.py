"""Chunked prefill and prefix caching for DeepSeek-V4 on CPU.

vLLM turns both off for MLA models on a CPU without AMX tiles. V4's CPU kernels address KV by block table and position
throughout and use no AMX instruction, so both work on any AVX-512 machine (tested: identical tokens).
"""

from __future__ import annotations

from typing import Any


def keep_scheduler_features() -> None:
    """Wrap `CpuPlatform.check_and_update_config`; idempotent."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined, unused-ignore]
    if getattr(original, "keeps_scheduler_features", False):
        return

    def check_and_update_config(cls: type[Any], vllm_config: Any) -> None:
        scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
        wanted = (scheduler.enable_chunked_prefill, cache.enable_prefix_caching, scheduler.max_num_batched_tokens)
        original(cls, vllm_config)
        if _is_deepseek_v4(vllm_config.model_config):
            scheduler.enable_chunked_prefill, cache.enable_prefix_caching, scheduler.max_num_batched_tokens = wanted

    check_and_update_config.keeps_scheduler_features = True  # type: ignore[attr-defined, unused-ignore]
    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)  # type: ignore[method-assign, assignment, unused-ignore]


def _is_deepseek_v4(model_config: Any) -> bool:
    return model_config is not None and getattr(model_config.hf_config, "model_type", None) == "deepseek_v4"
