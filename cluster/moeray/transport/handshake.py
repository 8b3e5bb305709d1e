"""First words between a shard and a group, over TCP (TLS with `cluster_tls`), before any communicator is built.

Each message is a 4-byte big-endian length and that many bytes of JSON. Lengths and times are bounded, so garbage or
silence on the port costs one connection and nothing else.

    shard -> group   hello
    group -> shard   hello, and "refused" (a reason) if it will not serve this shard
    shard -> group   how they will talk, see `Start`
    group -> shard   {"ready": true}, once its end of the link exists

The connection then stays open: its end-of-file is the notice of death, in both directions. Over TLS it carries the
rows (tls_streams.py), unless a channel does; otherwise it is silent.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from time import monotonic
from typing import Any, get_args

from moeray.config import RowFormatName
from moeray.transport.errors import HandshakeRefused

PROTOCOL = 2
ROWS_VERSION = 1
"""Grows when an upgrade changes a row's bits. Versions of moeray that have the same serve side by side, while one pool
after the other is upgraded."""
MAX_MESSAGE_BYTES = 64 * 1024
MAX_TOKENS = 1 << 20
MAX_CHANNEL_NAME = 100  # an AF_UNIX address holds 107


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """What must be equal at both ends for rows to make sense.

    Attributes:
        fingerprint: content id of weights and config.
        dtype: torch's name of the rows' dtype ("bfloat16").
        rows_version: see ROWS_VERSION.
    """

    fingerprint: str
    hidden_size: int
    top_k: int
    num_experts: int
    num_layers: int
    dtype: str
    rows_version: int = ROWS_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Who speaks, and what must agree.

    Attributes:
        sender: name of the shard or group, for messages only.
        group: index of the expert group that is meant.
        inline_rows, max_tokens, dispatch_format: set by the shard; the group takes them over.
        channel: where the group waits for shards of its own node (see channel.py); "" for nowhere.
    """

    sender: str
    backend: str
    group: int
    generation: int
    inline_rows: int
    max_tokens: int
    identity: ModelIdentity
    dispatch_format: RowFormatName = "plain"
    channel: str = ""
    protocol: int = PROTOCOL

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Hello:
        """Read the peer's hello.

        Raises:
            HandshakeRefused: not a hello of this protocol.
        """
        if data.get("protocol") != PROTOCOL:
            raise HandshakeRefused(f"protocol is {data.get('protocol')!r} there, {PROTOCOL} here")
        try:
            values = {each.name: data[each.name] for each in fields(cls)}
            identity = ModelIdentity(**values.pop("identity"))
            hello = cls(identity=identity, **values)
        except (KeyError, TypeError) as error:
            raise HandshakeRefused(f"not a hello of protocol {PROTOCOL}: {error}") from None
        for name, most in (("inline_rows", 4096), ("max_tokens", MAX_TOKENS)):
            value = getattr(hello, name)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise HandshakeRefused(f"{name} is {value!r} there, 1..{most} is legal here")
        if hello.dispatch_format not in get_args(RowFormatName):
            raise HandshakeRefused(f"dispatch_format is {hello.dispatch_format!r} there, unknown here")
        if not isinstance(hello.channel, str) or len(hello.channel) > MAX_CHANNEL_NAME:
            raise HandshakeRefused(f"channel is {hello.channel!r} there, at most {MAX_CHANNEL_NAME} characters here")
        return hello

    def disagreement(self, theirs: Hello) -> str | None:
        """The first field that differs, with both values; None if we belong together."""
        for name in ("backend", "group", "generation"):
            if getattr(self, name) != getattr(theirs, name):
                return self._difference(theirs, name, getattr(theirs, name), getattr(self, name))
        for each in reversed(fields(ModelIdentity)):  # version first: it explains other differences
            mine, other = getattr(self.identity, each.name), getattr(theirs.identity, each.name)
            if mine != other:
                return self._difference(theirs, each.name, other, mine)
        return None

    def _difference(self, theirs: Hello, name: str, other: object, mine: object) -> str:
        return f"{name} is {other!r} at {theirs.sender}, {mine!r} at {self.sender}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How this shard and this group will talk.

    Attributes:
        rank: of the group among those that the shard reaches by its backend; 0 if it has come by channel.
        size: of that communicator, the shard included.
        store: "host:port" of the store through which its ends find each other; "" where this connection or a channel
            carries the rows.
        connect_timeout_s: for building it.
        token: what the shard has sent on its channel; "" without one. Others cannot know it.
    """

    rank: int
    size: int
    store: str
    connect_timeout_s: float
    token: str = ""

    @property
    def by_channel(self) -> bool:
        return self.rank == 0

    @property
    def by_this_connection(self) -> bool:
        return self.rank > 0 and not self.store

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Start:
        """Raises HandshakeRefused: not a start of this protocol."""
        try:
            start = cls(**data)
            if 0 <= start.rank < start.size and start.connect_timeout_s > 0:
                return start
        except TypeError as error:
            raise HandshakeRefused(f"not a start of protocol {PROTOCOL}: {error}") from None
        raise HandshakeRefused(f"a start as rank {start.rank} of {start.size}, within {start.connect_timeout_s} s")


def send_message(connection: socket.socket, message: Mapping[str, Any], deadline: float) -> None:
    """Send one message.

    Args:
        deadline: on the monotonic clock.
    Raises:
        OSError: the peer is gone, or time is up (TimeoutError).
    """
    body = json.dumps(message).encode()
    connection.settimeout(max(0.001, deadline - monotonic()))
    connection.sendall(struct.pack(">I", len(body)) + body)


def receive_message(connection: socket.socket, deadline: float) -> dict[str, Any]:
    """Receive one message.

    Raises:
        OSError: the peer is gone (ConnectionError) or time is up (TimeoutError).
        HandshakeRefused: what came is not one of our messages.
    """
    (length,) = struct.unpack(">I", _receive_exactly(connection, 4, deadline))
    if not 2 <= length <= MAX_MESSAGE_BYTES:
        raise HandshakeRefused(f"a message of {length} bytes; 2..{MAX_MESSAGE_BYTES} is legal")
    try:
        message = json.loads(_receive_exactly(connection, length, deadline))
    except (ValueError, RecursionError):
        raise HandshakeRefused("a message that is not JSON") from None
    if not isinstance(message, dict):
        raise HandshakeRefused(f"a message that is a JSON {type(message).__name__}, not an object")
    return message


def _receive_exactly(connection: socket.socket, num_bytes: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < num_bytes:
        connection.settimeout(max(0.001, deadline - monotonic()))
        part = connection.recv(num_bytes - len(data))
        if not part:
            raise ConnectionResetError("connection closed by peer")
        data += part
        if monotonic() > deadline:
            raise TimeoutError("no complete message in time")
    return bytes(data)
