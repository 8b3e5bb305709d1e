"""A Redis of a test's own on loopback: started, killed, started again with what it had."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moeray.ingress.ports import free_ports

SERVERS = ("redis-server", "valkey-server", "keydb-server")
WAIT_S = 60.0
LOOPBACK = "127.0.0.1"


def missing() -> str | None:
    """Why there can be none."""
    return None if server_binary() else f"none of {', '.join(SERVERS)} is installed"


def nobody() -> str:
    """The URL of a Redis that is not there."""
    return f"redis://{LOOPBACK}:{free_ports(LOOPBACK, 1)[0]}/0"


@contextmanager
def something_else(answer: bytes, every_s: float) -> Iterator[str]:
    """A server that is no Redis: says so much every so often, whatever it is asked."""
    stop = threading.Event()

    def serve(listener: socket.socket) -> None:
        held = []
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            held.append(connection)
            try:
                while not stop.wait(every_s) and answer:
                    connection.sendall(answer)
            except OSError:
                continue

    with socket.create_server((LOOPBACK, 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        try:
            yield f"redis://{LOOPBACK}:{listener.getsockname()[1]}/0"
        finally:
            stop.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(WAIT_S)


class RedisServer:
    """See module docstring. Attributes: url: for clients. process: the server's, None while there is none."""

    def __init__(self, folder: Path, port: int | None = None, **options: str) -> None:
        """`options` are Redis's own, with underscores; `port` is any free one if it is not given."""
        self._port, self._folder, self._options = port or free_ports(LOOPBACK, 1)[0], folder, options
        self.url = f"redis://{LOOPBACK}:{self._port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        binary = server_binary()
        assert binary is not None, missing()
        options = {"bind": LOOPBACK, "port": self._port, "dir": self._folder, "appendonly": "yes", "save": ""}
        # "everysec" answers up to 2 s before it writes where the disk is slow: a kill loses what was acknowledged.
        options["appendfsync"] = "always"
        options |= {key.replace("_", "-"): value for key, value in self._options.items()}
        command = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        self.process = subprocess.Popen([binary, *command], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + WAIT_S
        while not self._answers():
            assert time.monotonic() < deadline and self.process.poll() is None, "Redis did not start"
            time.sleep(0.05)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(WAIT_S)
            self.process = None

    def _answers(self) -> bool:
        try:
            with socket.create_connection((LOOPBACK, self._port), 1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(7) == b"+PONG\r\n"
        except OSError:
            return False


def server_binary() -> str | None:
    """The system's, or the one that the development environment brings."""
    scripts = sysconfig.get_path("scripts")
    return next(
        (found for name in SERVERS for path in (None, scripts) if (found := shutil.which(name, path=path))), None
    )
