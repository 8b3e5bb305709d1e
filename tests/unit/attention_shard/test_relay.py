"""The relay over real gRPC on loopback; only the engine is scripted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import msgspec
import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from moeray.attention_shard import link as wire
from moeray.attention_shard.relay import Relay, handlers

SHARD = wire.Hello(wire.PROTOCOL_VERSION, "0.32.0", "abc/2048", "attention shard s0")
INGRESS = msgspec.structs.replace(SHARD, name="ingress i0")

_decode_outputs = MsgpackDecoder(EngineCoreOutputs).decode


class ScriptedEngine:
    """Takes what the relay gives it and says what the test tells it to."""

    def __init__(self) -> None:
        self.added: asyncio.Queue[str] = asyncio.Queue()
        self.aborted: asyncio.Queue[str] = asyncio.Queue()
        self.steps: asyncio.Queue[EngineCoreOutputs | Exception] = asyncio.Queue()

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        self.added.put_nowait(request.request_id)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.aborted.put_nowait(request_id)

    async def get_output_async(self) -> EngineCoreOutputs:
        step = await self.steps.get()
        if isinstance(step, Exception):
            raise step
        return step

    def step(self, **tokens: int | tuple[int, FinishReason]) -> None:
        outputs = []
        for request_id, token in tokens.items():
            token_id, finish = token if isinstance(token, tuple) else (token, None)
            outputs.append(EngineCoreOutput(request_id, [token_id], finish_reason=finish))
        self.steps.put_nowait(EngineCoreOutputs(outputs=outputs))


class Ingress:
    """One end of a Link, by hand."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call = channel.stream_stream(wire.LINK)()

    async def greet(self, hello: wire.Hello = INGRESS) -> wire.FromShard:
        await self.send(hello)
        return await self.read()

    async def send(self, frame: wire.ToShard) -> None:
        await self.call.write(wire.encode(frame))

    async def add(self, *request_ids: str) -> None:
        for request_id in request_ids:
            await self.send(wire.Add([bytes(b) for b in MsgpackEncoder().encode(_request(request_id))]))

    async def read(self) -> wire.FromShard:
        """The next frame that is no Load."""
        while isinstance(frame := await self.read_any(), wire.Load):
            pass
        return frame

    async def read_any(self) -> wire.FromShard:
        try:
            data = await asyncio.wait_for(self.call.read(), 60)
        except grpc.aio.AioRpcError as error:
            raise ConnectionError(f"{error.code().name}: {error.details()}") from error
        if data is grpc.aio.EOF:
            raise ConnectionError(f"{(await self.call.code()).name}: {await self.call.details()}")
        return wire.decode_from_shard(data)

    async def read_to_end(self) -> None:
        while True:
            await self.read()

    async def read_tokens(self) -> dict[str, list[int]]:
        frame = await self.read()
        assert isinstance(frame, wire.Outputs), frame
        return {output.request_id: output.new_token_ids for output in _decode_outputs(frame.outputs).outputs}


def _request(request_id: str) -> EngineCoreRequest:
    return EngineCoreRequest(request_id, [1, 2], None, SamplingParams(), None, 0.0, None, None, None)


class Served:
    def __init__(self, engine: ScriptedEngine, relay: Relay, port: int) -> None:
        self.engine, self.relay, self.port = engine, relay, port
        self.channels: list[grpc.aio.Channel] = []

    async def ingress(self, name: str = "i0") -> Ingress:
        ingress = self.connect()
        assert await ingress.greet(msgspec.structs.replace(INGRESS, name=f"ingress {name}")) == SHARD
        return ingress

    def connect(self) -> Ingress:
        # A channel of its own: a slow reader must only fill its own connection.
        options = (
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", 65_536),
        )
        self.channels.append(grpc.aio.insecure_channel(f"127.0.0.1:{self.port}", options=options))
        return Ingress(self.channels[-1])


@asynccontextmanager
async def served(max_queued_bytes: int = 32 << 20) -> AsyncIterator[Served]:
    engine = ScriptedEngine()
    relay = Relay(engine, SHARD, max_queued_bytes)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handlers(relay, {}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pump = asyncio.create_task(relay.run())
    shard = Served(engine, relay, port)
    try:
        yield shard
    finally:
        pump.cancel()
        for channel in shard.channels:
            await channel.close()
        await server.stop(None)


def test_one_message_per_step_carries_all_requests_of_that_ingress_and_no_other() -> None:
    async def scenario() -> None:
        async with served() as shard:
            one, other = await shard.ingress("i0"), await shard.ingress("i1")
            await one.add("a", "b")
            await other.add("c")
            for _ in range(3):
                await asyncio.wait_for(shard.engine.added.get(), 5)

            shard.engine.step(a=1, b=2, c=3)
            shard.engine.step(a=4)

            assert await one.read_tokens() == {"a": [1], "b": [2]}
            assert await one.read_tokens() == {"a": [4]}
            assert await other.read_tokens() == {"c": [3]}

    asyncio.run(scenario())


@pytest.mark.parametrize(("field", "value"), [("vllm", "0.31.0"), ("protocol", 99), ("model", "other/2048")])
def test_a_mismatch_is_refused_and_names_both_sides(field: str, value: object) -> None:
    async def scenario() -> None:
        async with served() as shard:
            with pytest.raises(ConnectionError, match="FAILED_PRECONDITION") as refused:
                await shard.connect().greet(msgspec.structs.replace(INGRESS, **{field: value}))
            for part in (field, "attention shard s0", "ingress i0", str(value), str(getattr(SHARD, field))):
                assert part in str(refused.value)

    asyncio.run(scenario())


def test_a_link_without_hello_is_refused() -> None:
    async def scenario() -> None:
        async with served() as shard:
            ingress = shard.connect()
            await ingress.add("a")
            with pytest.raises(ConnectionError, match=r"FAILED_PRECONDITION.*hello"):
                await ingress.read()
            assert shard.engine.added.empty()

    asyncio.run(scenario())


def test_a_shard_without_experts_asks_the_ingress_to_come_back() -> None:
    async def scenario() -> None:
        async with served() as shard:
            shard.relay.not_ready = "not connected to its expert groups yet"
            with pytest.raises(ConnectionError, match=r"UNAVAILABLE.*not connected"):
                await shard.connect().greet()

    asyncio.run(scenario())


def test_a_vanished_ingress_leaves_no_request_running() -> None:
    async def scenario() -> None:
        async with served() as shard:
            ingress, other = await shard.ingress("i0"), await shard.ingress("i1")
            await ingress.add("a", "b")
            await other.add("c")
            for _ in range(3):
                await asyncio.wait_for(shard.engine.added.get(), 5)
            shard.engine.step(b=(1, FinishReason.STOP))
            await ingress.read_tokens()

            ingress.call.cancel()

            assert await asyncio.wait_for(shard.engine.aborted.get(), 5) == "a"
            shard.engine.step(a=2, c=3)
            assert await other.read_tokens() == {"c": [3]}
            assert shard.relay.num_requests == 1 and shard.engine.aborted.empty()
            assert shard.relay.link_names == ["ingress i1"]

    asyncio.run(scenario())


def test_an_ingress_cannot_abort_the_request_of_another() -> None:
    async def scenario() -> None:
        async with served() as shard:
            one, other = await shard.ingress("i0"), await shard.ingress("i1")
            await one.add("a")
            await asyncio.wait_for(shard.engine.added.get(), 5)
            await other.send(wire.Abort(["a", "unknown"]))
            await one.send(wire.Abort(["a"]))
            assert await asyncio.wait_for(shard.engine.aborted.get(), 5) == "a"
            await asyncio.sleep(0.05)
            assert shard.engine.aborted.empty()

    asyncio.run(scenario())


def test_a_slow_ingress_is_dropped_with_its_requests_and_the_others_never_wait() -> None:
    async def scenario() -> None:
        async with served(max_queued_bytes=200_000) as shard:
            slow, quick = await shard.ingress("slow"), await shard.ingress("quick")
            await slow.add("a")
            await quick.add("b")
            for _ in range(2):
                await asyncio.wait_for(shard.engine.added.get(), 5)

            step = EngineCoreOutputs(outputs=[EngineCoreOutput("a", list(range(20_000))), EngineCoreOutput("b", [1])])
            for _ in range(100):  # 6 MB that `slow` never reads
                shard.engine.steps.put_nowait(step)
                assert await quick.read_tokens() == {"b": [1]}

            assert await asyncio.wait_for(shard.engine.aborted.get(), 5) == "a"
            assert max(link.queued_bytes for link in shard.relay._links) <= 200_000
            with pytest.raises(ConnectionError, match=r"RESOURCE_EXHAUSTED.*ingress slow is .* bytes behind"):
                await slow.read_to_end()

    asyncio.run(scenario())


def test_the_death_of_the_engine_reaches_every_request_with_its_reason() -> None:
    async def scenario() -> None:
        async with served() as shard:
            one, other = await shard.ingress("i0"), await shard.ingress("i1")
            await one.add("a", "b")
            await other.add("c")
            for _ in range(3):
                await asyncio.wait_for(shard.engine.added.get(), 5)

            shard.relay.fail(wire.EXPERTS_LOST, "expert group 1 lost: end of file")

            assert await one.read() == wire.Failed(["a", "b"], wire.EXPERTS_LOST, "expert group 1 lost: end of file")
            assert await other.read() == wire.Failed(["c"], wire.EXPERTS_LOST, "expert group 1 lost: end of file")
            await other.add("d")
            assert await other.read() == wire.Failed(["d"], wire.EXPERTS_LOST, "expert group 1 lost: end of file")

    asyncio.run(scenario())


def test_a_draining_shard_finishes_what_it_has_and_takes_nothing_new() -> None:
    async def scenario() -> None:
        async with served() as shard:
            ingress = await shard.ingress()
            await ingress.add("a")
            await asyncio.wait_for(shard.engine.added.get(), 5)
            shard.relay.drain("going down")
            assert await ingress.read() == wire.Draining("going down")
            await ingress.add("b")
            assert await ingress.read() == wire.Failed(["b"], wire.DRAINING, "going down")
            shard.engine.step(a=1)
            assert await ingress.read_tokens() == {"a": [1]}

    asyncio.run(scenario())


def test_a_frame_that_is_not_ours_ends_the_link_and_nothing_else() -> None:
    async def scenario() -> None:
        async with served() as shard:
            ingress = await shard.ingress()
            await ingress.add("a")
            await asyncio.wait_for(shard.engine.added.get(), 5)
            await ingress.call.write(b"\xc1garbage")
            with pytest.raises(ConnectionError, match=r"INVALID_ARGUMENT.*bad frame"):
                await ingress.read()
            assert await asyncio.wait_for(shard.engine.aborted.get(), 5) == "a"
            await (await shard.ingress("i1")).add("b")
            assert await asyncio.wait_for(shard.engine.added.get(), 5) == "b"

    asyncio.run(scenario())


def test_a_shard_says_what_it_holds_and_what_the_requests_of_others_will_fill() -> None:
    async def scenario() -> None:
        async with served() as shard:
            shard.relay.kv_tokens = 1000
            one, other = await shard.ingress("i0"), await shard.ingress("i1")
            await one.add("a", "b")
            for _ in range(2):
                await asyncio.wait_for(shard.engine.added.get(), 5)
            each = 2 + (SamplingParams().max_tokens or 0)

            async def others_tokens(ingress: Ingress, expected: int) -> None:
                async with asyncio.timeout(60):
                    while await ingress.read_any() != wire.Load(1000, expected, 0, 0):
                        pass

            await others_tokens(other, 2 * each)
            await others_tokens(one, 0)
            await one.send(wire.Abort(["a", "b"]))
            await others_tokens(other, 0)

    asyncio.run(scenario())
