"""The pool: which shard runs which request, and what happens when a shard goes.

Implements `moeray.vllm_hooks.engine_core.RequestPool`. Single event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import TYPE_CHECKING

from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from moeray.attention_shard import link as wire
from moeray.ingress.in_flight import InFlight
from moeray.ingress.shard_link import LinkState, ShardLink
from moeray.vllm_hooks.engine_core import NoShardReady, RequestFailed, ShardLost

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger(__name__)

MAX_UNREAD_STEPS = 1000
"""Engine steps that may wait for the front; above it the links are not read, and the shards hold the rest."""


class ShardPool:
    """Spreads requests over the linked shards, least loaded first.

    Attributes:
        in_flight: request id -> InFlight, for every request that has not ended.
    """

    def __init__(self, hello: wire.Hello) -> None:
        self.in_flight: dict[str, InFlight] = {}
        self._hello = hello
        self._held = ""
        self._links: dict[str, ShardLink] = {}
        self._load: Counter[str] = Counter()
        self._served: Counter[str] = Counter()
        self._leaving: set[str] = set()
        self._retiring: asyncio.Task[None] | None = None  # kept, or the loop may drop it
        self._events: asyncio.Queue[EngineCoreOutputs | RequestFailed] = asyncio.Queue()
        self._encoder = MsgpackEncoder()
        self._decoder = MsgpackDecoder(EngineCoreOutputs)

    @property
    def is_serving(self) -> bool:
        """Whether a request would find a shard now."""
        return not self._held and bool(self.ready_shards)

    @property
    def ready_shards(self) -> list[str]:
        return [
            shard for shard, link in self._links.items() if link.state is LinkState.READY and shard not in self._leaving
        ]

    def describe(self) -> dict[str, dict[str, object]]:
        """Per shard: address, state, why it is not ready, requests of this ingress."""
        return {
            shard: {"address": link.address, "state": link.state.value, "why": link.why, "requests": self._load[shard]}
            for shard, link in self._links.items()
        }

    def hold(self, reason: str) -> None:
        """Refuse new requests with this reason until it is empty again."""
        self._held = reason

    async def set_shards(self, shards: Mapping[str, str]) -> None:
        """Make the pool exactly these shards (name -> host:port).

        A shard that is no longer named takes nothing new; what it runs goes on until it ends or the link does.
        """
        for name, link in list(self._links.items()):
            if name not in shards and self._load[name]:
                self._leaving.add(name)
            elif shards.get(name) != link.address:
                await self._remove(name, "removed from the pool")
        for name, address in shards.items():
            self._leaving.discard(name)
            if name not in self._links:
                self._links[name] = ShardLink(name, address, self._hello, self._take, self._lost)

    async def close(self) -> None:
        for name in list(self._links):
            await self._remove(name, "the ingress is stopping")

    async def _remove(self, shard: str, reason: str) -> None:
        self._leaving.discard(shard)
        if (link := self._links.pop(shard, None)) is not None:
            await link.close()
            self._settle(shard, reason)

    def check_ready(self) -> None:
        if not self.is_serving:
            raise NoShardReady(self._held or self._why_none())

    async def add(self, request: EngineCoreRequest) -> None:
        self.check_ready()
        shard = min(self.ready_shards, key=lambda name: (self._load[name], self._served[name]))
        self._served[shard] += 1
        self.in_flight[request.request_id] = InFlight(request, shard)
        self._load[shard] += 1
        self._links[shard].send(wire.Add(wire.copied(self._encoder.encode(request))))

    async def abort(self, request_ids: list[str]) -> None:
        by_shard: dict[str, list[str]] = {}
        for request_id in request_ids:
            if (known := self._end(request_id)) is not None:
                by_shard.setdefault(known.shard, []).append(request_id)
        for shard, ids in by_shard.items():
            if (link := self._links.get(shard)) is not None:
                link.send(wire.Abort(ids))

    async def next_event(self) -> EngineCoreOutputs | RequestFailed:
        return await self._events.get()

    async def _take(self, link: ShardLink, frame: wire.FromShard) -> None:
        if isinstance(frame, wire.Outputs):
            step: EngineCoreOutputs = self._decoder.decode(frame.outputs)
            for output in step.outputs:
                if (known := self.in_flight.get(output.request_id)) is not None:
                    known.record(output)
                    if output.finish_reason is not None:
                        self._end(output.request_id)
            self._events.put_nowait(step)
            while self._events.qsize() > MAX_UNREAD_STEPS:
                await asyncio.sleep(0.005)
        elif isinstance(frame, wire.Failed):
            for request_id in frame.request_ids:
                if (known := self._end(request_id)) is not None:
                    self._on_shard_lost(known, frame.reason)

    def _lost(self, link: ShardLink, reason: str) -> None:
        self._settle(link.shard, reason)

    def _settle(self, shard: str, reason: str) -> None:
        for request_id in [i for i, known in self.in_flight.items() if known.shard == shard]:
            known = self._end(request_id)
            assert known is not None
            self._on_shard_lost(known, reason)

    def _on_shard_lost(self, lost: InFlight, reason: str) -> None:
        """Decide what becomes of a request whose shard is gone: today it fails, with the shard and the reason named.

        The one place for another answer: `lost` holds the rendered prompt and every token the client has.
        """
        error = ShardLost(lost.shard, reason)
        self._events.put_nowait(RequestFailed(lost.request.request_id, error))

    def _end(self, request_id: str) -> InFlight | None:
        known = self.in_flight.pop(request_id, None)
        if known is not None:
            self._load[known.shard] -= 1
            if known.shard in self._leaving and not self._load[known.shard]:
                self._retiring = asyncio.create_task(self._remove(known.shard, "removed from the pool"))
        return known

    def _why_none(self) -> str:
        if not self._links:
            return "no attention shard has joined this ingress yet"
        states = "; ".join(f"{name}: {link.why or link.state.value}" for name, link in self._links.items())
        return f"no attention shard is ready ({states})"
