"""A link of few bytes per second between a client and a server of this machine."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

PIECE = 16 << 10


class SlowLink:
    """Forwards connections to `target`; what comes back is held to `bytes_per_s`. A context: the address to dial."""

    def __init__(self, target: tuple[str, int], bytes_per_s: float) -> None:
        self._target, self._bytes_per_s = target, bytes_per_s
        self._listener = socket.create_server(("127.0.0.1", 0))

    def __enter__(self) -> tuple[str, int]:
        threading.Thread(target=self._accept, daemon=True).start()
        address: tuple[str, int] = self._listener.getsockname()
        return address

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                for source, sink, limit in ((near, far, 0.0), (far, near, self._bytes_per_s)):
                    threading.Thread(target=_forward, args=(source, sink, limit), daemon=True).start()


def _forward(source: socket.socket, sink: socket.socket, bytes_per_s: float) -> None:
    free_at = time.monotonic()
    with contextlib.suppress(OSError):
        while data := source.recv(PIECE):
            if bytes_per_s:
                free_at = max(free_at, time.monotonic()) + len(data) / bytes_per_s
                time.sleep(max(0.0, free_at - time.monotonic()))
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
