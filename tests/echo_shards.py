"""Real relays on loopback, over engines that a test drives by hand, and a pool that is linked to them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import msgspec
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason

from moeray.attention_shard import link as wire
from moeray.attention_shard.relay import Relay, handlers
from moeray.ingress.shard_pool import ShardPool
from moeray.vllm_hooks.admission import Need
from moeray.vllm_hooks.engine_core import RequestFailed

INGRESS = wire.Hello(wire.PROTOCOL_VERSION, "0.32.0", "abc/2048", "ingress i0")
NEED = Need("r", 2, 9)


class EchoEngine:
    """Answers every request with one token per `step`, until it is aborted."""

    def __init__(self) -> None:
        self.running: dict[str, EngineCoreRequest] = {}
        self._steps: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        self.running[request.request_id] = request

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.running.pop(request_id, None)

    async def get_output_async(self) -> EngineCoreOutputs:
        return await self._steps.get()

    def step(self, token: int, finish: FinishReason | None = None, *, only: str | None = None) -> None:
        served = [request_id for request_id in self.running if only in (None, request_id)]
        outputs = [EngineCoreOutput(request_id, [token], finish_reason=finish) for request_id in served]
        self._steps.put_nowait(EngineCoreOutputs(outputs=outputs))
        if finish is not None:
            self.running.clear()


class Shard:
    """A relay that listens, and can be stopped and started again on the same port."""

    def __init__(self, name: str, vllm: str = "0.32.0") -> None:
        self.name, self.engine, self.port = name, EchoEngine(), 0
        self._hello = msgspec.structs.replace(INGRESS, name=f"attention shard {name}", vllm=vllm)

    async def start(self) -> None:
        self.relay = Relay(self.engine, self._hello)
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        self._server.add_generic_rpc_handlers((handlers(self.relay, {}),))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()
        self._pump = asyncio.create_task(self.relay.run())

    async def stop(self) -> None:
        self._pump.cancel()
        await self._server.stop(None)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


@asynccontextmanager
async def cluster(*shards: Shard, **bounds: Any) -> AsyncIterator[ShardPool]:
    pool = ShardPool(INGRESS, **bounds)
    for shard in shards:
        await shard.start()
    await pool.set_shards({shard.name: shard.address for shard in shards})
    try:
        yield pool
    finally:
        await pool.close()
        for shard in shards:
            await shard.stop()


async def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


async def all_ready(pool: ShardPool, count: int) -> None:
    await until(lambda: len(pool.ready_shards) == count)


def request(request_id: str) -> EngineCoreRequest:
    return EngineCoreRequest(request_id, [7, 8], None, SamplingParams(max_tokens=9), None, 0.0, None, None, None)


async def failure(pool: ShardPool) -> RequestFailed:
    event = await asyncio.wait_for(pool.next_event(), 60)
    assert isinstance(event, RequestFailed), event
    return event


async def begin(pool: ShardPool, shard: Shard, *tokens: int, request_id: str = "r") -> None:
    """A request on this shard, the only one yet, with so many tokens passed on."""
    await all_ready(pool, 1)
    await pool.add(request(request_id))
    await until(lambda: request_id in shard.engine.running)
    for token in tokens:
        shard.engine.step(token)
        assert await passed_on(pool) == {request_id: [token]}


async def passed_on(pool: ShardPool) -> dict[str, list[int]]:
    step = await asyncio.wait_for(pool.next_event(), 60)
    assert isinstance(step, EngineCoreOutputs), step
    return {output.request_id: output.new_token_ids for output in step.outputs}


async def join(pool: ShardPool, *shards: Shard) -> None:
    for shard in shards:
        if not shard.port:
            await shard.start()
    await pool.set_shards({shard.name: shard.address for shard in shards})
