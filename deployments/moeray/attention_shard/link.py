"""The words that ingress and attention shard exchange: `moeray.internal.v1.Shard` on gRPC.

Internal: both ends come from the same release, so the messages are msgpack structs and not a public proto. The payload
of `Add` and `Outputs` is vLLM's own msgpack (`EngineCoreRequest`, `EngineCoreOutputs`), passed as the list of buffers
that vLLM's encoder makes: the first one is the message, the others are arrays it refers to.

`Link` is one bidirectional stream per ingress. The first frame each way is a `Hello`. Afterwards the ingress sends
`Add` and `Abort`, the shard sends one `Outputs` per engine step for all requests of that ingress, and `Failed` for
requests that will produce nothing more, `Load` twice a second, and to an ingress whose hello asks for it `Cached`
whenever its KV cache changes. Imports neither vllm nor ray.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

PROTOCOL_VERSION = 2
SERVICE = "moeray.internal.v1.Shard"
LINK, CONNECT, INFO = (f"/{SERVICE}/{method}" for method in ("Link", "Connect", "Info"))

MAX_FRAME_BYTES = 256 << 20
"""Largest gRPC message on this hop; a prompt of one million tokens is about 5 MB."""

KEEPALIVE_S = 5.0
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    # Both ends ping: a stopped process, a cut cable or a lost node is noticed within KEEPALIVE_S.
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),  # the one that counts: keepalive's own is used only where it is longer
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
    # The pool has its own backoff; gRPC's would add up to two minutes to it.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

# What a Failed frame says about the fault: the ingress turns it into a status, people read the reason.
ENGINE_DEAD, EXPERTS_LOST, DRAINING, BAD_FRAME = "engine_dead", "experts_lost", "draining", "bad_frame"


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First frame each way.

    Attributes:
        protocol: PROTOCOL_VERSION of the sender.
        vllm: the sender's vLLM version; both ends must run the same, since they exchange vLLM's own structs.
        model: content fingerprint of the model's configuration and tokenizer (`moeray.vllm_hooks.fingerprint`).
        name: who is speaking (ingress id or shard id), for log lines and errors.
        hears_cached: whether the sender understands `Cached`; one that does not say so is never sent it.
    """

    protocol: int
    vllm: str
    model: str
    name: str
    hears_cached: bool = False


class Add(msgspec.Struct, frozen=True, tag="add"):
    """One request: vLLM's msgpack of an EngineCoreRequest."""

    request: list[bytes]


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Stop these requests; ids the shard does not know are ignored."""

    request_ids: list[str]


class Outputs(msgspec.Struct, frozen=True, tag="outputs"):
    """One engine step: vLLM's msgpack of an EngineCoreOutputs with this ingress' requests only."""

    outputs: list[bytes]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """These requests ended without a result on this shard; `code` is one of the constants above."""

    request_ids: list[str]
    code: str
    reason: str


MAX_BEGUN = 256


class Load(msgspec.Struct, frozen=True, tag="load"):
    """What the ingress' admission must know of this shard; sent twice a second while the relay's loop runs.

    Attributes:
        kv_tokens: tokens that its KV cache holds; 0 if vLLM did not say.
        others_tokens: most tokens (prompt and answer) that the requests of other ingresses will come to.
        num_running, num_waiting: as vLLM's scheduler last reported them.
        waits_s: how long a layer call of its engine has waited for experts that nobody has; 0 if none does.
        begun: priorities of the requests, of any ingress, that got their first token since the last report; of very
            many the latest MAX_BEGUN.
    """

    kv_tokens: int
    others_tokens: int
    num_running: int
    num_waiting: int
    waits_s: float = 0.0
    begun: list[int] = []


class Cached(msgspec.Struct, frozen=True, tag="cached"):
    """What changed in the shard's prefix cache; keys and layout as in `moeray.vllm_hooks.block_hashes`.

    Attributes:
        algorithm, root, hash_block_tokens, block_tokens: how its blocks are named.
        stored, removed: keys of blocks; none is in both.
        cleared: everything told before is void; `stored` comes after that.
    """

    algorithm: str
    root: bytes
    hash_block_tokens: int
    block_tokens: int
    stored: list[bytes]
    removed: list[bytes]
    cleared: bool = False


class Draining(msgspec.Struct, frozen=True, tag="draining"):
    """The shard finishes what it has and takes nothing new on this link."""

    reason: str


class Connect(msgspec.Struct, frozen=True, tag="connect"):
    """Unary request: adopt a placement.

    Attributes:
        generation: of the placement; the shard refuses to go back.
        placement: `Placement.to_json()`.
        groups: member id of each expert group, in group order.
        addresses: where each listens; "" for one that is not there.
        row_servers: Engram row servers, number -> where it listens; those that are there.
    """

    generation: int
    placement: dict[str, Any]
    groups: list[str]
    addresses: list[str]
    row_servers: dict[int, str] = {}


class Info(msgspec.Struct, frozen=True, tag="info"):
    """Unary request. `tensors`: also list the weights that the engine holds (slow, for proofs and tests)."""

    tensors: bool = False


class ShardInfo(msgspec.Struct, frozen=True, tag="shard_info"):
    """Answer to Info and Connect.

    Attributes:
        state: starting | ready | draining | lost.
        num_running, num_waiting: as vLLM's scheduler last reported them.
        num_requests: requests of all ingresses that have not ended.
        max_running: requests that the engine computes at once.
        kv_use: share of its KV cache that running requests hold.
        links: names of the connected ingresses.
        hop: the transport's counters, as the worker gives them; empty before the first Connect.
        kv_cache: what the KV tier did, as `moeray_kv_cache` of the worker extension gives it.
        tensors: what the engine holds, as `moeray_tensors` of the worker extension gives it, on request.
    """

    shard: str
    state: str
    pid: int
    engine_pid: int
    vllm: str
    model: str
    generation: int
    num_running: int
    num_waiting: int
    num_requests: int
    max_running: int
    kv_use: float
    links: list[str]
    hop: dict[str, Any]
    kv_cache: dict[str, Any]
    tensors: dict[str, Any] | None = None


ToShard = Hello | Add | Abort
FromShard = Hello | Outputs | Failed | Draining | Load | Cached

encode = msgspec.msgpack.Encoder().encode
decode_to_shard = msgspec.msgpack.Decoder(ToShard).decode
decode_from_shard = msgspec.msgpack.Decoder(FromShard).decode
decode_connect = msgspec.msgpack.Decoder(Connect).decode
decode_info = msgspec.msgpack.Decoder(Info).decode
decode_shard_info = msgspec.msgpack.Decoder(ShardInfo).decode


def copied(buffers: Iterable[Any]) -> list[bytes]:
    """The buffers of one vLLM message, which may be views of arrays that change, as bytes of their own."""
    return [bytes(buffer) for buffer in buffers]


def mismatch(ours: Hello, theirs: Hello) -> str | None:
    """Why these two ends must not talk, naming both sides; None if they may."""
    for what in ("protocol", "vllm", "model"):
        mine, other = getattr(ours, what), getattr(theirs, what)
        if mine != other:
            return f"{what} differs: {ours.name} has {mine}, {theirs.name} has {other}"
    return None
