"""Writes the controller's state down, behind its back: an event never waits for the store.

A state that was published but not written when the controller died is no harm: members say at joining which generation
they are part of, and numbers never go back (`Membership.join`).
"""

from __future__ import annotations

import asyncio
import logging
import time

from moeray.controller.store import Store, StoreError
from moeray.membership import Membership
from moeray.membership.snapshot import to_json

logger = logging.getLogger(__name__)

LOAD_S = 10.0
RETRY_S = 1.0
REFRESH_S = 6 * 3600.0
"""Even without a change: entries of Redis expire."""


class Keeper:
    """One writer; the newest state wins."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._state: Membership | None = None
        self._written = ""
        self._changed = asyncio.Event()
        self._lock = asyncio.Lock()
        self._is_closed = False

    def load(self) -> str | None:
        """What a predecessor left; blocks. A store that does not answer for LOAD_S is done without."""
        deadline = time.monotonic() + LOAD_S
        while True:
            try:
                return self._store.load()
            except StoreError as error:
                logger.warning("the controller's state cannot be read: %s", error)
                if time.monotonic() > deadline:
                    return None
                time.sleep(RETRY_S)

    def put(self, state: Membership) -> None:
        """This is the state now."""
        self._state = state
        self._changed.set()

    async def keep(self) -> None:
        """Write every state, or the newest if they come faster than the store takes them; for ever."""
        while not self._is_closed:
            try:
                await asyncio.wait_for(self._changed.wait(), REFRESH_S)
            except TimeoutError:
                self._written = ""
            self._changed.clear()
            try:
                await self._write()
            except StoreError as error:
                logger.warning("the controller's state is not written: %s", error)
                self._changed.set()
                await asyncio.sleep(RETRY_S)

    async def close(self) -> None:
        """Write nothing more, and remove what was written."""
        self._is_closed = True
        async with self._lock:
            try:
                await asyncio.to_thread(self._store.delete)
            except StoreError as error:
                logger.warning("the controller's state stays behind: %s", error)

    async def _write(self) -> None:
        if self._state is None:
            return
        text = to_json(self._state)
        async with self._lock:
            if text != self._written and not self._is_closed:
                await asyncio.to_thread(self._store.save, text)
                self._written = text
