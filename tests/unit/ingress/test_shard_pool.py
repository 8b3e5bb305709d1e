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
from vllm.v1.serial_utils import MsgpackEncoder

from moeray.attention_shard import link as wire
from moeray.attention_shard.relay import Relay, handlers
from moeray.ingress.in_flight import MAX_DEATHS
from moeray.ingress.shard_pool import ShardPool
from moeray.vllm_hooks.admission import Need
from moeray.vllm_hooks.continued_requests import GENERATED, generated_before
from moeray.vllm_hooks.engine_core import EndsShards, NoShardReady, RequestFailed

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
async def cluster(*shards: Shard, **bounds: float) -> AsyncIterator[ShardPool]:
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


def test_without_a_shard_no_request_is_admitted_and_the_error_says_why() -> None:
    async def scenario() -> None:
        pool = ShardPool(INGRESS)
        with pytest.raises(NoShardReady, match="no attention shard has joined"):
            pool.admit(NEED)
        dead = Shard("dead")
        await dead.start()
        await dead.stop()
        await pool.set_shards({"dead": dead.address})
        with pytest.raises(NoShardReady, match=r"\(dead: "):
            pool.admit(NEED)
        await pool.close()

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


async def begin(pool: ShardPool, shard: Shard, *tokens: int, request_id: str = "r") -> None:
    """A request on this shard, the only one yet, with so many tokens passed on."""
    await all_ready(pool, 1)
    await pool.add(request(request_id))
    await until(lambda: request_id in shard.engine.running)
    for token in tokens:
        shard.engine.step(token)
        assert await passed_on(pool) == {request_id: [token]}


async def passed_on(pool: ShardPool) -> dict[str, list[int]]:
    step = await asyncio.wait_for(pool.next_event(), 10)
    assert isinstance(step, EngineCoreOutputs), step
    return {output.request_id: output.new_token_ids for output in step.outputs}


async def join(pool: ShardPool, *shards: Shard) -> None:
    for shard in shards:
        if not shard.port:
            await shard.start()
    await pool.set_shards({shard.name: shard.address for shard in shards})


def test_a_request_goes_on_elsewhere_after_the_tokens_that_were_passed_on() -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a) as pool:
            await begin(pool, a, 3, 4)
            await join(pool, a, b)
            await all_ready(pool, 2)

            await a.stop()

            await until(lambda: "r+1" in b.engine.running)
            again = b.engine.running["r+1"]
            assert (again.prompt_token_ids, generated_before(again.sampling_params)) == ([7, 8], [3, 4])
            b.engine.step(5, FinishReason.STOP)
            assert await passed_on(pool) == {"r": [5]}
            assert not pool.in_flight and pool.describe()["b"]["requests"] == 0
            await a.start()
            await b.stop()

    asyncio.run(scenario())


def test_a_lost_shard_moves_its_own_requests_and_no_other() -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a, b) as pool:
            await all_ready(pool, 2)
            for name in ("r0", "r1"):
                await pool.add(request(name))
            await until(lambda: len(a.engine.running) == 1 and len(b.engine.running) == 1)
            (on_a,), (on_b,) = a.engine.running, b.engine.running

            await a.stop()

            await until(lambda: set(b.engine.running) == {on_b, f"{on_a}+1"})
            b.engine.step(1)
            assert await passed_on(pool) == {on_a: [1], on_b: [1]}
            await a.start()

    asyncio.run(scenario())


def test_what_a_shard_still_says_of_an_earlier_attempt_never_reaches_the_client() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await begin(pool, a, 3)
            for link in a.relay._links:  # the stream is lost, its engine lives on
                link.end(grpc.StatusCode.UNAVAILABLE, "lost")
            await until(lambda: "r+1" in a.engine.running)
            late = EngineCoreOutputs(outputs=[EngineCoreOutput("r", [9])])
            (link,) = a.relay._links
            link.put(wire.Outputs(wire.copied(MsgpackEncoder().encode(late))))
            a.engine.step(4)
            assert await passed_on(pool) == {"r": [4]}
            assert pool.in_flight["r"].token_ids == [3, 4]

    asyncio.run(scenario())


def test_a_dead_engine_gets_nothing_more_and_its_requests_move() -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a) as pool:
            await begin(pool, a)
            await join(pool, a, b)
            await all_ready(pool, 2)
            a.relay.fail(wire.ENGINE_DEAD, "was killed by SIGSEGV")
            await until(lambda: "r+1" in b.engine.running)
            assert pool.ready_shards == ["b"]
            await b.stop()

    asyncio.run(scenario())


def test_a_shard_that_has_drained_too_long_hands_over_and_is_not_blamed() -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a) as pool:
            await begin(pool, a, 3)
            await join(pool, a, b)
            await all_ready(pool, 2)
            a.relay.drain("going down")
            await all_ready(pool, 1)
            assert "r" in a.engine.running, "it may end there"
            a.relay.fail(wire.DRAINING, "going down")
            await until(lambda: "r+1" in b.engine.running)
            assert generated_before(b.engine.running["r+1"].sampling_params) == [3]
            assert not pool.in_flight["r"].deaths
            await b.stop()

    asyncio.run(scenario())


def test_a_request_waits_for_a_shard_and_then_goes_on() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await begin(pool, a, 3)
            await a.stop()
            await all_ready(pool, 0)
            pool.admit(NEED)
            await pool.add(request("new"))
            a.engine.running.clear()
            await a.start()
            await until(lambda: set(a.engine.running) == {"r+1", "new"})
            a.engine.step(4)
            assert await passed_on(pool) == {"r": [4], "new": [4]}

    asyncio.run(scenario())


def test_a_request_that_waits_too_long_fails_with_the_state_of_the_shards() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a, wait_s=0.3) as pool:
            await begin(pool, a, 3)
            await a.stop()
            failed = await failure(pool)
            assert failed.request_id == "r" and isinstance(failed.error, NoShardReady)
            assert "0.3 s" in str(failed.error) and "(a: " in str(failed.error) and not pool.in_flight
            with pytest.raises(NoShardReady, match=r"\(a: "):
                pool.admit(NEED)
            await a.start()

    asyncio.run(scenario())


def test_a_request_that_waits_can_be_aborted() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await begin(pool, a)
            await a.stop()
            await all_ready(pool, 0)
            await pool.abort(["r"])
            a.engine.running.clear()
            await a.start()
            await all_ready(pool, 1)
            await pool.add(request("r2"))
            await until(lambda: bool(a.engine.running))
            assert list(a.engine.running) == ["r2"] == list(pool.in_flight)

    asyncio.run(scenario())


def test_a_request_that_ends_every_shard_fails_and_says_what_it_did() -> None:
    async def scenario() -> None:
        shards = [Shard(name) for name in "abcd"]
        async with cluster(*shards) as pool:
            await all_ready(pool, 4)
            await pool.add(request("poison"))
            for _ in range(MAX_DEATHS):
                await until(lambda: any(shard.engine.running for shard in shards))
                (victim,) = [shard for shard in shards if shard.engine.running]
                victim.engine.running.clear()
                victim.relay.fail(wire.ENGINE_DEAD, "was killed by SIGSEGV")
            failed = await failure(pool)
            assert isinstance(failed.error, EndsShards) and str(failed.error).count("SIGSEGV") == MAX_DEATHS
            assert failed.error.http_status == 500 and len(pool.ready_shards) == 1

    asyncio.run(scenario())


def test_a_request_that_gets_a_token_between_two_deaths_is_not_suspected() -> None:
    async def scenario() -> None:
        shards = [Shard(name) for name in "abcde"]
        async with cluster(*shards) as pool:
            await all_ready(pool, 5)
            await pool.add(request("r"))
            for _ in range(MAX_DEATHS + 1):
                await until(lambda: any(shard.engine.running for shard in shards))
                (victim,) = [shard for shard in shards if shard.engine.running]
                victim.engine.step(1)
                assert await passed_on(pool) == {"r": [1]}
                victim.engine.running.clear()
                victim.relay.fail(wire.ENGINE_DEAD, "was killed by SIGKILL")
            await until(lambda: any(shard.engine.running for shard in shards))

    asyncio.run(scenario())


def test_suspects_run_one_at_a_time_until_they_have_a_token() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await all_ready(pool, 1)
            for name in ("r0", "r1"):
                await pool.add(request(name))
            for _ in range(MAX_DEATHS - 1):
                await until(lambda: len(a.engine.running) == 2)
                await a.stop()
                await all_ready(pool, 0)
                a.engine.running.clear()
                await a.start()

            await until(lambda: bool(a.engine.running))
            await pool.add(request("innocent"))
            await until(lambda: "innocent" in a.engine.running)
            assert set(a.engine.running) == {"r0+2", "innocent"}, "the other suspect waits"
            a.engine.step(1)
            assert await passed_on(pool) == {"r0": [1], "innocent": [1]}
            await until(lambda: set(a.engine.running) == {"r0+2", "r1+2", "innocent"})

    asyncio.run(scenario())


def test_a_shard_that_says_nothing_for_too_long_is_lost() -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a, silence_s=1.5) as pool:
            await begin(pool, a, 3)
            await join(pool, a, b)
            await all_ready(pool, 2)
            a._pump.cancel()  # its loop runs, its socket lives: it only says nothing
            await until(lambda: "r+1" in b.engine.running)
            assert "no sign of life" in str(pool.describe()["a"]["why"])
            await b.stop()

    asyncio.run(scenario())


def test_a_shard_that_refuses_is_left_alone_for_a_moment() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await all_ready(pool, 1)
            a.relay.not_ready = "no expert groups"
            await pool.add(request("r"))
            await until(lambda: pool.in_flight["r"].shard == "" and pool.in_flight["r"].attempts == 1)
            a.relay.not_ready = None
            await until(lambda: "r+1" in a.engine.running)
            assert not pool.in_flight["r"].deaths

    asyncio.run(scenario())


def test_what_the_engine_aborts_by_itself_goes_on_elsewhere() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await begin(pool, a, 3)
            end = EngineCoreOutput("r", [], finish_reason=FinishReason.ABORT)
            a.engine._steps.put_nowait(EngineCoreOutputs(outputs=[end]))
            await until(lambda: "r+1" in a.engine.running)

    asyncio.run(scenario())


def test_a_client_cannot_pretend_to_have_tokens() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await all_ready(pool, 1)
            sent = request("r")
            sent.sampling_params.extra_args = {GENERATED: [1, 2], "other": 3}
            await pool.add(sent)
            await until(lambda: "r" in a.engine.running)
            assert a.engine.running["r"].sampling_params.extra_args == {"other": 3}

    asyncio.run(scenario())
