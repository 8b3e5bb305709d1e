"""What a shard process is told, and what it tells back: one JSON line in, JSON lines out. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from moeray.config import ClusterTlsConfig
from moeray.membership import Charge


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """Everything one shard process needs; it reads no settings from the environment.

    Attributes:
        shard: id of the shard, in every log line and error.
        engine: keyword arguments of `moeray.vllm_hooks.engine_args.shard_engine_args`.
        host, port: where the relay listens; port 0 takes a free one.
        cpus: cores EngineCore is pinned to, and this process until it is loaded; None leaves both where the parent was.
        relay_cpu: core this process is pinned to from then on.
        num_threads: OpenMP threads of the engine; None is one per pinned core.
        wait_for_connect: refuse ingresses until the expert groups' addresses have come through `Connect`.
        drain_s: how long SIGTERM lets requests in flight go on here; the rest goes on at other shards.
        hang_s: this process, or its engine, is killed when it gives no sign of life for so long.
        tls: with it, the relay speaks to processes of its cluster only.
        step_s: its engine is killed when one step takes so long, without what that waits for experts.
        prefault: bring Engram tables that are mapped into memory before the engine starts.
    """

    shard: str
    engine: dict[str, Any]
    host: str = "127.0.0.1"
    port: int = 0
    cpus: list[int] | None = None
    relay_cpu: int | None = None
    num_threads: int | None = None
    wait_for_connect: bool = True
    drain_s: float = 5.0
    hang_s: float = 10.0
    step_s: float = 300.0
    prefault: bool = False
    tls: ClusterTlsConfig = field(default_factory=ClusterTlsConfig)


@dataclass(frozen=True, slots=True)
class Event:
    """One line from the shard process.

    Attributes:
        event: progress (still starting), ready (port and pids are set), failed (never became ready), lost (was ready,
            the engine died), stopped (drained and left), accused (the hop finds expert group `group` bad),
            waiting and resumed (a layer call begins or ends to wait for experts that nobody has).
        text: the stage, or the reason.
    """

    event: Literal["progress", "ready", "failed", "lost", "stopped", "accused", "waiting", "resumed"]
    shard: str
    text: str = ""
    host: str = ""
    port: int = 0
    pid: int = 0
    engine_pid: int = 0
    group: str = ""
    charge: Charge | None = None
    seconds: float = field(default=0.0)
    """Since the process started."""


def encode_spec(spec: ShardSpec) -> bytes:
    return msgspec.json.encode(spec) + b"\n"


def decode_spec(line: bytes) -> ShardSpec:
    """Raises msgspec.ValidationError naming the field."""
    return msgspec.json.decode(line, type=ShardSpec)


def encode_event(event: Event) -> bytes:
    return msgspec.json.encode(event) + b"\n"


def decode_event(line: bytes) -> Event:
    return msgspec.json.decode(line, type=Event)
