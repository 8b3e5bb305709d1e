"""The judge of the fuzz run finds each kind of fault: in an answer, in one that does not come, and at the end."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cases
import pytest
import target as fuzz_target
from cases import send_and_go, send_json, send_raw
from judge import MAX_GROWTH_BYTES, MAX_SILENCE_S, End, Judge
from target import Target

SECRET = b"zebra"
HEADERS = {"authorization": "Bearer key"}
FAULTS = [
    (b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n", "500"),
    (b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n", "503"),
    (b'HTTP/1.1 400 Bad\r\ncontent-length: 32\r\n\r\n{"e": "Traceback (most recent call last)"}', "a traceback"),
    (b'HTTP/1.1 400 Bad\r\n\r\n{"e": "File \'/a/b.py", line 3"}', "a traceback"),
    (b"HTTP/1.1 200 OK\r\n\r\na zebra", "another tenant"),
    (b"HTTP/1.1 200 OK\r\nx-name: zebra\r\n\r\n", "another tenant"),
]


@contextmanager
def server(answer: bytes | None) -> Iterator[Target]:
    """Gives every connection this answer; None: none at all."""
    over = threading.Event()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            if answer is None:
                over.wait(60)
                return
            self.rfile.read1(65536)
            self.wfile.write(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as listener:
        listener.daemon_threads = True
        threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield Target(listener.server_address[1], 0, HEADERS, Judge([SECRET]))
        finally:
            over.set()
            listener.shutdown()


@pytest.mark.parametrize(("answer", "named"), FAULTS)
def test_a_faulty_answer_is_found_however_it_was_asked_for(answer: bytes, named: str) -> None:
    answer = answer.replace(b"content-length: 32", b"x: y")
    with server(answer) as target:
        for ask in (
            lambda: send_json(target, "/v1/completions", b"{}"),
            lambda: send_raw(target, b"GET / HTTP/1.1\r\n\r\n"),
            lambda: send_and_go(target, b"GET / HTTP/1.1\r\n\r\n", 10_000),
        ):
            with pytest.raises(AssertionError, match=named):
                ask()


def test_an_answer_that_does_not_come_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cases, fuzz_target):
        monkeypatch.setattr(module, "ANSWER_S", 0.2)
    with server(None) as target:
        with pytest.raises(AssertionError, match="no answer"):
            send_json(target, "/v1/completions", b"{}")
        with pytest.raises(AssertionError, match="no answer"):
            send_raw(target, b"GET / HTTP/1.1\r\n\r\n")
        assert target.judge.num_cases == 2


@pytest.mark.parametrize("status", ["INTERNAL", "UNKNOWN", "UNAVAILABLE"])
def test_a_grpc_status_that_is_the_servers_fault_is_found(status: str) -> None:
    with pytest.raises(AssertionError, match=status):
        Judge([]).saw("grpc message", status, b"")


@pytest.mark.parametrize("status", ["400", "404", "501", "INVALID_ARGUMENT", "OK", "closed"])
def test_what_is_the_clients_fault_passes(status: str) -> None:
    judge = Judge([SECRET])
    judge.saw("any", status, json.dumps({"error": "no"}).encode())
    assert judge.counts == {("any", status): 1}
    assert not judge.faults(End())


@pytest.mark.parametrize(
    ("end", "named"),
    [
        ({"grown_bytes": MAX_GROWTH_BYTES + 1}, "memory grew by 512 MiB"),
        ({"silence_s": MAX_SILENCE_S + 1}, "/health took"),
        ({"left": (("the pool", 0), ("the shard", 2))}, "2 requests are left in the shard"),
        ({"ended": ("the ingress ended with -9",)}, "the ingress ended with -9"),
    ],
)
def test_a_server_that_does_not_stand_well_at_the_end_is_found(end: dict[str, Any], named: str) -> None:
    (fault,) = Judge([]).faults(End(**end))
    assert named in fault


def test_what_the_watchers_lost_is_told_once() -> None:
    judge = Judge([])
    judge.lost += ["/health: 503"] * 3
    assert judge.faults(End()) == ["/health: 503"]
