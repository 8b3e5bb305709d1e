"""The executor of a shard: the worker inside EngineCore's own process.

vLLM's default on CPU is one more process for the worker, to bind its OpenMP threads. A shard's cores and threads are
set for the whole shard process before EngineCore is forked from it, so that process would only cost its memory, its
start and a copy of every step.
"""

from __future__ import annotations

from vllm.v1.executor.uniproc_executor import UniProcExecutor

from moeray.vllm_hooks import loader  # noqa: F401  registers the load format


class ShardExecutor(UniProcExecutor):  # type: ignore[misc, unused-ignore]
    """vLLM's in-process executor under a name of its own: `uni` would be turned into `mp` on CPU."""
