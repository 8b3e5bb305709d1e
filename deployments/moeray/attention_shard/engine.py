"""vLLM's EngineCore as the shard process sees it: started (by fork), asked, lost with a reason."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeray.attention_shard import link as wire
from moeray.attention_shard.kv_events import is_ours, publish_events
from moeray.attention_shard.spec import ShardSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
    from vllm.v1.engine.core_client import AsyncMPClient

    from moeray.vllm_hooks.engine_child import LastWords


class EngineLost(RuntimeError):
    """EngineCore is gone; the text says why, `code` is one of the link's codes."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class ShardEngine:
    """Owns the EngineCore child. Same event loop as the relay."""

    def __init__(self, client: AsyncMPClient, last_words: LastWords, vllm: str, model: str) -> None:
        self.vllm, self.model = vllm, model
        self._client, self._last_words = client, last_words
        manager: Any = client.resources.engine_manager
        self._process = manager.processes[0]

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    @property
    def kv_tokens(self) -> int:
        """What its KV cache holds; 0 if vLLM did not say."""
        return self._client.vllm_config.cache_config.kv_cache_size_tokens or 0

    @property
    def max_running(self) -> int:
        """Requests that it computes at once."""
        return int(self._client.vllm_config.scheduler_config.max_num_seqs)

    @property
    def kv_events(self) -> tuple[str, str] | None:
        """Where it tells what its prefix cache holds, and vLLM's name of the hash; None if it does not."""
        config = self._client.vllm_config
        if (events := config.kv_events_config) is None or not is_ours(events.endpoint):
            return None
        return events.endpoint, config.cache_config.prefix_caching_hash_algo

    @property
    def num_workers(self) -> int:
        """Processes that a call of the worker extension reaches."""
        return int(self._client.vllm_config.parallel_config.world_size)

    def _how_it_ended(self) -> str:
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        await self._client.add_request_async(request)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        await self._client.abort_requests_async(request_ids)

    async def get_output_async(self) -> EngineCoreOutputs:
        """Raises EngineLost, once EngineCore is gone, with what it said last."""
        try:
            return await self._client.get_output_async()
        except Exception as error:
            fault = await self._last_words.read(lambda: self._process.exitcode is not None)
            reason = fault.reason if fault is not None else f"its EngineCore process {self._how_it_ended()}"
            code = wire.EXPERTS_LOST if fault is not None and fault.experts_lost else wire.ENGINE_DEAD
            raise EngineLost(code, reason) from error

    async def call_worker(self, method: str, *args: Any) -> Any:
        """One call of the worker extension, between engine steps; where vLLM has several workers, the first's answer.

        Raises:
            Exception: what the method raised, as text; vLLM carries no type across.
        """
        return (await self._client.collective_rpc_async(method, args=args))[0]

    def shutdown(self) -> None:
        self._client.shutdown(timeout=2.0)


def start_engine(spec: ShardSpec, progress: Callable[[str], None]) -> ShardEngine:
    """Build the configuration, fork EngineCore and wait until the model is loaded. Blocks for seconds to minutes.

    EngineCore is forked, not spawned: it shares this process' imported modules (with moeray-tiny on CPU 10 s of CPU and
    260 MB less per shard). That is safe because nothing here has started gRPC, CUDA or an OpenMP region yet; vLLM
    itself falls back to spawn when CUDA is initialised.

    Raises:
        EngineLost: EngineCore ended during start, with its reason (bad checkpoint, not enough memory, ...).
        Exception: vLLM refused the arguments.
    """
    from moeray.vllm_hooks.engine_child import watch_engine_child
    from moeray.vllm_hooks.heavy_imports import uncollected

    with uncollected():
        config = _configure(spec, progress)
        publish_events(config)
        import vllm
        from vllm.v1.engine.core_client import EngineCoreClient
        from vllm.v1.executor.abstract import Executor

        from moeray.vllm_hooks.fingerprint import model_fingerprint

    if spec.prefault:
        _bring_tables(Path(spec.engine["model"]), progress)
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # now: vLLM's CPU platform sets spawn with the configuration
    last_words = watch_engine_child()
    progress("loading model" if spec.engine["moeray"] is not None else "loading model, experts in vLLM")
    try:
        client = EngineCoreClient.make_async_mp_client(
            vllm_config=config, executor_class=Executor.get_class(config), log_stats=True
        )
    except Exception as error:
        if (fault := last_words.read_now()) is None:
            raise
        raise EngineLost(wire.ENGINE_DEAD, fault.reason) from error
    return ShardEngine(client, last_words, vllm.__version__, model_fingerprint(config.model_config))


def _bring_tables(directory: Path, progress: Callable[[str], None]) -> None:
    """Engram tables from the disk into the node's memory, where the engine will map them. Another shard may have."""
    from moeray.deepseek_v4.engram_files import table_ranges
    from moeray.deepseek_v4.weight_files import read_headers
    from moeray.engram import prefault

    def told(num_bytes: int, total: int) -> None:
        progress(f"bringing Engram tables into memory: {num_bytes / 2**30:.2f} of {total / 2**30:.2f} GiB")

    prefault(list(table_ranges(read_headers(directory)[1])), told)


def _configure(spec: ShardSpec, progress: Callable[[str], None]) -> VllmConfig:
    from moeray.vllm_hooks.engine_args import engine_config, shard_engine_args

    progress("reading the configuration")
    return engine_config(shard_engine_args(**spec.engine))
