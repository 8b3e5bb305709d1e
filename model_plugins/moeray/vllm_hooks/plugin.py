"""The `vllm.general_plugins` entry point.

vLLM calls `register` in every process that uses it: the ingress (front without a model), the shard process and its
EngineCore. So it only says what exists; the model, its kernels and the loader are imported by the process that loads
the model. Importing this module costs nothing.
"""

from __future__ import annotations

_registered = False


def register() -> None:
    """Make DeepSeek-V4 (with Engram, with remote experts) known to this process' vLLM; idempotent.

    What changes for other models served from the same environment: nothing.
    """
    global _registered
    if _registered:
        return
    _registered = True
    from moeray.vllm_hooks import architecture, cpu_platform

    architecture.register()
    cpu_platform.keep_scheduler_features()
