"""A client's links to all row servers, and the thread that dials those that are missing.

Dialling may wait for a server that hangs; the thread that asks for rows never does: it takes the links that are there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from time import monotonic

from moeray.engram.row_link import RowLink
from moeray.mutual_tls import CertificateError
from moeray.transport.errors import HandshakeRefused

logger = logging.getLogger(__name__)

Dial = Callable[[int, str], RowLink]
"""(server, address) -> a link; raises as `RowLink.dial`."""

RETRY_S, LONGEST_RETRY_S = 0.1, 2.0
NO_ADDRESS = "no address of it is known"


class RowLinks:
    """See module docstring. `live`, `drop` and `close` belong to the asking thread; `move` to any."""

    def __init__(self, num_servers: int, dial: Dial) -> None:
        self._dial = dial
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._addresses: dict[int, str] = {}
        self._links: dict[int, RowLink] = {}
        self._fresh: dict[int, RowLink] = {}
        self._why = dict.fromkeys(range(num_servers), NO_ADDRESS)
        self._next_try: dict[int, tuple[float, float]] = {}
        self._is_closed = False
        threading.Thread(target=self._dial_missing, name="moeray-row-dial", daemon=True).start()

    def move(self, addresses: Mapping[int, str]) -> None:
        """Where the servers are from now on; a link to an address that is still right is kept."""
        with self._lock:
            self._addresses = dict(addresses)
            self._next_try.clear()
        self._wake.set()

    def live(self) -> dict[int, RowLink]:
        """Links by server, at this moment."""
        with self._lock:
            for server, link in self._fresh.items():
                if server in self._links:
                    self._links[server].close()
                self._links[server] = link
            self._fresh.clear()
            moved = [
                link for link in self._links.values()
                if self._addresses.get(link.server) != link.address and not link.pending
            ]  # fmt: skip
            for link in moved:
                del self._links[link.server]
                link.close()
            return dict(self._links)

    def drop(self, link: RowLink, reason: str) -> None:
        """It failed; it is dialled again, later each time that it fails soon."""
        link.close()
        with self._lock:
            if self._links.get(link.server) is link:
                del self._links[link.server]
            self._rest(link.server, reason)
        self._wake.set()

    def why(self, server: int) -> str:
        """What is wrong with a server that is not there, for messages."""
        with self._lock:
            address = self._addresses.get(server)
            return f"row server {server}{f' at {address}' if address else ''}: {self._why[server]}"

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            links = [*self._links.values(), *self._fresh.values()]
            self._links.clear()
            self._fresh.clear()
        self._wake.set()
        for link in links:
            link.close()

    def _rest(self, server: int, reason: str) -> None:
        if self._why[server] != reason:
            logger.warning("row server %d at %s: %s", server, self._addresses.get(server), reason)
            self._why[server] = reason
        _, rest_s = self._next_try.get(server, (0.0, RETRY_S / 2))
        rest_s = min(LONGEST_RETRY_S, 2 * rest_s)
        self._next_try[server] = (monotonic() + rest_s, rest_s)

    def _dial_missing(self) -> None:
        while not self._is_closed:
            self._wake.clear()
            for server, address in self._missing():
                self._dial_one(server, address)
            self._wake.wait(RETRY_S)

    def _missing(self) -> list[tuple[int, str]]:
        now = monotonic()
        with self._lock:
            there = {
                server
                for links in (self._links, self._fresh)
                for server, link in links.items()
                if link.address == self._addresses.get(server)
            }
            return [
                (server, address)
                for server, address in self._addresses.items()
                if server not in there and self._next_try.get(server, (0.0, 0.0))[0] <= now
            ]

    def _dial_one(self, server: int, address: str) -> None:
        try:
            link = self._dial(server, address)
        except (OSError, ValueError, HandshakeRefused, CertificateError) as error:
            with self._lock:
                self._rest(server, f"{error}" or type(error).__name__)
            return
        with self._lock:
            is_wanted = not self._is_closed and self._addresses.get(server) == address
            if is_wanted:
                logger.info("row server %d at %s is there", server, address)
                self._fresh[server] = link
        if not is_wanted:
            link.close()

    def proven(self, server: int) -> None:
        """It has brought rows: if it fails, it is dialled again at once."""
        with self._lock:
            self._next_try.pop(server, None)
