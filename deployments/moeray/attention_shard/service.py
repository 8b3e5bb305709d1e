"""`moeray.internal.v1.Shard` on grpc.aio: the relay's Link beside the unary Connect and Info."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import msgspec

from moeray.attention_shard import link as wire
from moeray.attention_shard.channels import add_port
from moeray.attention_shard.engine import EngineLost, ShardEngine
from moeray.attention_shard.kv_events import CachedBlocks, follow
from moeray.attention_shard.relay import Relay, handlers
from moeray.attention_shard.routes import RouteServer
from moeray.attention_shard.spec import ShardSpec
from moeray.mutual_tls import ClusterCertificate
from moeray.placement import Placement
from moeray.vllm_hooks.hop import Accuse
from moeray.vllm_hooks.route import Route

logger = logging.getLogger(__name__)

ENGINE_END_S = 5.0
"""An engine that ends hangs up its route feed first, and says why in so long."""

_NOT_CONNECTED = "not connected to its expert groups yet"


class ShardService:
    """One shard's server. `run` ends only by raising EngineLost."""

    def __init__(
        self,
        spec: ShardSpec,
        engine: ShardEngine,
        on_accused: Accuse,
        on_waiting: Callable[[bool], None],
    ) -> None:
        """What the hop says beside serving.

        Args:
            on_accused: `(group_id, reason, charge)`, when it found a group bad; see `hop.Accuse`.
            on_waiting: when a layer call begins or ends to wait for experts; see `hop.OnWaiting`.
        """
        hello = wire.Hello(wire.PROTOCOL_VERSION, engine.vllm, engine.model, f"attention shard {spec.shard}")
        self.relay = Relay(engine, hello)
        self.relay.kv_tokens = engine.kv_tokens
        self.relay.not_ready = _NOT_CONNECTED if spec.wait_for_connect else None
        self._spec, self._engine = spec, engine
        self._generation = 0
        self._connecting = asyncio.Lock()
        self._routes: asyncio.Task[RouteServer] | None = None
        self._fed: asyncio.Future[RouteServer] = asyncio.get_running_loop().create_future()
        self._on_accused, self._on_waiting = on_accused, on_waiting
        self._lost = False
        self._server = grpc.aio.server(options=wire.CHANNEL_OPTIONS)
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Bind; returns the port.

        Raises:
            RuntimeError: the address is taken.
            CertificateError: a file of `cluster_tls` cannot be used.
        """
        if (published := self._engine.kv_events) is not None:
            endpoint, algorithm = published
            blocks = CachedBlocks(algorithm)
            self.relay.everything_cached = blocks.everything
            self._following = asyncio.create_task(follow(endpoint, blocks, self.relay.cache_changed))
            self._following.add_done_callback(_say_why)
        unary = {"Connect": self._connect, "Info": self._info}
        self._server.add_generic_rpc_handlers((handlers(self.relay, unary),))
        port = add_port(self._server, f"{self._spec.host}:{self._spec.port}", ClusterCertificate.of(self._spec.tls))
        await self._server.start()
        return port

    async def run(self) -> None:
        """Serve until the engine is gone, or can be moved no more.

        Raises:
            EngineLost: with the reason.
        """
        relaying, hung_up = asyncio.create_task(self.relay.run()), asyncio.create_task(self._hung_up())
        try:
            await asyncio.wait({relaying, hung_up}, return_when=asyncio.FIRST_COMPLETED)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(relaying, ENGINE_END_S)
            raise EngineLost(wire.EXPERTS_LOST, "a worker of its engine follows no routes any more")
        finally:
            relaying.cancel()
            hung_up.cancel()

    async def _hung_up(self) -> None:
        await (await self._fed).hung_up()

    async def drain(self, reason: str, drain_s: float, hurry: asyncio.Event) -> None:
        """Take nothing new, let requests in flight end for at most `drain_s` (or until `hurry`), then close."""
        self.relay.drain(reason)

        async def idle() -> None:
            while self.relay.num_requests:
                await asyncio.sleep(0.02)

        waits = {asyncio.create_task(idle()), asyncio.create_task(hurry.wait())}
        await asyncio.wait(waits, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        self.relay.fail(wire.DRAINING, reason)
        await self._close(reason, grace_s=1.0)

    async def fail(self, code: str, reason: str, grace_s: float) -> None:
        """Tell every ingress why the engine is gone."""
        logger.error("%s", reason)
        self._lost = True
        self.relay.fail(code, reason)
        await self._close(reason, grace_s)

    async def _close(self, reason: str, grace_s: float) -> None:
        self.relay.close(reason)
        await self._server.stop(grace_s)

    async def _connect(self, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        try:
            request = wire.decode_connect(data)
        except msgspec.DecodeError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{self._spec.shard}: bad Connect: {error}")
        if request.generation < self._generation:
            why = f"{self._spec.shard} is on generation {self._generation}, Connect asks for {request.generation}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, why)
        try:
            route = Route(Placement.from_json(request.placement), tuple(request.groups), tuple(request.addresses))
            await self._move(route, request.row_servers)
        except Exception as error:  # noqa: BLE001  vLLM carries a worker's error across as a bare Exception
            why = f"{self._spec.shard}: generation {request.generation} could not be connected: {error}"
            if not self._generation:
                self.relay.not_ready = why
            await context.abort(grpc.StatusCode.UNAVAILABLE, why)
        return wire.encode(await self._describe(tensors=False))

    async def _move(self, route: Route, row_servers: Mapping[int, str]) -> None:
        """Raises whatever kept the engine from moving to this route."""
        if self._routes is None or (self._routes.done() and self._routes.exception() is not None):
            self._routes = asyncio.create_task(self._feed())
        routes = await asyncio.shield(self._routes)  # who asks first may give up meanwhile: the next one needs it, too
        routes.place_rows(row_servers)  # first: a step that waits for rows does not take the route
        await routes.publish(route)  # not under the lock: a newer route must get through to a step that waits
        async with self._connecting:
            if not self._generation:
                await self._engine.call_worker("moeray_choose_micro_batches")
            self._generation = max(self._generation, route.generation)
            self.relay.not_ready = None

    def _waiting(self, waits: bool) -> None:
        self.relay.experts_awaited(waits)
        self._on_waiting(waits)

    async def _feed(self) -> RouteServer:
        """With every worker of the engine connected."""
        routes = RouteServer(self._on_accused, self._waiting)
        await self._engine.call_worker("moeray_follow_routes", await routes.start())
        await routes.connected(self._engine.num_workers)
        self._fed.set_result(routes)
        return routes

    async def _info(self, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        try:
            request = wire.decode_info(data)
        except msgspec.DecodeError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{self._spec.shard}: bad Info: {error}")
        return wire.encode(await self._describe(request.tensors))

    async def _describe(self, tensors: bool) -> wire.ShardInfo:
        relay = self.relay
        hop: dict[str, Any] = {}
        if self._generation and not self._lost:
            hop = await self._engine.call_worker("moeray_hop")
        return wire.ShardInfo(
            shard=self._spec.shard,
            state=self._state(),
            pid=os.getpid(),
            engine_pid=self._engine.pid,
            vllm=self._engine.vllm,
            model=self._engine.model,
            generation=self._generation,
            num_running=relay.num_running,
            num_waiting=relay.num_waiting,
            num_requests=relay.num_requests,
            max_running=self._engine.max_running,
            kv_use=relay.kv_use,
            links=relay.link_names,
            hop=hop,
            kv_cache={} if self._lost else await self._engine.call_worker("moeray_kv_cache"),
            tensors=await self._engine.call_worker("moeray_tensors") if tensors else None,
        )

    def _state(self) -> str:
        if self._lost:
            return "lost"
        if self.relay.draining is not None:
            return "draining"
        return "starting" if self.relay.not_ready is not None else "ready"


def _say_why(following: asyncio.Task[None]) -> None:
    """The events of the cache ended: ingresses go by what they know, and by load."""
    if not following.cancelled() and (error := following.exception()) is not None:
        logger.error("the engine's KV events could not be read: %s", error)
