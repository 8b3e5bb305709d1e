"""Both ends of the route feed over a real socket: the hop moves, refusals and accusations come back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

import pytest
import torch

from moeray.attention_shard.routes import RouteRefused, RouteServer
from moeray.membership import Charge
from moeray.placement import contiguous
from moeray.transport import HandshakeRefused, LocalTransport, Transport
from moeray.vllm_hooks.hop import Hop
from moeray.vllm_hooks.route import Route
from moeray.vllm_hooks.route_feed import RouteFeed


def route(generation: int) -> Route:
    placement = contiguous(generation=generation, num_layers=1, num_experts=2, num_groups=1)
    return Route(placement, ("group-a",), ("127.0.0.1:1",))


class Engine:
    """A process' hop and its feed; generations in `refused` cannot be reached."""

    def __init__(self, refused: tuple[int, ...] = ()) -> None:
        self.hop, self.refused = Hop(), refused
        self.hop.set_up(self.connect)
        self.connected: list[int] = []
        self.failures = 0
        self.feed: RouteFeed | None = None

    def connect(self, wanted: Route, absent: frozenset[int], in_a_hurry: bool) -> Transport:
        if wanted.generation in self.refused:
            raise HandshakeRefused(f"generation {wanted.generation} is unknown there")
        self.connected.append(wanted.generation)
        return LocalTransport(wanted.placement, self.compute)

    def compute(self, layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("this group is broken")
        return x_TD.repeat_interleave(2, dim=0)

    def call(self) -> None:
        self.hop.dispatch(0, torch.ones(1, 4), torch.tensor([[0, 1]], dtype=torch.int32), torch.ones(1, 2))
        self.hop.combine()


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 60))


async def following(
    engines: list[Engine], accused: list[tuple[str, str, Charge]], waits: list[bool] | None = None
) -> RouteServer:
    server = RouteServer(lambda *accusation: accused.append(accusation), [].append if waits is None else waits.append)
    name = await server.start()
    for engine in engines:
        engine.feed = await asyncio.to_thread(RouteFeed, name, lambda engine=engine: [engine.hop])
        engine.hop.set_up(engine.connect, on_waiting=engine.feed.waiting)
    await server.connected(len(engines))
    return server


def test_a_published_route_is_in_use_in_every_worker_when_it_returns() -> None:
    async def story() -> None:
        engines = [Engine(), Engine()]
        server = await following(engines, [])
        for generation in (1, 2):
            await server.publish(route(generation))
            for engine in engines:
                engine.call()
                assert engine.hop.generation == generation

    run(story())


def test_every_worker_hears_where_the_row_servers_are_before_the_route_that_comes_after() -> None:
    async def story() -> None:
        server = RouteServer(lambda *_: None, lambda _: None)
        name = await server.start()
        engine, heard = Engine(), list[dict[int, str]]()
        feed = await asyncio.to_thread(RouteFeed, name, lambda: [engine.hop], lambda servers: heard.append({**servers}))
        await server.connected(1)
        server.place_rows({0: "a:1", 2: "b:1"})
        server.place_rows({})
        await server.publish(route(1))
        assert heard == [{0: "a:1", 2: "b:1"}, {}]
        feed.close()

    run(story())


def test_a_route_that_says_the_same_again_moves_nobody() -> None:
    async def story() -> None:
        engine = Engine()
        server = await following([engine], [])
        await server.publish(route(1))
        await server.publish(route(1))
        assert engine.connected == [1]

    run(story())


def test_a_worker_that_cannot_move_says_why_and_stays_where_it_was() -> None:
    async def story() -> None:
        engine = Engine(refused=(2,))
        server = await following([engine], [])
        await server.publish(route(1))
        with pytest.raises(RouteRefused, match="generation 2 is unknown there"):
            await server.publish(route(2))
        assert engine.hop.generation == 1
        await server.publish(route(3))
        assert engine.hop.generation == 3

    run(story())


def test_one_worker_that_cannot_move_or_is_gone_is_enough_to_refuse() -> None:
    async def story() -> None:
        engines = [Engine(), Engine(refused=(2,))]
        server = await following(engines, [])
        await server.publish(route(1))
        with pytest.raises(RouteRefused, match="generation 2 is unknown there"):
            await server.publish(route(2))
        assert engines[1].feed is not None
        engines[1].feed.close()
        while len(server._workers) > 1:
            await asyncio.sleep(0.01)
        with pytest.raises(RouteRefused, match="1 of 2 workers"):
            await server.publish(route(3))

    run(story())


def test_a_newer_route_ends_the_waiting_for_an_older_one() -> None:
    async def story() -> None:
        engine = Engine()
        server = await following([engine], [])
        await server.publish(route(1))
        engine.hop.dispatch(0, torch.ones(1, 4), torch.tensor([[0, 1]], dtype=torch.int32), torch.ones(1, 2))
        older = asyncio.create_task(server.publish(route(2)))  # waits for the end of the layer call
        await asyncio.sleep(0.1)
        newer = asyncio.create_task(server.publish(route(3)))
        with pytest.raises(RouteRefused, match="newer"):
            await older
        await asyncio.to_thread(engine.hop.combine)
        await newer
        assert engine.hop.generation == 3

    run(story())


def test_accusations_reach_the_shard_process() -> None:
    async def story() -> None:
        engine, accused = Engine(), []
        await following([engine], accused)
        assert engine.feed is not None
        await asyncio.to_thread(engine.feed.accuse, "group-a", "no answer within 1 s", Charge.SLOW)
        while not accused:
            await asyncio.sleep(0.01)
        assert accused == [("group-a", "no answer within 1 s", Charge.SLOW)]

    run(story())


def test_a_layer_call_that_waits_for_experts_is_known_to_the_shard_process_until_it_ends() -> None:
    async def story() -> None:
        engine, waits = Engine(refused=(2,)), list[bool]()
        server = await following([engine], [], waits)
        await server.publish(route(1))
        engine.call()
        engine.hop.announce(route(2))
        engine.failures = 1
        calling = asyncio.create_task(asyncio.to_thread(engine.call))
        while not waits:
            await asyncio.sleep(0.01)
        assert waits == [True]
        engine.hop.announce(route(3))
        await calling
        while len(waits) < 2:
            await asyncio.sleep(0.01)
        assert waits == [True, False]

    run(story())


@pytest.mark.parametrize("how_it_ends", ["waiting", "close"])
def test_an_engine_waits_for_experts_until_its_last_worker_does_not(how_it_ends: str) -> None:
    async def story() -> None:
        engines, waits, accused = [Engine(), Engine()], list[bool](), list[Any]()
        await following(engines, accused, waits)
        one, other = (engine.feed for engine in engines)
        assert one is not None and other is not None
        one.waiting(True)
        while not waits:
            await asyncio.sleep(0.01)
        other.waiting(True)
        other.waiting(False)
        for feed in (one, other):
            feed.accuse("group-a", "said after that", Charge.SLOW)
        while len(accused) < 2:
            await asyncio.sleep(0.01)
        assert waits == [True]
        if how_it_ends == "waiting":
            one.waiting(False)
        else:
            one.close()
        while len(waits) < 2:
            await asyncio.sleep(0.01)
        assert waits == [True, False]

    run(story())


class Unprepared(Hop):
    """Fails on a route in a way that nobody foresaw."""

    def announce(self, route: Route) -> None:
        if route.generation == 2:
            raise AttributeError("generation 2")
        super().announce(route)


@pytest.mark.parametrize(
    "line",
    [b'{"number": 2}\n', json.dumps({"number": 2, "route": route(2).to_json()}).encode() + b"\n"],
    ids=["not a route", "not a route for it"],
)
def test_a_worker_that_cannot_read_its_routes_follows_none_and_the_shard_process_knows(line: bytes) -> None:
    async def story() -> None:
        engine = Engine()
        engine.hop = Unprepared()
        server = await following([engine], [])
        gone = asyncio.create_task(server.hung_up())
        await server.publish(route(1))
        assert not gone.done()
        for worker in server._workers:
            worker.write(line)
        await gone
        with pytest.raises(RouteRefused, match="0 of 1 workers"):
            await server.publish(route(3))

    run(story())


def test_a_feed_that_is_closed_is_forgotten() -> None:
    async def story() -> None:
        engine = Engine()
        server = await following([engine], [])
        assert engine.feed is not None
        engine.feed.close()
        while server._workers:
            await asyncio.sleep(0.01)

    run(story())
