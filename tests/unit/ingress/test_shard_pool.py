"""The pool and its links against real relays on loopback; only the engines are scripted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import msgspec
import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason

from moeray.attention_shard import link as wire
from moeray.attention_shard.relay import Relay, handlers
from moeray.ingress.shard_pool import ShardPool
from moeray.vllm_hooks.engine_core import NoShardReady, RequestFailed, ShardLost

INGRESS = wire.Hello(wire.PROTOCOL_VERSION, "0.32.0", "abc/2048", "ingress i0")


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

    def step(self, token: int, finish: FinishReason | None = None) -> None:
        outputs = [EngineCoreOutput(request_id, [token], finish_reason=finish) for request_id in self.running]
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
async def cluster(*shards: Shard) -> AsyncIterator[ShardPool]:
    pool = ShardPool(INGRESS)
    for shard in shards:
        await shard.start()
    await pool.set_shards({shard.name: shard.address for shard in shards})
    try:
        yield pool
    finally:
        await pool.close()
        for shard in shards:
            await shard.stop()


async def until(condition: object, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.005)


async def all_ready(pool: ShardPool, count: int) -> None:
    await until(lambda: len(pool.ready_shards) == count)


def request(request_id: str) -> EngineCoreRequest:
    return EngineCoreRequest(request_id, [7, 8], None, SamplingParams(max_tokens=9), None, 0.0, None, None, None)


async def failure(pool: ShardPool) -> RequestFailed:
    event = await asyncio.wait_for(pool.next_event(), 5)
    assert isinstance(event, RequestFailed), event
    return event


def test_requests_go_to_the_least_loaded_shard() -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a, b) as pool:
            await all_ready(pool, 2)
            for index in range(6):
                await pool.add(request(f"r{index}"))
            await until(lambda: len(a.engine.running) == 3 and len(b.engine.running) == 3)
            a.engine.step(1, FinishReason.STOP)
            await pool.next_event()
            await pool.add(request("r6"))
            await pool.add(request("r7"))
            await until(lambda: len(a.engine.running) == 2)
            assert len(b.engine.running) == 3

    asyncio.run(scenario())


def test_the_request_arrives_as_it_was_made_and_its_tokens_are_remembered() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await all_ready(pool, 1)
            await pool.add(request("r"))
            await until(lambda: "r" in a.engine.running)
            assert a.engine.running["r"] == request("r")
            for token in (3, 4):
                a.engine.step(token)
                step = await asyncio.wait_for(pool.next_event(), 5)
                assert isinstance(step, EngineCoreOutputs) and step.outputs[0].new_token_ids == [token]
            assert pool.in_flight["r"].token_ids == [3, 4] and pool.in_flight["r"].request.prompt_token_ids == [7, 8]
            a.engine.step(5, FinishReason.LENGTH)
            await pool.next_event()
            assert not pool.in_flight

    asyncio.run(scenario())


def test_without_a_shard_a_request_fails_at_once_and_says_why() -> None:
    async def scenario() -> None:
        pool = ShardPool(INGRESS)
        with pytest.raises(NoShardReady, match="no attention shard has joined"):
            await pool.add(request("r"))
        dead = Shard("dead")
        await dead.start()
        await dead.stop()
        await pool.set_shards({"dead": dead.address})
        with pytest.raises(NoShardReady, match=r"\(dead: "):
            await pool.add(request("r"))
        assert not pool.in_flight
        await pool.close()

    asyncio.run(scenario())


def test_a_lost_shard_fails_its_own_requests_and_no_other() -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a, b) as pool:
            await all_ready(pool, 2)
            for name in ("r0", "r1"):
                await pool.add(request(name))
            await until(lambda: len(a.engine.running) == 1 and len(b.engine.running) == 1)
            (on_a,), (on_b,) = a.engine.running, b.engine.running

            await a.stop()

            failed = await failure(pool)
            assert failed.request_id == on_a and isinstance(failed.error, ShardLost) and failed.error.shard == "a"
            b.engine.step(1)
            step = await asyncio.wait_for(pool.next_event(), 5)
            assert isinstance(step, EngineCoreOutputs) and [o.request_id for o in step.outputs] == [on_b]
            assert pool.ready_shards == ["b"] and list(pool.in_flight) == [on_b]
            await a.start()

    asyncio.run(scenario())


def test_a_shard_that_comes_back_is_used_again() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await all_ready(pool, 1)
            await a.stop()
            await all_ready(pool, 0)
            await a.start()
            await all_ready(pool, 1)
            await pool.add(request("r"))
            await until(lambda: "r" in a.engine.running)

    asyncio.run(scenario())


def test_the_reason_of_a_dead_engine_reaches_the_request() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await all_ready(pool, 1)
            await pool.add(request("r"))
            await until(lambda: "r" in a.engine.running)
            a.relay.fail(wire.EXPERTS_LOST, "PeerLost: expert group 1 lost: end of file")
            assert "attention shard a lost: PeerLost: expert group 1" in str((await failure(pool)).error)

    asyncio.run(scenario())


def test_an_abort_reaches_the_engine_and_later_output_is_ignored() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await all_ready(pool, 1)
            await pool.add(request("r"))
            await until(lambda: "r" in a.engine.running)
            await pool.abort(["r", "unknown"])
            await until(lambda: not a.engine.running)
            assert not pool.in_flight and pool.describe()["a"]["requests"] == 0

    asyncio.run(scenario())


def test_shards_join_and_leave_while_requests_run() -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a) as pool:
            await b.start()
            await all_ready(pool, 1)
            await pool.add(request("r0"))
            await pool.set_shards({"a": a.address, "b": b.address})
            await all_ready(pool, 2)
            await pool.add(request("r1"))
            await until(lambda: "r1" in b.engine.running)
            await pool.set_shards({"b": b.address})
            assert pool.ready_shards == ["b"] and "r0" in a.engine.running, "it takes nothing new and goes on"
            a.engine.step(5, FinishReason.STOP)
            step = await asyncio.wait_for(pool.next_event(), 5)
            assert isinstance(step, EngineCoreOutputs) and step.outputs[0].request_id == "r0"
            await until(lambda: list(pool.describe()) == ["b"])
            await b.stop()

    asyncio.run(scenario())


def test_a_draining_shard_gets_nothing_new() -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a, b) as pool:
            await all_ready(pool, 2)
            a.relay.drain("going down")
            await all_ready(pool, 1)
            for index in range(3):
                await pool.add(request(f"r{index}"))
            await until(lambda: len(b.engine.running) == 3)

    asyncio.run(scenario())


def test_a_shard_of_another_version_is_refused_by_name() -> None:
    async def scenario() -> None:
        old = Shard("old", vllm="0.31.0")
        async with cluster(old) as pool:
            await until(lambda: pool.describe()["old"]["state"] == "refused")
            with pytest.raises(NoShardReady, match=r"vllm differs.*0\.31\.0.*0\.32\.0"):
                pool.check_ready()

    asyncio.run(scenario())
