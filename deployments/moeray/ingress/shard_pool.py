"""The pool: which shard runs which request, and what happens when a shard goes.

A request whose shard dies, hangs or drains goes on elsewhere, after the tokens that the client has. While no shard
takes requests it waits for one, and so do new ones for as long. Implements
`moeray.vllm_hooks.engine_core.RequestPool`. Single event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from math import inf
from typing import TYPE_CHECKING

import msgspec
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from moeray.attention_shard import link as wire
from moeray.config import ExpertsConfig, IngressConfig, KvCacheConfig
from moeray.ingress.admission import Admission
from moeray.ingress.in_flight import InFlight, Loss
from moeray.ingress.prefix_index import PrefixIndex, Sessions
from moeray.ingress.routing import Candidate, choose
from moeray.ingress.service_level import ServiceLevel
from moeray.ingress.shard_link import SILENCE_S, LinkState, ShardLink
from moeray.ingress.suspects import Suspects
from moeray.ingress.waiting import Waiting
from moeray.mutual_tls import ClusterCertificate
from moeray.telemetry import RequestMetrics
from moeray.vllm_hooks.admission import Need, Place, place_being_filled
from moeray.vllm_hooks.engine_core import NoShardReady, RequestFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

MAX_UNREAD_STEPS = 1000
"""Engine steps that may wait for the front; above it the links are not read, and the shards hold the rest."""
WAIT_S = 60.0
"""How long a request waits for a shard, if `ingress.max_wait_s` is not shorter."""
STOPPING = "the ingress is stopping"
PAUSE_S = 0.5
"""A linked shard that refuses a request is left alone for so long."""


class ShardPool:
    """Spreads requests over the linked shards: by cached prefix, session and load (`routing`).

    Args:
        wait_s: how long a request waits for a shard; None is WAIT_S, or `limits.max_wait_s` if that is shorter.
        silence_s: a shard that says nothing for so long is lost.
        stall_s: `experts.wait_s`; a request that waited for experts as long when its shard is lost, fails.
        metrics: told how requests go.
        on_begun: told the priorities of requests, of any ingress, that got their first token.
        kv_cache: where shards can fetch each other's blocks from; None: nowhere.

    Attributes:
        in_flight: request id -> InFlight, for every request that has not ended.
        continued: how often a request went on on another shard.
        level: what clients ask for, and how long they wait.
    """

    def __init__(
        self,
        hello: wire.Hello,
        limits: IngressConfig | None = None,
        *,
        wait_s: float | None = None,
        silence_s: float = SILENCE_S,
        stall_s: float = ExpertsConfig.wait_s,
        metrics: RequestMetrics | None = None,
        on_begun: Callable[[list[int]], None] | None = None,
        certificate: ClusterCertificate | None = None,
        kv_cache: KvCacheConfig | None = None,
    ) -> None:
        limits = limits or IngressConfig()
        self.admission = Admission(limits)
        self.in_flight: dict[str, InFlight] = {}
        self.continued = 0
        self.level = ServiceLevel()
        self._metrics = metrics or RequestMetrics()
        self.prefixes = PrefixIndex()
        self._kv_cache = kv_cache or KvCacheConfig(host_bytes=0)
        self._pool = ["pool"] if self._kv_cache.redis_url else []
        self._sessions = Sessions()
        self._hello = msgspec.structs.replace(hello, hears_cached=True)
        self._waiting = Waiting(min(WAIT_S, limits.max_wait_s) if wait_s is None else wait_s, self._give_up)
        self._silence_s, self._stall_s = silence_s, stall_s
        self._on_begun = on_begun
        self._certificate = certificate
        self._last_ready = -inf  # when a shard came or went; of use only while none is ready
        self._held = ""
        self._links: dict[str, ShardLink] = {}
        self._load: Counter[str] = Counter()
        self._others: dict[str, int] = {}  # requests that a shard has from other ingresses, as it last said
        self._served: Counter[str] = Counter()
        self._leaving: set[str] = set()
        self._paused: set[str] = set()
        self._suspects = Suspects()
        self._by_wire_id: dict[str, InFlight] = {}
        self._waiting_since: dict[str, float] = {}  # shards whose engine waits for experts
        self._retiring: set[asyncio.Task[None]] = set()  # kept, or the loop may drop them
        self._is_closing = False
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

    @property
    def num_waiting(self) -> int:
        """Accepted requests that no shard runs now."""
        return len(self._waiting)

    def describe(self) -> dict[str, dict[str, object]]:
        """Per shard: address, state, why it is not ready, requests of this ingress. From any thread."""
        return {
            shard: {"address": link.address, "state": link.state.value, "why": link.why, "requests": self._load[shard]}
            for shard, link in tuple(self._links.items())
        }

    def hold(self, reason: str) -> None:
        """Refuse new requests with this reason until it is empty again; those in flight go on."""
        self._held = reason

    async def set_shards(self, shards: Mapping[str, str]) -> None:
        """Make the pool exactly these shards (name -> host:port).

        A shard that is no longer named takes nothing new; what it runs goes on until it ends or the link does. A pool
        that closes opens no link any more.
        """
        if self._is_closing:
            return
        if shards.keys() != self._links.keys():
            self.level.changed()
        for name, link in list(self._links.items()):
            if name not in shards and self._load[name]:
                self._leaving.add(name)
            elif shards.get(name) != link.address:
                await self._remove(name)
        for name, address in shards.items():
            self._leaving.discard(name)
            if name not in self._links:
                self._links[name] = ShardLink(
                    name, address, self._hello, self._take, self._ready, self._lost, self._silence_s, self._certificate
                )

    async def close(self) -> None:
        """What still runs or waits fails, and whatever comes afterwards."""
        self._is_closing = True
        self.hold(STOPPING)
        for name in list(self._links):
            await self._remove(name)
        for known in list(self.in_flight.values()):
            self._fail(known, NoShardReady(STOPPING))

    async def _remove(self, shard: str) -> None:
        self._leaving.discard(shard)
        if (link := self._links.pop(shard, None)) is not None:
            if link.state is LinkState.READY:
                self._last_ready = asyncio.get_running_loop().time()
            await link.close()
            self._move_all(shard, Loss.GONE, link.why)
            self._forget_node(link)
        self.prefixes.forget(shard)
        for known_of in (self._served, self._waiting_since, self._others):
            known_of.pop(shard, None)

    def _forget_node(self, link: ShardLink) -> None:
        """Of a shard that is gone: what its node's memory has, unless another shard is there to fetch it."""
        for node in self._node(link):
            if not any(node in self._node(other) for other in self._links.values()):
                self.prefixes.forget(node)

    async def _retire(self, shard: str) -> None:
        """Let go of one that was leaving and has nothing left, unless it was named again meanwhile."""
        if shard in self._leaving:
            await self._remove(shard)

    def check_ready(self) -> None:
        if self._held or not (self.ready_shards or self._was_ready_lately()):
            raise NoShardReady(self._held or self._why_none())

    def admit(self, need: Need) -> Place:
        self.level.asked(need.num_prompt, need.num_sequences)
        self.check_ready()
        return self.admission.admit(need, self.ready_shards)

    async def add(self, request: EngineCoreRequest) -> None:
        now = asyncio.get_running_loop().time()
        known = self.in_flight[request.request_id] = InFlight(request, now, place=place_being_filled())
        if self._is_closing:  # it was admitted before
            self._fail(known, NoShardReady(STOPPING))
            return
        try:
            self._place(known)
        except Exception:  # it cannot be sent, or there is a mistake here: whoever asked is told, and nothing stays
            self._end(known)
            raise

    async def abort(self, request_ids: list[str]) -> None:
        by_shard: dict[str, list[str]] = {}
        for request_id in request_ids:
            if (known := self.in_flight.get(request_id)) is not None:
                by_shard.setdefault(known.shard, []).append(known.wire_id)
                self._end(known)
        for shard, wire_ids in by_shard.items():
            if (link := self._links.get(shard)) is not None:
                link.send(wire.Abort(wire_ids))

    async def next_event(self) -> EngineCoreOutputs | RequestFailed:
        return await self._events.get()

    # ---- what shards say

    async def _take(self, link: ShardLink, frame: wire.FromShard) -> None:
        if isinstance(frame, wire.Outputs):
            self._pass_on(self._decoder.decode(frame.outputs))
            while self._events.qsize() > MAX_UNREAD_STEPS:
                await asyncio.sleep(0.005)
        elif isinstance(frame, wire.Load):
            self.admission.report(link.shard, frame)
            self._others[link.shard] = max(0, frame.num_running + frame.num_waiting - self._load[link.shard])
            if self._on_begun is not None and frame.begun:
                self._on_begun(frame.begun)
            if frame.waits_s:
                self._waiting_since[link.shard] = asyncio.get_running_loop().time() - frame.waits_s
            else:
                self._waiting_since.pop(link.shard, None)
        elif isinstance(frame, wire.Cached):
            self.prefixes.take(link.shard, frame, [*self._node(link), *self._pool])
        elif isinstance(frame, wire.Failed):
            died = frame.code == wire.ENGINE_DEAD
            if not died:
                self._pause(link.shard)
            for wire_id in frame.request_ids:
                if (known := self._by_wire_id.get(wire_id)) is not None:
                    self._move(known, Loss.DIED if died else Loss.LEFT, frame.reason)

    def _pass_on(self, step: EngineCoreOutputs) -> None:
        """Give the front what belongs to requests that still run where it comes from, under the names that it knows."""
        step.outputs = [output for output in step.outputs if self._record(output)]
        if step.outputs:
            self._events.put_nowait(step)

    def _record(self, output: EngineCoreOutput) -> bool:
        """Whether the front may see it."""
        known = self._by_wire_id.get(output.request_id)
        if known is None:
            return False
        if output.finish_reason is FinishReason.ABORT and not output.new_token_ids:
            self._move(known, Loss.LEFT, "its engine aborted it")  # what we abort is not known any more
            return False
        output.request_id = known.request_id
        now = asyncio.get_running_loop().time()
        if output.new_token_ids:
            cached = None if known.token_ids else getattr(output.prefill_stats, "num_cached_tokens", 0)
            progress = (now - known.progress_at, len(output.new_token_ids), cached)
            self.level.answered(*progress)
            self._metrics.answered(*progress)
        known.record(output, now)
        if known.place is not None:
            known.place.answered()
        if output.finish_reason is not None:
            self.level.ended(len(known.token_ids))
            self._end(known)
        elif self._suspects.discard(known):
            self._place_waiting()
        return True

    def _was_ready_lately(self) -> bool:
        """Whether a request may wait for a shard: there was one, and its successor is due."""
        return asyncio.get_running_loop().time() - self._last_ready < self._waiting.wait_s

    def _ready(self, _: ShardLink) -> None:
        self._place_waiting()

    def _lost(self, link: ShardLink, reason: str, died: bool) -> None:
        self._last_ready = asyncio.get_running_loop().time()
        self.prefixes.forget(link.shard)
        self._move_all(link.shard, Loss.DIED if died else Loss.GONE, reason)
        self._waiting_since.pop(link.shard, None)

    def _pause(self, shard: str) -> None:
        self._paused.add(shard)

        def resume() -> None:
            self._paused.discard(shard)
            self._place_waiting()

        asyncio.get_running_loop().call_later(PAUSE_S, resume)

    # ---- where requests run

    def _place(self, known: InFlight) -> None:
        """Send it to the best shard that may have it; without one it waits."""
        shards = [
            shard for shard in self.ready_shards
            if shard not in self._paused and self._suspects.may_run(known, shard)
        ]  # fmt: skip
        if not shards:
            self._waiting.add(known)
            return
        shard = self._choose(known, shards)
        self._waiting.discard(known)
        self._served[shard] += 1
        self._load[shard] += 1
        self._suspects.start(known, shard)
        if known.attempts:
            self.continued += 1
            self._metrics.replayed()
            logger.warning("%s goes on on %s after %d tokens", known.request_id, shard, len(known.token_ids))
        else:
            self._metrics.placed(
                asyncio.get_running_loop().time() - known.progress_at, len(known.request.prompt_token_ids or ())
            )
        request = known.start_on(shard)
        self._by_wire_id[known.wire_id] = known
        self._links[shard].send(wire.Add(wire.copied(self._encoder.encode(request))))

    def _choose(self, known: InFlight, shards: list[str]) -> str:
        holders = [*shards, *(node for name in shards for node in self._node(self._links[name])), *self._pool]
        cached = self.prefixes.cached_tokens(known.request, known.token_ids, holders) if len(shards) > 1 else {}
        last = self._sessions.shard_of(known.request)
        shard = choose(
            Candidate(
                name,
                cached.get(name, 0),
                self._load[name] + self._others.get(name, 0),
                self._served[name],
                name == last,
                sum(cached.get(node, 0) for node in self._node(self._links[name])),
                sum(cached.get(pool, 0) for pool in self._pool),
            )
            for name in shards
        )
        self._sessions.ran_on(known.request, shard)
        return shard

    def _node(self, link: ShardLink) -> list[str]:
        """The place that is the memory of the shard's node; none where a node's shards share no blocks."""
        return [f"node {link.address.rpartition(':')[0]}"] if self._kv_cache.host_bytes else []

    def _place_waiting(self) -> None:
        for known in self._waiting:
            self._place(known)

    def _move_all(self, shard: str, loss: Loss, why: str) -> None:
        for known in [known for known in self.in_flight.values() if known.shard == shard]:
            self._move(known, loss, why)

    def _move(self, known: InFlight, loss: Loss, why: str) -> None:
        """Its shard runs it no more: go on with it elsewhere, if that is worth it."""
        shard = known.shard
        now = asyncio.get_running_loop().time()
        stalled_s = min(now - known.progress_at, now - self._waiting_since.get(shard, now))
        self._leave(known, loss, why)
        if self._is_closing:
            self._fail(known, NoShardReady(STOPPING))
        elif (error := known.why_not_again(shard, loss, why, stalled_s=stalled_s, stall_s=self._stall_s)) is not None:
            self._fail(known, error)
        else:
            self._place(known)

    def _give_up(self, known: InFlight) -> None:
        waited = f"{self._waiting.wait_s:g} s"
        self._fail(known, NoShardReady(f"no shard could go on with this for {waited}: {self._why_none()}"))

    def _fail(self, known: InFlight, error: Exception) -> None:
        self._end(known)
        self._events.put_nowait(RequestFailed(known.request_id, error))

    def _end(self, known: InFlight) -> None:
        del self.in_flight[known.request_id]
        self._waiting.discard(known)
        self._leave(known, Loss.LEFT, "it has ended")

    def _leave(self, known: InFlight, loss: Loss, why: str) -> None:
        """Take it off its shard, if it has one."""
        if not (shard := known.shard):
            return
        del self._by_wire_id[known.wire_id]
        if self._suspects.discard(known):
            asyncio.get_running_loop().call_soon(self._place_waiting)
        known.leave(loss, why)
        self._load[shard] -= 1
        if shard in self._leaving and not self._load[shard]:
            task = asyncio.create_task(self._retire(shard))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    def _why_none(self) -> str:
        if not self._links:
            return "no attention shard has joined this ingress yet"
        states = "; ".join(f"{name}: {link.why or link.state.value}" for name, link in self._links.items())
        return f"no attention shard is ready ({states})"
