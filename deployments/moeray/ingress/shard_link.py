"""One shard as the ingress sees it: a stream that is kept open, with its state and its load."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable
from enum import Enum

import grpc
import msgspec

from moeray.attention_shard import link as wire
from moeray.attention_shard.channels import dial
from moeray.mutual_tls import CertificateError, ClusterCertificate

logger = logging.getLogger(__name__)

FIRST_RETRY_S, LAST_RETRY_S = 0.1, 2.0
SILENCE_S = 10.0
"""A shard sends a frame twice a second; one that has sent none for so long is lost, even if its gRPC answers pings."""
_SILENT = "no sign of life"
MAX_UNSENT_FRAMES = 10_000
"""Requests and aborts that may wait for a shard that does not read; then its link is cut."""


class LinkState(Enum):
    CONNECTING = "connecting"
    READY = "ready"
    DRAINING = "draining"
    REFUSED = "refused"
    CLOSED = "closed"


class ShardLink:
    """Keeps one stream to one shard open, with backoff, until `close`.

    `on_frame(link, frame)` gets every frame after the handshake; while it waits, nothing more is read and the shard
    feels it. `on_ready(link)` is called each time it becomes ready, `on_lost(link, reason, died)` each time a ready
    link ends; `died` unless it had said so before, or only fell silent.

    Attributes:
        state, why: where the link stands, and why it is not ready.
    """

    def __init__(
        self,
        shard: str,
        address: str,
        hello: wire.Hello,
        on_frame: Callable[[ShardLink, wire.FromShard], Awaitable[None]],
        on_ready: Callable[[ShardLink], None],
        on_lost: Callable[[ShardLink, str, bool], None],
        silence_s: float = SILENCE_S,
        certificate: ClusterCertificate | None = None,
    ) -> None:
        self.shard, self.address = shard, address
        self.state = LinkState.CONNECTING
        self.why = "not connected yet"
        self._hello, self._on_frame, self._on_ready, self._on_lost = hello, on_frame, on_ready, on_lost
        self._silence_s, self._certificate = silence_s, certificate
        self._heard_at = 0.0  # inf while a frame is being taken: then it is not the shard that is slow
        self._unsent: asyncio.Queue[wire.ToShard] = asyncio.Queue(MAX_UNSENT_FRAMES)
        self._call: grpc.aio.StreamStreamCall[bytes, bytes] | None = None
        self._cut = ""
        self._task = asyncio.create_task(self._keep(), name=f"link-{shard}")

    def send(self, frame: wire.ToShard) -> None:
        """Queue a frame. A shard that has stopped reading is cut off: its requests end as lost."""
        try:
            self._unsent.put_nowait(frame)
        except asyncio.QueueFull:
            self._cut = f"it has not read {MAX_UNSENT_FRAMES} frames"
            if self._call is not None:
                self._call.cancel()

    async def close(self) -> None:
        """End the stream; idempotent. Requests on it are the caller's business."""
        self.state, self.why = LinkState.CLOSED, "removed from the pool"
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _keep(self) -> None:
        wait_s = FIRST_RETRY_S
        while True:
            was_ready = False
            try:
                async with dial(self.address, self._certificate) as channel:
                    was_ready = await self._once(channel)
            except CertificateError as error:  # a rotation writes one file after the other
                self._ended(str(error))
            wait_s = FIRST_RETRY_S if was_ready else min(2 * wait_s, LAST_RETRY_S)
            await asyncio.sleep(wait_s)

    async def _once(self, channel: grpc.aio.Channel) -> bool:
        """One stream from hello to its end; True if it was ready in between."""
        self._unsent = asyncio.Queue(MAX_UNSENT_FRAMES)
        call = self._call = channel.stream_stream(wire.LINK)()
        tasks: list[asyncio.Task[None]] = []
        self._cut = ""
        try:
            async with asyncio.timeout(self._silence_s):
                await call.write(wire.encode(self._hello))
                await self._expect_hello(call)
            self.state, self.why = LinkState.READY, ""
            logger.info("linked to attention shard %s at %s", self.shard, self.address)
            self._heard_at = asyncio.get_running_loop().time()
            tasks += [asyncio.create_task(self._write(call)), asyncio.create_task(self._watch(call))]
            self._on_ready(self)
            while (data := await call.read()) is not grpc.aio.EOF:
                self._heard_at = math.inf
                await self._take(wire.decode_from_shard(data))
                self._heard_at = asyncio.get_running_loop().time()
            ended = f"its stream ended: {await call.details() or (await call.code()).name}"
        except grpc.aio.AioRpcError as error:
            ended = error.details() or error.code().name
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                self._refused(ended)
        except msgspec.MsgspecError as error:
            ended = f"a frame could not be read: {error}"
        except TimeoutError:
            ended = f"no hello for {self._silence_s:g} s"
        except asyncio.CancelledError:
            if not self._cut or self.state is LinkState.CLOSED:  # cancelled by `close`, not by `send`
                raise
            ended = self._cut
        except Exception as error:
            logger.exception("link to attention shard %s", self.shard)
            ended = f"{type(error).__name__}: {error}"
        finally:
            call.cancel()
            for task in tasks:
                task.cancel()
        return self._ended(ended)

    async def _expect_hello(self, call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        data = await call.read()
        if data is grpc.aio.EOF:
            raise grpc.aio.AioRpcError(
                await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
            )
        theirs = wire.decode_from_shard(data)
        if not isinstance(theirs, wire.Hello):
            raise msgspec.ValidationError("the first frame is not a hello")
        if (why := wire.mismatch(self._hello, theirs)) is not None:
            raise msgspec.ValidationError(why)

    async def _write(self, call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        with contextlib.suppress(
            grpc.aio.AioRpcError, asyncio.InvalidStateError
        ):  # the reader hears why the stream ended
            while True:
                await call.write(wire.encode(await self._unsent.get()))

    async def _watch(self, call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        """Cut the link when nothing has come for too long, however alive the other end's kernel is."""
        loop, period_s = asyncio.get_running_loop(), self._silence_s / 10
        while True:
            asked_at = loop.time()
            await asyncio.sleep(period_s)
            if loop.time() - asked_at > 2 * period_s:  # it was this process that stood still
                self._heard_at = max(self._heard_at, loop.time())
            elif loop.time() - self._heard_at > self._silence_s:
                self._cut = f"{_SILENT} for {self._silence_s:g} s"
                call.cancel()

    async def _take(self, frame: wire.FromShard) -> None:
        if isinstance(frame, wire.Draining) or (isinstance(frame, wire.Failed) and frame.code == wire.ENGINE_DEAD):
            self.state, self.why = LinkState.DRAINING, frame.reason
        await self._on_frame(self, frame)

    def _refused(self, why: str) -> None:
        if self.state is not LinkState.REFUSED:
            logger.error("attention shard %s at %s refused the link: %s", self.shard, self.address, why)
        self.state, self.why = LinkState.REFUSED, why

    def _ended(self, why: str) -> bool:
        has_drained = self.state is LinkState.DRAINING
        was_ready = has_drained or self.state is LinkState.READY
        if self.state is not LinkState.REFUSED:
            self.state, self.why = LinkState.CONNECTING, why
        if was_ready:
            logger.warning("attention shard %s at %s lost: %s", self.shard, self.address, why)
            self._on_lost(self, why, not has_drained and not why.startswith(_SILENT))
        return was_ready
