"""Ends this process when one step of its work takes too long, although other threads run: a kernel that never returns.

`Guard` hears the beats of a thread beside the one that works, so it cannot tell.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOKS = 20
"""So many times in the longest time that a step may take, it is looked at."""


class StepLimit:
    """One thread's steps. Nothing is limited before `start`.

    Attributes:
        is_excused: set it while a step waits for something that has a limit of its own; that time does not count.
        spent_s: by all steps that have ended.
    """

    def __init__(self) -> None:
        self.is_excused = False
        self.spent_s = 0.0
        self._step: object | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """What is done inside is one step. Costs less than a microsecond; not to be nested."""
        self.is_excused = False
        self._step = object()
        began = time.perf_counter()
        try:
            yield
        finally:
            self._step = None
            self.spent_s += time.perf_counter() - began

    def start(self, step_s: float, end: Callable[[float], None] | None = None) -> None:
        """Watch from now on, in a thread, to the end of the process.

        Time in which the process did not run (it was stopped, or the machine suspended) does not count.

        Args:
            step_s: a step may take so long.
            end: called with the step's seconds, once, by that thread; kills this process if it is not given.
        """
        watching = threading.Thread(
            target=self._watch, args=(step_s, end or _kill), name="moeray-step-limit", daemon=True
        )
        watching.start()

    def _watch(self, step_s: float, end: Callable[[float], None]) -> None:
        tick_s = step_s / LOOKS
        step, age_s, seen = self._step, 0.0, time.monotonic()
        while age_s <= step_s:
            time.sleep(tick_s)
            before, seen = seen, time.monotonic()
            if self._step is not step:
                step, age_s = self._step, 0.0
            elif step is not None and not self.is_excused:
                age_s += min(seen - before, 2 * tick_s)
        end(age_s)


def _kill(age_s: float) -> None:
    """SIGKILL: the thread that hangs would run no handler."""
    print(f"process {os.getpid()}: a step has taken {age_s:.0f} s: killed", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
