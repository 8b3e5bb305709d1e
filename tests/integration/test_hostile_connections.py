"""Ten thousand connections that ask nothing, floods of pings and handshakes by the byte: those who ask are served."""

from __future__ import annotations

import json
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import grpc
import pytest
from front_process import MODEL
from target import Attacked

from moeray.v1 import inference_pb2 as pb
from moeray.v1.inference_pb2_grpc import InferenceStub

pytestmark = pytest.mark.full
NUM_IDLE = 10_000
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + struct.pack(">I", 0)[1:] + b"\x04\x00" + struct.pack(">I", 0)
PING = struct.pack(">I", 8)[1:] + b"\x06\x00" + struct.pack(">I", 0) + b"pingpong"
CLOSED_S = 60.0


@pytest.fixture(scope="module")
def attacked(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    with Attacked(model, tmp_path_factory.mktemp("attacked")) as attacked:
        yield attacked


@contextmanager
def many_files(num: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < num:
        pytest.skip(f"this process may have {hard} files, the test needs {num}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, num), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=CLOSED_S)


def ask_http(attacked: Attacked) -> None:
    connection = attacked.target.connection()
    body = json.dumps({"model": MODEL, "prompt": "hi", "max_tokens": 2})
    headers = {**attacked.target.headers, "content-type": "application/json"}
    connection.request("POST", "/v1/completions", body, headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    assert answer.status == 200, text


def ask_grpc(attacked: Attacked) -> None:
    metadata = tuple((name.lower(), value) for name, value in attacked.target.headers.items())
    options = (("grpc.use_local_subchannel_pool", 1),)
    with grpc.insecure_channel(attacked.target.grpc_address, options=options) as channel:
        request = pb.CompletionRequest(model=MODEL, prompt=["hi"], max_tokens=2)
        InferenceStub(channel).Complete(request, metadata=metadata, timeout=CLOSED_S, wait_for_ready=True)


def closed_within(peer: socket.socket) -> bool:
    """Whether the server ends the connection in time; what it says meanwhile is thrown away."""
    deadline = time.monotonic() + CLOSED_S
    try:
        while time.monotonic() < deadline:
            if not peer.recv(65536):
                return True
    except TimeoutError:
        return False
    except OSError:
        return True
    return False


def test_ten_thousand_idle_http_connections_are_noticed_by_nobody(attacked: Attacked) -> None:
    before = attacked.rss_bytes
    with many_files(NUM_IDLE + 500), ExitStack() as stack:
        idle = []
        for number in range(NUM_IDLE):
            idle.append(stack.enter_context(connect(attacked.target.http_port)))
            if number % 500 == 0:
                ask_http(attacked)
        for _ in range(10):
            ask_http(attacked)
            ask_grpc(attacked)
        assert attacked.rss_bytes - before < 512 << 20
        assert closed_within(idle[0]) and closed_within(idle[-1])
    assert attacked.judge.lost == []


def test_a_flood_of_pings_ends_its_connection_alone(attacked: Attacked) -> None:
    for _ in range(20):
        with connect(attacked.target.grpc_port) as peer:
            with suppress(OSError):  # it may be ended before all was sent
                peer.sendall(PREFACE + PING * 20_000)
            assert closed_within(peer)
        ask_grpc(attacked)
    assert attacked.judge.lost == []


def test_handshakes_by_the_byte_end_in_time_and_keep_nobody_out(attacked: Attacked) -> None:
    with ExitStack() as stack:
        peers = [stack.enter_context(connect(attacked.target.grpc_port)) for _ in range(200)]
        over = threading.Event()

        def drip() -> None:
            for byte in PREFACE:
                for peer in peers:
                    try:
                        peer.send(bytes([byte]))
                    except OSError:
                        continue
                if over.wait(2):
                    return

        dripping = threading.Thread(target=drip, daemon=True)
        dripping.start()
        for _ in range(5):
            ask_grpc(attacked)
        assert closed_within(peers[0]) and closed_within(peers[-1])
        over.set()
        dripping.join(60)
    assert attacked.judge.lost == []
