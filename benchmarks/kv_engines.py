"""The engine of the KV benchmark: one whole engine in a process, asked for a first token at a time.

Its experts are inside: what is compared is attention's KV, fetched or computed. Times are from inside the engine: no
HTTP, no relay.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

MAX_TOKENS, STEP_TOKENS, KV_BYTES = 8192, 512, 512 << 20
SETTLE_S = 20.0


@dataclass(frozen=True)
class First:
    """`seconds`: to the first token. `cached`: tokens of the prompt that were not computed. `text`: all tokens."""

    seconds: float
    cached: int
    text: tuple[int, ...]


class KvEngine:
    """Commands of the engine's process."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._count = 0

    def start(self, checkpoint: Path, kv_cache: dict[str, Any] | None, plain: bool = False) -> None:
        """Load; `plain`: vLLM's own model and experts, as `vllm serve` would run them."""
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.executor.abstract import Executor

        from moeray.deepseek_v4 import Checkpoint
        from moeray.placement import contiguous
        from moeray.vllm_hooks.engine_args import shard_engine_args
        from moeray.vllm_hooks.settings import ShardSettings

        settings = None if plain else ShardSettings(backend="local", checkpoint=checkpoint)
        limits = {"max_model_len": MAX_TOKENS, "max_num_batched_tokens": STEP_TOKENS, "kv_cache_memory_bytes": KV_BYTES}
        arguments = shard_engine_args(
            model=checkpoint, model_name="bench", engine_args=limits, moeray=settings, kv_cache=kv_cache
        )
        config = arguments.create_engine_config(UsageContext.ENGINE_CONTEXT)
        self._engine = LLMEngine(config, Executor.get_class(config), log_stats=False, multiprocess_mode=False)
        if settings is not None:
            shape = Checkpoint.open(checkpoint).shape
            here = contiguous(generation=1, num_layers=shape.num_layers, num_experts=shape.num_experts, num_groups=1)
            self._engine.collective_rpc("moeray_connect", args=(here.to_json(), []))

    def apply(self, function: Callable[[Any], Any]) -> Any:
        """To the model."""
        return self._engine.apply_model(function)[0]

    def ask(self, prompt: list[int], num_tokens: int = 1) -> First:
        """One request, alone."""
        from vllm import SamplingParams

        self._count += 1
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        began, first, last = time.perf_counter(), 0.0, None
        self._engine.add_request(f"r{self._count}", {"prompt_token_ids": prompt}, sampling)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                first, last = first or time.perf_counter() - began, output
        return First(first, last.num_cached_tokens or 0, tuple(last.outputs[0].token_ids))  # type: ignore[attr-defined]

    def decode(self, batch: int, steps: int) -> float:
        """Tokens per second of `batch` requests with prompts of their own, from their first tokens on."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=steps + 20, ignore_eos=True, detokenize=False)
        names = [f"d{self._count}-{number}" for number in range(batch)]
        self._count += 1
        for number, name in enumerate(names):
            prompt = [10 + (self._count * 97 + number * 31 + each) % 1400 for each in range(64)]
            self._engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        begun: set[str] = set()
        while len(begun) < batch:
            begun |= {output.request_id for output in self._engine.step() if output.outputs[0].token_ids}
        began = time.perf_counter()
        tokens = sum(len(self._engine.step()) for _ in range(steps))
        seconds = time.perf_counter() - began
        self._engine.abort_request(names)
        self.settle()
        return tokens / seconds

    def settle(self) -> None:
        """Until the stores have everything.

        Raises:
            TimeoutError: they do not.
        """
        core = self._engine.engine_core.engine_core
        deadline = time.monotonic() + SETTLE_S
        while core.scheduler.connector is not None and core.scheduler.connector.has_pending_push_work():
            core.step_fn()
            if time.monotonic() > deadline:
                raise TimeoutError("blocks are still on their way to the stores")

    def forget(self) -> None:
        """Empty the device's cache and the staging region; the stores keep what they have."""
        self.settle()
        assert self._engine.reset_prefix_cache(reset_connector=True)

    def always(self, what: str) -> None:
        """`fetch` or `compute` whatever it costs; anything else: as measured."""
        from moeray.kv_cache import Choice, choose
        from moeray.vllm_hooks import kv_connector

        def forced(options: Any, *_: Any) -> Choice:
            chosen = options[-1] if options and what == "fetch" else None
            return Choice(chosen, None, 1e9, what)

        kv_connector.choose = partial(forced) if what in ("fetch", "compute") else choose

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = self._engine.collective_rpc("moeray_kv_cache")[0]
        return found
