"""The handshake: bounded, and clear about what does not fit."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace
from time import monotonic

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeray.transport.errors import HandshakeRefused
from moeray.transport.handshake import MAX_MESSAGE_BYTES, Hello, ModelIdentity, Start, receive_message, send_message
from moeray.transport.rendezvous import keep_alive_all

IDENTITY = ModelIdentity(fingerprint="f00d", hidden_size=64, top_k=2, num_experts=8, num_layers=2, dtype="bfloat16")
SHARD = Hello(sender="shard a", backend="gloo", group=1, generation=4, inline_rows=8, max_tokens=9, identity=IDENTITY)
GROUP = replace(SHARD, sender="expert group 1", inline_rows=1)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


def test_ends_that_belong_together_agree() -> None:
    assert GROUP.disagreement(SHARD) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("fingerprint", "beef"), ("hidden_size", 65), ("top_k", 3), ("num_experts", 9), ("num_layers", 3), ("dtype", "f")],
)
def test_a_different_model_is_named_by_field_and_both_values(field: str, value: object) -> None:
    other = replace(SHARD, identity=replace(IDENTITY, **{field: value}))
    wrong = GROUP.disagreement(other)
    assert wrong == f"{field} is {value!r} at shard a, {getattr(IDENTITY, field)!r} at expert group 1"


@pytest.mark.parametrize(("field", "value"), [("group", 0), ("generation", 5), ("backend", "nccl")])
def test_a_different_place_is_named_by_field_and_both_values(field: str, value: object) -> None:
    wrong = GROUP.disagreement(replace(SHARD, **{field: value}))
    assert wrong == f"{field} is {value!r} at shard a, {getattr(GROUP, field)!r} at expert group 1"


def test_a_different_release_is_named_before_what_follows_from_it() -> None:
    other = replace(SHARD, identity=replace(IDENTITY, rows_version=2, dtype="float32"))
    assert "rows_version" in str(GROUP.disagreement(other))


def test_a_hello_survives_the_wire(pair: tuple[socket.socket, socket.socket]) -> None:
    send_message(pair[0], SHARD.to_json(), monotonic() + 1)
    assert Hello.from_json(receive_message(pair[1], monotonic() + 1)) == SHARD


@pytest.mark.parametrize("length", [0, 1, MAX_MESSAGE_BYTES + 1, 2**32 - 1])
def test_an_illegal_length_is_refused_before_it_is_read(pair: tuple[socket.socket, socket.socket], length: int) -> None:
    pair[0].sendall(struct.pack(">I", length) + b"x" * 100)
    with pytest.raises(HandshakeRefused, match=f"{length} bytes"):
        receive_message(pair[1], monotonic() + 1)


def test_a_drip_of_bytes_ends_at_the_deadline(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].sendall(struct.pack(">I", 50) + b"{")
    started = monotonic()
    with pytest.raises(TimeoutError):
        receive_message(pair[1], started + 0.1)
    assert monotonic() - started < 1


def test_an_end_of_file_is_an_error(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].sendall(b"\0\0")
    pair[0].close()
    with pytest.raises(ConnectionError):
        receive_message(pair[1], monotonic() + 1)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_any_json_is_a_hello_or_refused(value: object) -> None:
    body = json.dumps(value).encode()
    left, right = socket.socketpair()
    with left, right:
        left.sendall(struct.pack(">I", len(body)) + body)
        with pytest.raises(HandshakeRefused):
            Hello.from_json(receive_message(right, monotonic() + 1))


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"rank": 1, "size": 2, "store": "a:1", "connect_timeout_s": 1.0, "extra": 1},
        {"rank": 2, "size": 2, "store": "a:1", "connect_timeout_s": 1.0},
        {"rank": -1, "size": 2, "store": "a:1", "connect_timeout_s": 1.0},
        {"rank": 1, "size": 2, "store": "a:1", "connect_timeout_s": 0},
        {"rank": "1", "size": 2, "store": "a:1", "connect_timeout_s": 1.0},
    ],
)
def test_a_start_that_is_none_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(HandshakeRefused, match="a start"):
        Start.from_json(data)


def test_a_start_survives_its_message() -> None:
    start = Start(rank=1, size=3, store="127.0.0.1:5", connect_timeout_s=2.5)
    assert Start.from_json(start.to_json()) == start
    assert not start.by_channel and Start(rank=0, size=1, store="", connect_timeout_s=1.0).by_channel


def test_a_hello_of_another_protocol_is_refused_with_both_numbers() -> None:
    with pytest.raises(HandshakeRefused, match="protocol is 1 there, 2 here"):
        Hello.from_json({**SHARD.to_json(), "protocol": 1})


@pytest.mark.parametrize(
    "change",
    [
        {"group": None},
        {"extra": 1},
        {"identity": {}},
        {"identity": 3},
        {"inline_rows": 0},
        {"max_tokens": 0},
        {"max_tokens": 2**40},
        {"dispatch_format": "int3"},
        {"channel": "x" * 101},
        {"channel": None},
    ],
)
def test_an_incomplete_hello_is_refused(change: dict[str, object]) -> None:
    data = {**SHARD.to_json(), **change}
    if change == {"group": None}:
        del data["group"]
    if change == {"extra": 1}:
        assert Hello.from_json(data) == SHARD  # newer fields are ignored
        return
    with pytest.raises(HandshakeRefused):
        Hello.from_json(data)


def test_keeping_connections_alive_reaches_those_of_one_host_and_leaves_no_descriptor_behind() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as one:
        accepted, _ = listener.accept()
        with accepted, socket.socketpair()[0], open("/dev/null"):  # noqa: PTH123
            before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
            keep_alive_all("127.0.0.2")
            assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
            keep_alive_all("127.0.0.1")
            assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
