"""The tenants that an ingress goes by: read at the start, looked at again twice a second, the last good ones kept."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from moeray.tenancy.errors import RegistryUnavailable, RosterError
from moeray.tenancy.roster import Roster

POLL_S = 0.5
"""A revoked key is refused after this and the time to read the tenants: within a second."""

_logger = logging.getLogger(__name__)


class RosterStore(Protocol):
    """Where tenants are kept. Calls block; one thread at a time. Both may raise RegistryUnavailable or RosterError."""

    def read(self) -> Roster: ...

    def read_if_changed(self) -> Roster | None: ...

    def edit(self, change: Callable[[Roster], Roster]) -> None: ...


class Registry:
    """`roster` is the newest good state; `watch` keeps it so."""

    def __init__(self, store: RosterStore, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Reads the tenants.

        Raises:
            RegistryUnavailable, RosterError: without a good state there is nothing to start with.
        """
        self._store, self._clock = store, clock
        self.roster = store.read()
        self._wrong: str | None = None
        self._silent: str | None = None
        self._reached = clock()

    @property
    def problem(self) -> str | None:
        """Why the newest state of the store is not the one in use; None while it is."""
        return self._silent or self._wrong

    @property
    def unreached_s(self) -> float:
        """How long the store has not answered; a revocation since then may be unknown here."""
        return self._clock() - self._reached

    def refresh(self) -> None:
        """Look once. What is wrong is said in the log, once each, and in `problem`; the last good state stays."""
        before = self.problem
        try:
            roster = self._store.read_if_changed()
        except RegistryUnavailable as error:
            self._silent = f"the tenants cannot be read, those read before stay in force: {error}"
        except RosterError as error:
            self._silent, self._reached = None, self._clock()
            self._wrong = f"THE NEW TENANTS ARE WRONG AND IGNORED, those read before stay in force: {error}"
        else:
            self._silent, self._reached = None, self._clock()
            if roster is not None:
                self.roster, self._wrong = roster, None
                _logger.info("%d tenants read", len(roster.tenants))
        if self.problem is not None and self.problem != before:
            _logger.error("%s", self.problem)

    async def watch(self) -> None:
        """Run as a task until cancelled; reading is done in a thread."""
        while True:
            await asyncio.sleep(POLL_S)
            await asyncio.to_thread(self.refresh)
