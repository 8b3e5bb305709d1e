"""Engram tables that lie with row servers: one request per server and step, for all layers at once.

The request goes out at `ask`, so rows travel while the layers before the first Engram layer are computed. Lost is what
a server does not bring in its time, or brings damaged; then whoever else holds the same columns is asked, within the
same step. A row that nobody brings is an error and never a zero.
"""

from __future__ import annotations

import contextlib
import itertools
import select
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from time import monotonic

from moeray.config import ClusterTlsConfig
from moeray.engram.row_link import Portion, RowLink, RowsRefused
from moeray.engram.row_links import RowLinks
from moeray.engram.row_wire import RowHello, WireError
from moeray.engram.rows import IntArray, RowsUnavailable, StoredRows
from moeray.engram.shares import Shares
from moeray.engram.staging import Staging
from moeray.engram.tables import TableSet
from moeray.mutual_tls import ClusterCertificate

SLOWEST_BYTES_PER_S = 32 << 20
"""A server has `timeout_s` and the time that its bytes take at this rate."""
CARRIED_BYTES = 256 << 10
"""A larger answer does not fit in what the kernel holds for us: a thread receives it while layers are computed."""
DIAL_S = 2.0
"""One server that hangs must not keep the others from coming back."""
LOOK_AGAIN_S = 0.01
"""While nobody is there to ask."""


class ServedRows:
    """See module docstring; implements `EngramRows`.

    Args:
        sender: this shard, for the servers' logs.
        addresses: server number -> "host:port"; those that are missing may come by `move`.
        timeout_s: rows are brought, or given up, within it; a server of several that hold the same rows has its part.
        host: local address to dial from.
        tls: if it is on, only servers of this cluster are spoken to, encrypted.
    Raises:
        CertificateError: a file of `tls` cannot be used.
    """

    def __init__(
        self,
        tables: TableSet,
        shares: Shares,
        addresses: Mapping[int, str],
        *,
        sender: str,
        timeout_s: float,
        host: str = "127.0.0.1",
        tls: ClusterTlsConfig | None = None,
    ) -> None:
        self._tables, self._shares = tables, shares
        self._timeout_s = timeout_s
        certificate = ClusterCertificate.of(tls)
        hellos = [
            RowHello.of(sender, tables, server, shares.num_servers, shares.copies)
            for server in range(shares.num_servers)
        ]
        self._links = RowLinks(
            shares.num_servers,
            lambda server, address: RowLink.dial(address, hellos[server], host, min(timeout_s, DIAL_S), certificate),
        )
        self._links.move(addresses)
        self._staging = Staging(tables, shares)
        self._numbers = itertools.count(1)
        self._carrier = ThreadPoolExecutor(1, "moeray-rows")
        self._flight: _Flight | None = None

    def move(self, addresses: Mapping[int, str]) -> None:
        """Where the servers are from now on; from any thread."""
        self._links.move(addresses)

    def ask(self, rows_LTC: IntArray) -> _Flight:
        if self._flight is not None:  # its bytes go where ours are to go
            with contextlib.suppress(RowsUnavailable):
                self._flight.finish()
        self._staging.set(rows_LTC)
        self._flight = _Flight(self._tables, self._shares, self._staging, self._links, self._numbers, self._timeout_s)
        self._flight.begin(self._carrier)
        return self._flight

    def prefetch(self, rows_LTC: IntArray) -> None:
        """Nothing: the servers have their rows in memory, and what they send has no place here before its step."""

    def close(self) -> None:
        self._carrier.shutdown(wait=True)
        self._links.close()


class _Flight:
    """The rows of one step, on their way; implements `AskedRows`."""

    def __init__(
        self,
        tables: TableSet,
        shares: Shares,
        staging: Staging,
        links: RowLinks,
        numbers: itertools.count[int],
        timeout_s: float,
    ) -> None:
        self._tables, self._shares, self._staging, self._links = tables, shares, staging, links
        self._numbers, self._timeout_s = numbers, timeout_s
        self._homeless = staging.shares_asked()
        self._asked: dict[RowLink, None] = {}
        self._carried: Future[None] | None = None
        self._failure: RowsUnavailable | None = None
        self._num_bytes = sum(map(len, staging.places(self._homeless)))

    def begin(self, carrier: ThreadPoolExecutor) -> None:
        """Send what can be sent at once."""
        self._place(monotonic())
        self._pump()
        if self._num_bytes > CARRIED_BYTES:
            self._carried = carrier.submit(self._receive)

    def take(self, layer: int) -> StoredRows:
        self.finish()
        return self._staging.stored(layer)

    def finish(self) -> None:
        """Wait for all rows.

        Raises:
            RowsUnavailable: they will not come; again at every call.
        """
        if self._carried is not None:
            self._carried.result()
        elif self._failure is None:
            self._receive()
        if self._failure is not None:
            raise self._failure

    def _receive(self) -> None:
        began = monotonic()
        limit = began + self._timeout_s + self._num_bytes / SLOWEST_BYTES_PER_S
        for link in self._asked:
            for portion in link.pending:
                portion.due = self._due(began, portion)
        while True:
            waits = self._pump()
            if not waits and not self._homeless:
                return
            now = monotonic()
            if now >= limit:
                self._give_up()
                return
            self._drop_late(now)
            self._place(now)
            self._wait(waits, limit)

    def _due(self, now: float, portion: Portion) -> float:
        return now + self._timeout_s / self._shares.copies + portion.num_bytes / SLOWEST_BYTES_PER_S

    def _place(self, now: float) -> None:
        """Ask for the shares that nobody was asked for, of whom is there."""
        if not self._homeless:
            return
        live = self._links.live()
        shares_of: dict[RowLink, list[int]] = {}
        homeless = []
        for share in self._homeless:
            link = next((live[server] for server in self._shares.holders(share) if server in live), None)
            if link is None:
                homeless.append(share)
            else:
                shares_of.setdefault(link, []).append(share)
        self._homeless = tuple(homeless)
        for link, found in shares_of.items():
            shares = tuple(found)
            portion = Portion(next(self._numbers), shares, self._staging.places(shares))
            portion.due = self._due(now, portion)
            link.ask(self._staging.request(portion.number, shares), portion)
            self._asked[link] = None

    def _pump(self) -> dict[RowLink, int]:
        """Links that are not done, and what to poll each for."""
        waits = {}
        for link in list(self._asked):
            try:
                events = link.pump()
            except (OSError, WireError, RowsRefused) as error:
                self._drop(link, str(error) or type(error).__name__)
                continue
            if events:
                waits[link] = events
            else:
                del self._asked[link]
                self._links.proven(link.server)
        return waits

    def _drop_late(self, now: float) -> None:
        for link in [each for each in self._asked if each.pending and each.pending[0].due <= now]:
            self._drop(link, f"no rows within {self._timeout_s / self._shares.copies:g} s")

    def _drop(self, link: RowLink, reason: str) -> None:
        lost = {share for portion in link.pending for share in portion.shares}
        self._homeless = tuple(sorted(lost.union(self._homeless)))
        del self._asked[link]
        self._links.drop(link, reason)

    def _wait(self, waits: Mapping[RowLink, int], limit: float) -> None:
        poll = select.poll()
        due = limit
        for link, events in waits.items():
            if link in self._asked:
                poll.register(link, events)
                due = min(due, link.pending[0].due if link.pending else limit)
        left_s = min(LOOK_AGAIN_S, due - monotonic()) if self._homeless else due - monotonic()
        if any(link not in waits for link in self._asked):  # asked just now
            left_s = 0.0
        poll.poll(max(0.0, left_s * 1000))

    def _give_up(self) -> None:
        for link in list(self._asked):
            self._drop(link, f"no rows within {self._timeout_s:g} s")
        shares = self._homeless
        columns = ", ".join(
            f"{each.start}..{each.stop - 1}" for each in (self._shares.columns(share) for share in shares)
        )
        servers = dict.fromkeys(server for share in shares for server in self._shares.holders(share))
        self._failure = RowsUnavailable(
            f"hash columns {columns} of {self._tables.names(self._staging.layers_with(shares))}: "
            f"nobody brings them within {self._timeout_s:g} s: " + "; ".join(map(self._links.why, servers))
        )
