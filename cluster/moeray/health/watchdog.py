"""A small process beside this one that kills it when it hangs, so that whoever started it starts another.

A thread of the guarded process writes a byte into a pipe ten times per `hang_s`. A stopped process (SIGSTOP), one that
waits for a dead disk, or one whose interpreter is held by a call that does not return writes none. A thread that waits
for ever beside others that run is not noticed: an engine's steps have a limit for that (`steps.py`), and whoever waits
for answers has one.

The watching process runs this file, without site-packages: it needs few megabytes, holds none of the guarded
process' descriptors and is pinned nowhere. It ends with the process that it guards.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

BEATS = 10
"""In the time after which a process counts as hung."""
BUSY_TIMES = 6
"""So many times as long may one go without a beat that computes meanwhile: it compiles, or shares too few cores."""


class Guard:
    """What keeps one process watched; `close` ends it."""

    def __init__(self, hang_s: float) -> None:
        self._hang_s = hang_s
        self._closing = threading.Event()
        self._watcher = _start(hang_s)
        self._thread = threading.Thread(target=self._beat, name="moeray-beat", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """Of the watching process."""
        return self._watcher.pid

    def close(self) -> None:
        """Watch no longer. Idempotent."""
        self._closing.set()
        self._thread.join()
        _end(self._watcher)

    def _beat(self) -> None:
        while not self._closing.wait(self._hang_s / BEATS):
            assert self._watcher.stdin is not None
            try:
                self._watcher.stdin.write(b".")
            except BlockingIOError:
                pass  # it has not read for very long, and will find more than enough
            except OSError:  # it was killed by somebody; this process must not go unwatched
                _end(self._watcher)
                with suppress(OSError):  # no memory or no process to be had: the next beat tries again
                    self._watcher = _start(self._hang_s)


def guard(hang_s: float) -> Guard:
    """Have this process killed (SIGKILL) when it gives no sign of life for `hang_s` seconds (BUSY_TIMES as long if it
    computes meanwhile).

    Time in which the watching process did not run either (the machine was suspended, the container frozen) does not
    count, nor does time in which a debugger holds this process.

    Raises:
        OSError: no further process can be started.
    """
    return Guard(hang_s)


def _start(hang_s: float) -> subprocess.Popen[bytes]:
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(os.getpid()), repr(hang_s)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0, start_new_session=True,
    )  # fmt: skip
    assert watcher.stdin is not None
    os.set_blocking(watcher.stdin.fileno(), False)  # a watcher that hangs must not hang the one that it watches
    return watcher


def _end(watcher: subprocess.Popen[bytes]) -> None:
    assert watcher.stdin is not None
    with suppress(OSError):
        watcher.stdin.close()
    watcher.kill()
    watcher.wait()


def _watch(guarded: int, hang_s: float) -> str:
    """Read beats from standard input; why it ended."""
    with suppress(OSError):  # the guarded process may have been pinned to few cores
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    tick_s = hang_s / BEATS
    poll = select.poll()
    poll.register(0, select.POLLIN)
    last_beat = last_rest = seen = time.monotonic()
    spent = _cpu_ticks(guarded)
    while os.getppid() == guarded:
        beats = os.read(0, 4096) if poll.poll(tick_s * 1000) else None
        if beats == b"":
            return "the guarded process has closed"
        now = time.monotonic()
        did_not_run, seen = now - seen > hang_s / 2, now
        spent, before = _cpu_ticks(guarded), spent
        if beats or did_not_run or _is_traced(guarded):
            last_beat = last_rest = now
        elif spent > before and now - last_beat < BUSY_TIMES * hang_s:
            last_rest = now
        elif now - last_rest > hang_s and os.getppid() == guarded:
            silent_s = now - last_beat
            print(f"process {guarded} gave no sign of life for {silent_s:.0f} s: killed", file=sys.stderr, flush=True)
            os.kill(guarded, signal.SIGKILL)  # it is this process' parent still, so the number is its own
            return "the guarded process hung"
    return "the guarded process has ended"


def _cpu_ticks(pid: int) -> int:
    """What all threads of the process have computed so far."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def _is_traced(pid: int) -> bool:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    return any(line.startswith("TracerPid:") and line.split()[1] != "0" for line in lines)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), float(sys.argv[2]))
