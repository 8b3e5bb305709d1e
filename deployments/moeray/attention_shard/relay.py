"""The relay: one stream per ingress in, one vLLM engine behind.

The engine is vLLM's `AsyncMPClient` (or anything with the four methods of `Engine`). One task takes each step's outputs
from it, splits them by the ingress that owns each request, and queues one message per ingress. Nothing here waits for
an ingress: a link that is too far behind is dropped, with its requests, and the others never notice.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from time import monotonic
from typing import Any, Protocol

import grpc
import msgspec
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from moeray.attention_shard import link as wire

logger = logging.getLogger(__name__)

MAX_QUEUED_BYTES = 32 << 20
"""What may wait for one ingress: with 100 requests in flight at 10 ms a step, it may stand still for about 30 s."""

HANDSHAKE_TIMEOUT_S = 10.0
LOAD_PERIOD_S = 0.5


class Engine(Protocol):
    """The part of vLLM's engine-core client that the relay uses."""

    async def add_request_async(self, request: EngineCoreRequest) -> None: ...
    async def abort_requests_async(self, request_ids: list[str]) -> None: ...
    async def get_output_async(self) -> EngineCoreOutputs: ...


class LinkDropped(Exception):
    """The shard ends a link; becomes the stream's status."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code, self.details = code, details


class _Link:
    """One connected ingress: its requests and the frames that wait to be written."""

    def __init__(self, hello: wire.Hello) -> None:
        self.name, self.hears_cached = hello.name, hello.hears_cached
        self.lacks_cached = hello.hears_cached  # it must be told everything, once there is room
        self.request_ids: set[str] = set()
        self.queued_bytes = 0
        self.begun: deque[int] = deque(maxlen=wire.MAX_BEGUN)
        self._frames: asyncio.Queue[bytes | LinkDropped] = asyncio.Queue()
        self._ended = False

    def put(self, frame: wire.FromShard) -> None:
        if not self._ended:
            data = wire.encode(frame)
            self.queued_bytes += len(data)
            self._frames.put_nowait(data)

    def end(self, code: grpc.StatusCode, details: str) -> None:
        """Close the stream with a status once the queued frames are written."""
        if not self._ended:
            self._ended = True
            self._frames.put_nowait(LinkDropped(code, details))

    def drop(self, code: grpc.StatusCode, details: str) -> None:
        """Close the stream with a status and forget what was queued, so that its memory is free at once."""
        while not self._frames.empty():
            self._frames.get_nowait()
        self.queued_bytes, self._ended = 0, False
        self.end(code, details)

    async def next(self) -> bytes:
        """The next frame to write.

        Raises:
            LinkDropped: nothing will follow.
        """
        frame = await self._frames.get()
        if isinstance(frame, LinkDropped):
            raise frame
        self.queued_bytes -= len(frame)
        return frame


class Relay:
    """Serves `Link` over one engine. Single event loop; `run` must be running for anything to come out.

    Attributes:
        not_ready: why links are refused for now (they try again), None when they are welcome.
        draining: why new requests are refused for good, None when they are not.
        num_running, num_waiting, kv_use: as vLLM's scheduler last reported them.
        kv_tokens: what the engine's KV cache holds; 0 if it did not say.
        everything_cached: all that its prefix cache holds, for links that have not heard of it.
    """

    def __init__(self, engine: Engine, hello: wire.Hello, max_queued_bytes: int = MAX_QUEUED_BYTES) -> None:
        self.hello = hello
        self.draining: str | None = None
        self.not_ready: str | None = None
        self.num_running = self.num_waiting = self.kv_tokens = 0
        self.kv_use = 0.0
        self.everything_cached: Callable[[], wire.Cached | None] = lambda: None
        self._waiting_since: float | None = None
        self._engine = engine
        self._max_queued_bytes = max_queued_bytes
        self._links: set[_Link] = set()
        self._owner: dict[str, _Link] = {}
        self._tokens: dict[str, int] = {}  # of the requests in `_owner`: prompt and answer, at most
        self._not_begun: dict[str, int] = {}  # priority, until the first token
        self._tasks: set[asyncio.Task[None]] = set()
        self._dead: tuple[str, str] | None = None
        self._encoder = MsgpackEncoder()
        self._decoder = MsgpackDecoder(EngineCoreRequest)

    @property
    def link_names(self) -> list[str]:
        return sorted(link.name for link in self._links)

    @property
    def num_requests(self) -> int:
        return len(self._owner)

    async def run(self) -> None:
        """Move outputs until the engine dies.

        Raises:
            Exception: whatever `get_output_async` raised; links still stand, so that `fail` can tell them why.
        """
        reporting = asyncio.create_task(self._report(), name="load")
        try:
            while True:
                self._spread(await self._engine.get_output_async())
        finally:
            reporting.cancel()

    def drain(self, reason: str) -> None:
        """Take no new request; those in flight go on."""
        self.draining = reason
        for link in self._links:
            link.put(wire.Draining(reason))

    def fail(self, code: str, reason: str) -> None:
        """The engine is gone: every request in flight, and every later one, ends with this reason."""
        self._dead = (code, reason)
        for link in self._links:
            link.put(wire.Failed(sorted(link.request_ids), code, reason))
            link.request_ids.clear()
        for known in (self._owner, self._tokens, self._not_begun):
            known.clear()

    def close(self, details: str) -> None:
        """End every link once its queued frames are written."""
        for link in self._links:
            link.end(grpc.StatusCode.UNAVAILABLE, details)

    async def link(
        self, frames: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> AsyncIterator[bytes]:
        """The `Link` RPC."""
        try:
            theirs = await asyncio.wait_for(anext(frames), HANDSHAKE_TIMEOUT_S)
            link = _Link(self._greet(theirs))
        except (StopAsyncIteration, TimeoutError):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{self.hello.name}: no hello from the ingress")
        except LinkDropped as drop:
            await context.abort(drop.code, drop.details)
        yield wire.encode(self.hello)
        if self.draining is not None:
            link.put(wire.Draining(self.draining))
        self._links.add(link)
        link.put(self._load(link))
        self._tell_everything_cached(link)
        reader = asyncio.create_task(self._read(link, frames))
        try:
            while True:
                yield await link.next()
        except LinkDropped as drop:
            await context.abort(drop.code, drop.details)
        finally:
            reader.cancel()
            self._links.discard(link)
            await self._forget(link)

    def _greet(self, frame: bytes) -> wire.Hello:
        try:
            theirs = wire.decode_to_shard(frame)
        except msgspec.DecodeError as error:
            raise LinkDropped(grpc.StatusCode.FAILED_PRECONDITION, f"{self.hello.name}: no hello: {error}") from error
        if not isinstance(theirs, wire.Hello):
            raise LinkDropped(grpc.StatusCode.FAILED_PRECONDITION, f"{self.hello.name}: no hello in the first frame")
        if (why := wire.mismatch(self.hello, theirs)) is not None:
            raise LinkDropped(grpc.StatusCode.FAILED_PRECONDITION, why)
        if self.not_ready is not None:
            raise LinkDropped(grpc.StatusCode.UNAVAILABLE, f"{self.hello.name}: {self.not_ready}")
        return theirs

    async def _read(self, link: _Link, frames: AsyncIterator[bytes]) -> None:
        async for data in frames:
            try:
                frame = wire.decode_to_shard(data)
                if isinstance(frame, wire.Abort):
                    await self._engine.abort_requests_async([i for i in frame.request_ids if self._release(i, link)])
                elif isinstance(frame, wire.Add):
                    await self._add(link, self._decoder.decode(frame.request))
            except msgspec.MsgspecError as error:
                self._drop(
                    link, grpc.StatusCode.INVALID_ARGUMENT, f"{self.hello.name}: bad frame from {link.name}: {error}"
                )
                return
            except Exception as error:  # noqa: BLE001  the engine is gone: `run` ends and `fail` tells the reason
                logger.warning("%s: a frame of %s was not taken: %s", self.hello.name, link.name, error)
        link.end(grpc.StatusCode.UNAVAILABLE, f"{self.hello.name}: {link.name} closed its side")

    async def _add(self, link: _Link, request: EngineCoreRequest) -> None:
        request_id = request.request_id
        if self._dead is not None:
            link.put(wire.Failed([request_id], *self._dead))
        elif self.draining is not None:
            link.put(wire.Failed([request_id], wire.DRAINING, self.draining))
        elif self.not_ready is not None:
            link.put(wire.Failed([request_id], wire.EXPERTS_LOST, self.not_ready))
        else:
            self._owner[request_id] = link
            self._tokens[request_id] = _most_tokens(request)
            self._not_begun[request_id] = request.priority
            link.request_ids.add(request_id)
            await self._engine.add_request_async(request)

    def _release(self, request_id: str, link: _Link) -> bool:
        """Forget one request of `link`; False if it is not (or no longer) one of its own."""
        if self._owner.get(request_id) is not link:
            return False
        del self._owner[request_id], self._tokens[request_id]
        self._not_begun.pop(request_id, None)
        link.request_ids.discard(request_id)
        return True

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(LOAD_PERIOD_S)
            for link in self._links:
                if not link.queued_bytes:  # one that does not read hears it later
                    link.put(self._load(link))
                    self._tell_everything_cached(link)

    def cache_changed(self, frame: wire.Cached) -> None:
        """Tell the links that hear it; one that is behind hears everything again once it has caught up."""
        for link in self._links:
            if not link.hears_cached or link.lacks_cached:
                continue
            if link.queued_bytes > self._max_queued_bytes // 4:
                link.lacks_cached = True
            else:
                link.put(frame)

    def _tell_everything_cached(self, link: _Link) -> None:
        if link.lacks_cached:
            link.lacks_cached = False
            if (frame := self.everything_cached()) is not None:
                link.put(frame)

    def _load(self, link: _Link) -> wire.Load:
        own = sum(self._tokens[request_id] for request_id in link.request_ids)
        others = sum(self._tokens.values()) - own
        begun = list(link.begun)
        link.begun.clear()
        return wire.Load(self.kv_tokens, others, self.num_running, self.num_waiting, self._waits_s(), begun)

    def _waits_s(self) -> float:
        return 0.0 if self._waiting_since is None else monotonic() - self._waiting_since

    def experts_awaited(self, waits: bool) -> None:
        """A layer call begins or ends to wait for experts that nobody has."""
        self._waiting_since = monotonic() if waits else None

    async def _forget(self, link: _Link) -> None:
        """Abort what a vanished ingress left behind."""
        request_ids = list(link.request_ids)
        for request_id in request_ids:
            self._release(request_id, link)
        if request_ids and self._dead is None:
            await self._engine.abort_requests_async(request_ids)

    def _spread(self, step: EngineCoreOutputs) -> None:
        if (stats := step.scheduler_stats) is not None:
            self.num_running, self.num_waiting = stats.num_running_reqs, stats.num_waiting_reqs
            self.kv_use = stats.kv_cache_usage
        by_link: defaultdict[_Link, list[EngineCoreOutput]] = defaultdict(list)
        for output in step.outputs:
            if (link := self._owner.get(output.request_id)) is not None:
                if (priority := self._not_begun.pop(output.request_id, None)) is not None:
                    for each in self._links:
                        each.begun.append(priority)
                by_link[link].append(output)
                if output.finish_reason is not None:
                    self._release(output.request_id, link)
        for link, outputs in by_link.items():
            message = EngineCoreOutputs(outputs=outputs, timestamp=step.timestamp, weight_version=step.weight_version)
            link.put(wire.Outputs(wire.copied(self._encoder.encode(message))))
            if link.queued_bytes > self._max_queued_bytes:
                details = f"ingress {link.name} is {link.queued_bytes} bytes behind, {self._max_queued_bytes} are kept"
                self._drop(link, grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self.hello.name}: {details}")

    def _drop(self, link: _Link, code: grpc.StatusCode, details: str) -> None:
        logger.error("%s", details)
        link.drop(code, details)
        task = asyncio.create_task(self._forget(link))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _most_tokens(request: EngineCoreRequest) -> int:
    """Of prompt and answer together."""
    params = request.sampling_params
    return len(request.prompt_token_ids or ()) + (params.max_tokens or 0 if params is not None else 0)


def handlers(relay: Relay, unary: dict[str, Any]) -> grpc.GenericRpcHandler:
    """gRPC handlers of the service; `unary` maps Connect and Info to `async (bytes, context) -> bytes`."""
    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        name: grpc.unary_unary_rpc_method_handler(behaviour) for name, behaviour in unary.items()
    }
    methods["Link"] = grpc.stream_stream_rpc_method_handler(relay.link)
    return grpc.method_handlers_generic_handler(wire.SERVICE, methods)
