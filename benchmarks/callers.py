"""Closed-loop clients that cost little: a connection each, one chat at a time, nothing parsed before the answer's end.

They share a core with the servers that they time, so every microsecond spent here would blur what is measured.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import grpc
from google.protobuf.json_format import ParseDict

from moeray.v1 import inference_pb2 as pb
from moeray.v1.inference_pb2_grpc import InferenceStub

ANSWER_TOKENS = 32
_EVENT, _END = b"data: ", b"0\r\n\r\n"
_TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')
_PROMPT = re.compile(rb'"prompt_tokens": ?(\d+)')
_CACHED = re.compile(rb'"cached_tokens": ?(\d+)')


class Unanswered(Exception):
    """A server gave another answer than a whole stream; the text is what it said."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one chat, in seconds on the clock that all processes of a machine share.

    Attributes:
        began, first: when the request's last byte was written, when the first event with a token was there.
        tokens, prompt: of the answer, and of what was asked.
        cached: prompt tokens that were in the engine's cache, where the server says so.
    """

    began: float
    first: float
    tokens: int
    prompt: int = 0
    cached: int = 0

    @property
    def ttft_s(self) -> float:
        return self.first - self.began


def chat(model: str, number: int) -> dict[str, Any]:
    """A chat that no other one shares its first block of tokens with, so that no cache answers it."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": f"{number}: what does an expert group do?"}],
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "chat_template_kwargs": {"thinking": False},
    }


class Caller(ABC):
    """One client."""

    @abstractmethod
    async def ask(self, body: dict[str, Any]) -> Answer:
        """Raises Unanswered."""

    @abstractmethod
    async def close(self) -> None: ...


class HttpCaller(Caller, asyncio.Protocol):
    """HTTP/1.1 by hand; opened by `connect`."""

    def __init__(self, head: bytes) -> None:
        self._head = head
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._first_at = 0.0
        self._done: asyncio.Future[None] | None = None

    @classmethod
    async def connect(cls, host: str, port: int, headers: Mapping[str, str]) -> HttpCaller:
        lines = [f"{name}: {value}" for name, value in {"host": f"{host}:{port}", **headers}.items()]
        head = "\r\n".join(["POST /v1/chat/completions HTTP/1.1", "content-type: application/json", *lines]) + "\r\n"
        _, caller = await asyncio.get_running_loop().create_connection(lambda: cls(head.encode()), host, port)
        return caller

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its type

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._first_at and _EVENT in self._received:
            self._first_at = time.monotonic()
        ended = self._received.endswith(_END) if self._first_at else b"error" in self._received
        if ended and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(Unanswered(f"the connection ended after {bytes(self._received[-300:])!r}"))

    async def ask(self, body: dict[str, Any]) -> Answer:
        assert self._transport is not None
        data = json.dumps(body).encode()
        self._received.clear()
        self._first_at = 0.0
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(self._head + f"content-length: {len(data)}\r\n\r\n".encode() + data)
        began = time.monotonic()
        await self._done
        tokens = _TOKENS.findall(self._received)
        if not tokens:
            raise Unanswered(bytes(self._received[:1000]).decode(errors="replace"))
        prompt, cached = (int((each.findall(self._received) or [0])[-1]) for each in (_PROMPT, _CACHED))
        return Answer(began, self._first_at, int(tokens[-1]), prompt, cached)

    async def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class GrpcCaller(Caller):
    """`moeray.v1.Inference` over a channel of its own; opened by `connect`."""

    def __init__(self, address: str, metadata: Mapping[str, str]) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._stub, self._metadata = InferenceStub(self._channel), list(metadata.items())

    @classmethod
    async def connect(cls, address: str, metadata: Mapping[str, str]) -> GrpcCaller:
        caller = cls(address, metadata)
        await caller._channel.channel_ready()
        return caller

    async def ask(self, body: dict[str, Any]) -> Answer:
        request = ParseDict({name: value for name, value in body.items() if name != "stream"}, pb.ChatRequest())
        began = time.monotonic()
        first_at, last = 0.0, None
        try:
            async for chunk in self._stub.ChatStream(request, metadata=self._metadata):
                first_at, last = first_at or time.monotonic(), chunk
        except grpc.RpcError as error:
            raise Unanswered(str(error)) from error
        if last is None:
            raise Unanswered("an empty stream")
        return Answer(began, first_at, last.usage.completion_tokens)

    async def close(self) -> None:
        await self._channel.close()


async def call_all(
    callers: list[Caller], num_requests: int, body: Callable[[], dict[str, Any]]
) -> tuple[list[Answer], float]:
    """So many chats, by all callers at once; (answers, seconds)."""
    left = num_requests
    answers: list[Answer] = []

    async def work(caller: Caller) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            answers.append(await caller.ask(body()))

    began = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        for caller in callers:
            tasks.create_task(work(caller))
    return answers, time.monotonic() - began
