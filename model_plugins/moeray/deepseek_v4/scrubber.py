"""Finds weights that have changed in memory: a flipped bit would give finite, wrong rows for as long as nobody looks.

A thread of low priority compares everything that is held with its digest, round after round. At 50 MB/s this takes 2 %
of a core (CRC-32 reads 2.5 GB/s), and damage is found within 20 s per GB held, at least within a minute and a half.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from time import monotonic

from moeray.deepseek_v4.errors import ExpertError

BYTES_PER_S = 50e6
ROUND_S = 60.0
"""At least; what is small is not compared all the time."""
NICENESS = 10
"""More than the rest of the process."""

logger = logging.getLogger(__name__)


class Scrubber:
    """One thread, until damage is found or `close`."""

    def __init__(
        self,
        scrub: Callable[[], Iterator[int]],
        on_damage: Callable[[ExpertError], None],
        *,
        bytes_per_s: float = BYTES_PER_S,
        round_s: float = ROUND_S,
    ) -> None:
        """Begin.

        Args:
            scrub: one round, see `ExpertStore.scrub`.
            on_damage: called once, in the thread.
            bytes_per_s: compared on average, at most.
            round_s: from one round's begin to the next one's, at least.
        """
        self._scrub, self._on_damage = scrub, on_damage
        self._bytes_per_s, self._round_s = bytes_per_s, round_s
        self._closing = threading.Event()
        self.rounds = 0
        self._thread = threading.Thread(target=self._run, name="moeray-scrub", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        thread = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)
        try:
            while not self._closing.is_set():
                self._round()
        except ExpertError as error:
            logger.error("%s", error)
            self._on_damage(error)

    def _round(self) -> None:
        began, num_bytes = monotonic(), 0
        for piece in self._scrub():
            num_bytes += piece
            ahead_s = num_bytes / self._bytes_per_s - (monotonic() - began)
            # Short sleeps cost more than what they let others do.
            if ahead_s > 0.01 and self._closing.wait(ahead_s):
                return
        self.rounds += 1
        self._closing.wait(max(0.0, self._round_s - (monotonic() - began)))
