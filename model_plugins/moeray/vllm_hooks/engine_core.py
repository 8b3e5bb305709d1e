"""vLLM's engine-core client without an engine in this process: requests go to a pool, outputs come back from it.

`AsyncLLM` speaks to its engine only through an `EngineCoreClient`. This one hands every request to a `RequestPool` (the
ingress' shard pool) and feeds back what the pool yields: engine steps, or failures of single requests. A failed request
gets its typed error through the queue on which its `generate()` waits, so that one lost shard never touches the others.

Touch points: `EngineCoreClient.make_async_mp_client`, `AsyncLLM.check_admission` and `.generate`,
`OutputProcessor.request_states` and `.abort_requests`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any, Protocol

from vllm.exceptions import GracefulHTTPError
from vllm.tasks import SupportedTask
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.output_processor import OutputProcessor

from moeray.vllm_hooks.admission import Need, Place, Refused, keep_place, need_of, with_salt
from moeray.vllm_hooks.request_check import check_constraint, check_encodable


class ShardUnavailable(Refused):
    """No shard could carry this request (on): HTTP 503, gRPC UNAVAILABLE; a later try may succeed."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message, HTTPStatus.SERVICE_UNAVAILABLE, retry_after_s=retry_after_s)


class NoShardReady(ShardUnavailable):
    """The pool has no shard that takes requests."""


class EndsShards(GracefulHTTPError):
    """Shard after shard died with this request: HTTP 500, gRPC INTERNAL; another try would end another shard."""

    def __init__(self, deaths: Sequence[str]) -> None:
        super().__init__(
            f"{len(deaths)} attention shards died one after another while they ran this request; it is not tried again "
            f"({'; '.join(deaths)})",
            HTTPStatus.INTERNAL_SERVER_ERROR,
        )


class ShardLost(ShardUnavailable):
    """The shard that ran this request is gone; names it and says why."""

    def __init__(self, shard: str, reason: str) -> None:
        super().__init__(f"attention shard {shard} lost: {reason}")
        self.shard, self.reason = shard, reason


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """One request ended without a result."""

    request_id: str
    error: Exception


class RequestPool(Protocol):
    """Where requests run. All methods are called on one event loop."""

    def check_ready(self) -> None:
        """Raises NoShardReady if a request would find no shard now, nor is one due."""
        ...

    def admit(self, need: Need) -> Place:
        """Raises NoShardReady, Overloaded, or VLLMValidationError if no shard could ever hold it."""
        ...

    async def add(self, request: EngineCoreRequest) -> None:
        """Start a request that was admitted, as soon as there is a shard; how it fails comes with `next_event`."""
        ...

    async def abort(self, request_ids: list[str]) -> None:
        """Stop requests; unknown ids are ignored."""
        ...

    async def next_event(self) -> EngineCoreOutputs | RequestFailed:
        """The next thing that happened, in order per request."""
        ...


class PooledEngineCore(EngineCoreClient):
    """The part of `EngineCoreClient` that `AsyncLLM` needs to generate. Everything else raises NotImplementedError."""

    def __init__(self, pool: RequestPool) -> None:
        self.pool = pool
        self.engine_ranks_managed = [0]
        self.resources = SimpleNamespace(engine_dead=False)
        self._output_processor: OutputProcessor | None = None

    def bind(self, output_processor: OutputProcessor) -> None:
        """Where failed requests are told; called once AsyncLLM has made it."""
        self._output_processor = output_processor

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        await self.pool.add(request)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        await self.pool.abort(request_ids)

    async def get_output_async(self) -> EngineCoreOutputs:
        while isinstance(event := await self.pool.next_event(), RequestFailed):
            await self._fail(event)
        return event

    async def _fail(self, failed: RequestFailed) -> None:
        """Raise the error in the request's `generate()` and stop its siblings (n > 1)."""
        assert self._output_processor is not None
        state = self._output_processor.request_states.get(failed.request_id)
        if state is None:
            return
        # The error goes first: the queue keeps an exception over the abort's own final output.
        if state.queue is not None:
            state.queue.put(failed.error)
        whole = failed.request_id if state.parent_req is None else state.parent_req.request_id
        stopped = self._output_processor.abort_requests([whole], internal=True)
        await self.pool.abort([request_id for request_id in stopped if request_id != failed.request_id])

    async def get_supported_tasks_async(self) -> tuple[SupportedTask, ...]:
        return ("generate",)

    async def reset_mm_cache_async(self) -> None:
        return None

    def dp_engines_running(self) -> bool:
        return False

    def shutdown(self, timeout: float | None = None) -> None:
        return None


class FrontLLM(AsyncLLM):
    """AsyncLLM that refuses a request before its response has begun when no shard could take it."""

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        self.engine_core.pool.check_ready()
        super().check_admission(n, request_id)

    def generate(  # not `async`: it refuses at once, not at the first step
        self, prompt: Any, sampling_params: Any, request_id: str, *, priority: int = 0, **more: Any
    ) -> AsyncGenerator[Any, None]:
        check_constraint(sampling_params.structured_outputs)
        sent = {name: value for name, value in more.items() if name != "prompt_text"}
        salt = prompt.get("cache_salt") if isinstance(prompt, dict) else None
        check_encodable(sampling_params, request_id=request_id, priority=priority, cache_salt=salt, **sent)
        place = self.engine_core.pool.admit(need_of(request_id, prompt, sampling_params, priority))
        need, prompt = place.need, with_salt(prompt, place.need.cache_salt)
        return keep_place(place, super().generate(prompt, sampling_params, request_id, priority=need.priority, **more))


@contextlib.contextmanager
def _engine_core(client: PooledEngineCore) -> Iterator[None]:
    """While it is open, AsyncLLM gets this client instead of starting an engine."""
    original = EngineCoreClient.__dict__["make_async_mp_client"]

    def make_async_mp_client(**_: Any) -> PooledEngineCore:
        return client

    EngineCoreClient.make_async_mp_client = staticmethod(make_async_mp_client)  # type: ignore[method-assign]
    try:
        yield
    finally:
        EngineCoreClient.make_async_mp_client = original  # type: ignore[method-assign]


def front_over(pool: RequestPool, vllm_config: Any) -> FrontLLM:
    """vLLM's front (renderer, detokenizer, n, logprobs, ...) with `pool` as its engine. Call on the running loop."""
    from vllm.v1.executor.abstract import Executor

    client = PooledEngineCore(pool)
    with _engine_core(client):
        front = FrontLLM(vllm_config, Executor.get_class(vllm_config), log_stats=False, log_requests=False)
    client.bind(front.output_processor)
    return front
