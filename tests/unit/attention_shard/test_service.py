"""The shard's server over a real channel: a Connect that is given up does not hinder the next one."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from moeray.attention_shard import link as wire
from moeray.attention_shard import service as service_module
from moeray.attention_shard.engine import EngineLost
from moeray.attention_shard.service import ShardService
from moeray.attention_shard.spec import ShardSpec
from moeray.placement import contiguous
from moeray.transport import LocalTransport, Transport
from moeray.vllm_hooks.hop import Hop
from moeray.vllm_hooks.route import Route
from moeray.vllm_hooks.route_feed import RouteFeed

PLACEMENT = contiguous(generation=1, num_layers=1, num_experts=2, num_groups=1)
CONNECT = wire.encode(wire.Connect(1, PLACEMENT.to_json(), ["group-a"], ["127.0.0.1:1"]))
WAIT_S = 60.0


class Engine:
    """An engine of one worker with a hop and a feed of its own; the call named in `slow` waits for `go_on`."""

    vllm = model = "x"
    kv_tokens = pid = 0
    max_running = 8
    kv_events = None
    num_workers = 1

    def __init__(self, slow: str) -> None:
        self.slow, self.go_on, self.called = slow, asyncio.Event(), list[str]()
        self.reached = asyncio.Event()
        self.ended: asyncio.Future[None] = asyncio.Future()
        self.feed: RouteFeed | None = None
        self.hop = Hop()
        self.hop.set_up(self.connect)

    def connect(self, route: Route, absent: frozenset[int], in_a_hurry: bool) -> Transport:
        return LocalTransport(route.placement, lambda layer, x_TD, ids_TK: x_TD)

    async def call_worker(self, method: str, *args: Any) -> Any:
        self.called.append(method)
        if method == self.slow:
            self.reached.set()
            await self.go_on.wait()
        if method == "moeray_follow_routes":
            self.feed = await asyncio.to_thread(RouteFeed, args[0], lambda: [self.hop])
        return {"moeray_hop": self.hop.report(), "moeray_kv_cache": {}}.get(method)

    async def get_output_async(self) -> Any:
        await self.ended


async def connected(engine: Engine) -> tuple[ShardService, asyncio.Task[None]]:
    """A service that runs, its engine on its first route."""
    service = ShardService(ShardSpec("s0", {}), engine, lambda *_: None, lambda _: None)  # type: ignore[arg-type]
    running = asyncio.create_task(service.run())
    await asyncio.wait_for(service._move(Route(PLACEMENT, ("group-a",), ("127.0.0.1:1",)), {}), WAIT_S)
    return service, running


@pytest.mark.parametrize("slow", ["moeray_follow_routes", "moeray_choose_micro_batches"])
async def test_a_first_connect_that_is_given_up_does_not_hinder_the_next_one(slow: str) -> None:
    engine = Engine(slow)
    service = ShardService(ShardSpec("s0", {}), engine, lambda *_: None, lambda _: None)  # type: ignore[arg-type]
    port = await service.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        connect = channel.unary_unary(wire.CONNECT)
        given_up = connect(CONNECT, timeout=WAIT_S)
        await asyncio.wait_for(engine.reached.wait(), WAIT_S)
        given_up.cancel()
        again = asyncio.ensure_future(connect(CONNECT, timeout=WAIT_S))
        await asyncio.sleep(0.1)  # it may have come before the engine answers
        engine.go_on.set()
        info = wire.decode_shard_info(await again)
    assert (info.state, info.generation, info.hop["generation"]) == ("ready", 1, 1)
    assert engine.called.count("moeray_follow_routes") == 1
    assert service._routes is not None
    routes = await service._routes
    assert (routes._num_workers, len(routes._workers)) == (1, 1)
    await service._close("done", 0)


async def test_a_shard_whose_engine_can_be_moved_no_more_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "ENGINE_END_S", 0.1)
    engine = Engine(slow="")
    _, running = await connected(engine)
    assert engine.feed is not None and not running.done()
    engine.feed.close()
    with pytest.raises(EngineLost, match="follows no routes any more") as caught:
        await asyncio.wait_for(running, WAIT_S)
    assert caught.value.code == wire.EXPERTS_LOST


async def test_an_engine_that_ends_says_why_although_its_feed_has_hung_up_before() -> None:
    engine = Engine(slow="")
    service, running = await connected(engine)
    assert engine.feed is not None and service._routes is not None
    engine.feed.close()
    await asyncio.wait_for((await service._routes).hung_up(), WAIT_S)
    engine.ended.set_exception(EngineLost(wire.ENGINE_DEAD, "was killed by SIGSEGV"))
    with pytest.raises(EngineLost, match="was killed by SIGSEGV"):
        await asyncio.wait_for(running, WAIT_S)
