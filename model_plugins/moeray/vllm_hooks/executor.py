"""The executor of a shard: the worker inside EngineCore's own process, each of its calls with a longest time.

vLLM's default on CPU is one more process for the worker, to bind its OpenMP threads. A shard's cores and threads are
set for the whole shard process before EngineCore is forked from it, so that process would only cost its memory, its
start and a copy of every step. vLLM's executor of several processes has a longest time of its own
(VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS).
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from vllm.v1.executor.uniproc_executor import UniProcExecutor

from moeray.health import StepLimit
from moeray.vllm_hooks import loader  # noqa: F401  registers the load format

step_limit = StepLimit()
"""Of this process' engine; watched once the model is loaded (`WorkerExtension.moeray_guard`)."""


@dataclass(slots=True)
class StepCounts:
    """Steps of this process' engine that computed something, and the tokens of them."""

    steps: int = 0
    tokens: int = 0


step_counts = StepCounts()


class ShardExecutor(UniProcExecutor):  # type: ignore[misc, unused-ignore]
    """vLLM's in-process executor under a name of its own: `uni` would be turned into `mp` on CPU."""

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if tokens := scheduler_output.total_num_scheduled_tokens:
            step_counts.steps += 1
            step_counts.tokens += tokens
        return super().execute_model(scheduler_output, *args, **kwargs)

    def collective_rpc(self, *args: Any, **kwargs: Any) -> Any:
        """Every call of the worker comes through here: steps, and what the shard process asks for."""
        with step_limit.step():
            result = super().collective_rpc(*args, **kwargs)
        if isinstance(result, Future) and not result.done():
            _limit(result)
        return result


def _limit(future: Any) -> None:
    """EngineCore's main thread waits for the device in `result`."""
    wait = future.result

    def result(timeout: float | None = None) -> Any:
        try:
            with step_limit.step():
                return wait(timeout)
        finally:
            if future.done():  # it refers to itself by this: only a garbage collection would free the step's outputs
                vars(future).pop("result", None)

    future.result = result
