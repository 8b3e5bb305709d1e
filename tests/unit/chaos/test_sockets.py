"""Sockets of another process are cut or made deaf while it uses them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from chaos import sockets

ECHO = """
import socket
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
connection, _ = server.accept()
while data := connection.recv(100):
    connection.sendall(data)
print("end", flush=True)
connection.close()
"""


@contextmanager
def echo() -> Iterator[tuple[subprocess.Popen[str], socket.socket]]:
    with subprocess.Popen([sys.executable, "-c", ECHO], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        with socket.create_connection(("127.0.0.1", int(process.stdout.readline())), timeout=60) as connection:
            connection.sendall(b"a")
            assert connection.recv(1) == b"a"
            try:
                yield process, connection
            finally:
                process.kill()


def their_end(process: subprocess.Popen[str], connection: socket.socket) -> int:
    pairs = sockets.connections_between(os.getpid(), process.pid)
    assert (os.getpid(), connection.fileno()) in pairs
    (theirs,) = [descriptor for pid, descriptor in pairs if pid == process.pid]
    return theirs


def test_a_cut_socket_ends_for_both_while_the_process_lives() -> None:
    with echo() as (process, connection):
        try:
            sockets.cut(process.pid, their_end(process, connection))
        except PermissionError as error:
            pytest.skip(f"this user may not take descriptors of its own processes: {error}")
        assert connection.recv(1) == b""
        assert process.stdout is not None and process.stdout.readline() == "end\n"


def test_a_deaf_socket_stays_open_and_hears_nothing() -> None:
    with echo() as (process, connection):
        try:
            sockets.deafen(process.pid, their_end(process, connection))
        except PermissionError as error:
            pytest.skip(f"this user may not take descriptors of its own processes: {error}")
        connection.settimeout(1)
        connection.sendall(b"b")
        with pytest.raises(TimeoutError):
            connection.recv(1)
        assert process.poll() is None
