"""A hung process is killed within its time, and no other one is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

HANG_S = 2.0
WAIT_S = 60.0
GUARDED = """
import ctypes, os, sys, time
from moeray.health import guard
guarded = guard({hang_s})
print(guarded.pid, flush=True)
for line in sys.stdin:
    if line == "hold the interpreter\\n":
        ctypes.PyDLL(None).sleep(600)  # a call that keeps the GIL
    elif line == "compute without letting go\\n":
        sys.setswitchinterval(600)
        while True:
            pass
    elif line == "close\\n":
        guarded.close()
        print(guarded.pid, flush=True)
    elif line == "fork\\n":
        if os.fork() == 0:
            time.sleep(600)
    print(guarded.pid, flush=True)
"""


class Process:
    """A guarded process that does what it is told."""

    def __init__(self, hang_s: float) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", GUARDED.format(hang_s=hang_s)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self.watcher = psutil.Process(self.answer())

    def answer(self) -> int:
        assert self.popen.stdout is not None
        return int(self.popen.stdout.readline())

    def tell(self, what: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(f"{what}\n")
        self.popen.stdin.flush()


@contextmanager
def guarded(hang_s: float = HANG_S) -> Iterator[Process]:
    process = Process(hang_s)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.popen.pid, signal.SIGKILL)  # with what it has forked
        process.popen.wait()


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def wait_until_ended(process: psutil.Process) -> None:
    deadline = time.monotonic() + WAIT_S
    while not has_ended(process):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_stopped_process_is_killed_and_its_watcher_says_so_and_ends() -> None:
    with guarded() as process:
        process.popen.send_signal(signal.SIGSTOP)
        assert process.popen.wait(WAIT_S) == -signal.SIGKILL
        wait_until_ended(process.watcher)
        assert process.popen.stderr is not None
        expected = f"process {process.popen.pid} gave no sign of life for {HANG_S:.0f} s: killed"
        assert expected in process.popen.stderr.readline()


def test_a_process_whose_interpreter_is_held_is_killed() -> None:
    with guarded() as process:
        process.tell("hold the interpreter")
        assert process.popen.wait(WAIT_S) == -signal.SIGKILL


def test_one_that_computes_without_a_beat_is_given_more_time_but_not_for_ever() -> None:
    with guarded(hang_s=1.0) as process:
        started = time.monotonic()
        process.tell("compute without letting go")
        assert process.popen.wait(WAIT_S) == -signal.SIGKILL
        assert time.monotonic() - started > 4 * 1.0


def test_a_process_that_only_waits_is_left_alone() -> None:
    with guarded() as process:
        time.sleep(2 * HANG_S)
        assert process.popen.poll() is None


def test_a_pause_of_everything_kills_nobody_and_hanging_afterwards_still_does() -> None:
    with guarded() as process:
        process.popen.send_signal(signal.SIGSTOP)
        process.watcher.suspend()
        time.sleep(2 * HANG_S)
        process.watcher.resume()
        process.popen.send_signal(signal.SIGCONT)
        process.tell("go on")
        assert process.answer() == process.watcher.pid
        time.sleep(HANG_S)
        assert process.popen.poll() is None
        process.popen.send_signal(signal.SIGSTOP)
        assert process.popen.wait(WAIT_S) == -signal.SIGKILL


def test_after_close_nobody_watches() -> None:
    with guarded() as process:
        process.tell("close")
        process.answer()
        assert has_ended(process.watcher)
        process.popen.send_signal(signal.SIGSTOP)
        time.sleep(1.5 * HANG_S)
        assert process.popen.poll() is None


@pytest.mark.parametrize("with_child", [False, True])
def test_a_watcher_ends_with_the_process_it_guards_also_where_a_fork_keeps_the_pipe_open(with_child: bool) -> None:
    with guarded() as process:
        if with_child:
            process.tell("fork")
            process.answer()
        process.popen.kill()
        process.popen.wait()
        wait_until_ended(process.watcher)


def test_a_watcher_that_was_killed_is_replaced() -> None:
    with guarded() as process:
        process.watcher.kill()
        deadline, pid = time.monotonic() + WAIT_S, process.watcher.pid
        while pid == process.watcher.pid:
            assert time.monotonic() < deadline
            time.sleep(0.1)
            process.tell("go on")
            pid = process.answer()
        process.popen.send_signal(signal.SIGSTOP)
        assert process.popen.wait(WAIT_S) == -signal.SIGKILL


def test_a_watcher_is_small_and_holds_nothing_of_the_process_it_guards() -> None:
    with guarded() as process:
        process.tell("go on")
        process.answer()
        time.sleep(0.5)  # it has started by then; if not, it is smaller still
        assert process.watcher.memory_info().rss < 32 << 20
        descriptors = {int(entry.name) for entry in Path(f"/proc/{process.watcher.pid}/fd").iterdir()}
        assert not descriptors - {0, 1, 2}
        assert process.watcher.cpu_affinity() == psutil.Process().cpu_affinity()
