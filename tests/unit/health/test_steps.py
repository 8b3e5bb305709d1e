"""A step that never returns ends its process although other threads run; nothing else does."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from moeray.health import StepLimit

WAIT_S = 60.0
HANGING = """
import ctypes, sys
from moeray.health import StepLimit, guard
watched, limit = guard(60), StepLimit()
limit.start(0.5)
with limit.step():
    pass
print("stepping", flush=True)
with limit.step():
    limit.is_excused = {is_excused}
    ctypes.CDLL(None).sleep(600)  # lets go of the interpreter: the guard's thread beats
"""


def start(is_excused: bool) -> subprocess.Popen[str]:
    program = HANGING.format(is_excused=is_excused)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "stepping\n"
    return process


def test_a_process_whose_step_never_returns_is_killed_although_its_guard_hears_it_beat() -> None:
    process = start(is_excused=False)
    _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == -signal.SIGKILL
    assert f"process {process.pid}: a step has taken" in said


def test_a_process_whose_step_is_excused_waits_for_as_long_as_it_takes() -> None:
    process = start(is_excused=True)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2.0)
    finally:
        process.kill()
        process.communicate()


class Limited:
    """A limit and whether it has ended a step."""

    def __init__(self, step_s: float) -> None:
        self.limit, self.ended = StepLimit(), threading.Event()
        self.limit.start(step_s, lambda _: self.ended.set())


def test_a_step_that_goes_on_after_its_excuse_is_limited_again() -> None:
    limited = Limited(0.2)
    with limited.limit.step():
        limited.limit.is_excused = True
        assert not limited.ended.wait(1.0)
        limited.limit.is_excused = False
        assert limited.ended.wait(WAIT_S)


def test_an_excuse_ends_with_its_step() -> None:
    limited = Limited(0.2)
    with limited.limit.step():
        limited.limit.is_excused = True
    with limited.limit.step():
        assert limited.ended.wait(WAIT_S)


def test_neither_many_steps_nor_idle_time_are_a_long_step() -> None:
    limited = Limited(2.0)
    end = time.monotonic() + 3.0
    while time.monotonic() < end:
        with limited.limit.step():
            time.sleep(0.001)
    assert not limited.ended.wait(3.0)
