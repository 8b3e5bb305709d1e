"""Starts one real shard process (local transport) and one real ingress for the tests of the front."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Coroutine, Mapping
from email.message import Message
from pathlib import Path
from typing import Any, TypeVar

import grpc

from moeray.attention_shard import link as wire
from moeray.attention_shard.spec import Event, ShardSpec, decode_event, encode_spec
from moeray.config import IngressConfig
from moeray.ingress.server import IngressServer, IngressSettings
from moeray.placement import contiguous

T = TypeVar("T")
MODEL = "moeray-tiny"


class ShardProcess:
    """`python -m moeray.attention_shard.process`, followed through its events."""

    def __init__(self, name: str, model: Path, port: int = 0, *, is_whole: bool = False, **engine_args: Any) -> None:
        """Args: is_whole: a model that vLLM runs whole, without a hop."""
        settings = None if is_whole else {"shard": name, "backend": "local", "checkpoint": str(model)}
        engine = {"model": str(model), "model_name": MODEL, "engine_args": engine_args, "moeray": settings}
        self.spec = ShardSpec(name, engine, port=port, num_threads=1, drain_s=60.0, wait_for_connect=not is_whole)
        command = [sys.executable, "-m", "moeray.attention_shard.process"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin is not None
        self.process.stdin.write(encode_spec(self.spec))
        self.process.stdin.flush()

    def event(self) -> Event | None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return decode_event(line) if line else None

    def wait_ready(self) -> Event:
        while (event := self.event()) is not None:
            if event.event in ("ready", "failed"):
                self.up = event
                self._channel = grpc.insecure_channel(f"{event.host}:{event.port}")
                return event
        raise AssertionError(f"the shard process ended with {self.process.wait()}")

    def connect(self, model: Path) -> None:
        shape = json.loads((model / "config.json").read_text())
        placement = contiguous(
            generation=1, num_layers=shape["num_hidden_layers"], num_experts=shape["n_routed_experts"], num_groups=1
        )
        self._channel.unary_unary(wire.CONNECT)(wire.encode(wire.Connect(1, placement.to_json(), [], [])), timeout=60)

    def info(self) -> wire.ShardInfo:
        return wire.decode_shard_info(self._channel.unary_unary(wire.INFO)(wire.encode(wire.Info()), timeout=10))

    @property
    def address(self) -> str:
        return f"{self.up.host}:{self.up.port}"

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(60)


class Ingress:
    """An IngressServer on an event loop in a thread, called from the test's thread."""

    def __init__(
        self, model: Path, limits: IngressConfig | None = None, front: Mapping[str, Any] | None = None, **settings: Any
    ) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name="ingress").start()
        front = {"model": str(model), "model_name": MODEL, "engine_args": {}, **(front or {})}
        limits = limits or IngressConfig()
        self.server = IngressServer(IngressSettings("i0", front, http_port=0, grpc_port=0, limits=limits, **settings))
        self.call(self.server.start())

    def call(self, coroutine: Coroutine[Any, Any, T], timeout_s: float = 120) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)

    def set_shards(self, *shards: ShardProcess) -> None:
        """From now on these; requests go on where they run."""
        self.call(self.server.set_shards({shard.spec.shard: shard.address for shard in shards}))
        until(lambda: sum(s["state"] == "ready" for s in self.server.describe()["shards"].values()) >= len(shards), 60)

    def stop(self) -> None:
        self.call(self.server.stop(2.0))
        self._loop.call_soon_threadsafe(self._loop.stop)

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.server.http_port}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.server.grpc_port}"

    def post(
        self, path: str, body: dict[str, Any] | bytes, timeout_s: float = 60, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, Any], dict[str, str]]:
        """(status, JSON answer, headers), errors included."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.http + path, data, {"content-type": "application/json", **(headers or {})}
        )
        return _open(request, timeout_s)

    def status(self, body: dict[str, Any], headers: Mapping[str, str]) -> int:
        """Of a chat, whose answer is read to its end, whole or streamed."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            self.http + "/v1/chat/completions", data, {"content-type": "application/json", **headers}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                answer.read()
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.read()
            return error.code

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, dict[str, Any], dict[str, str]]:
        return _open(urllib.request.Request(self.http + path, headers=dict(headers or {})), 10)


def _open(request: urllib.request.Request, timeout_s: float) -> tuple[int, dict[str, Any], dict[str, str]]:
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return answer.status, json.loads(answer.read()), _lower(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), _lower(error.headers)


def _lower(headers: Message) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def until(condition: Any, timeout_s: float = 20) -> None:
    """Wait for a condition; the assertion names it."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def chat(**changes: Any) -> dict[str, Any]:
    """A small chat request."""
    ask = {"model": MODEL, "messages": [{"role": "user", "content": "What is an expert group?"}]}
    return ask | {"max_tokens": 8, "temperature": 0, "chat_template_kwargs": {"thinking": False}} | changes
