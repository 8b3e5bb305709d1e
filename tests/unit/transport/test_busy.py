"""The time that experts are computed is counted, of failed calls too."""

from __future__ import annotations

import time

import pytest

from moeray.transport import BusyCompute


def test_calls_are_passed_on_and_their_time_is_counted() -> None:
    busy = BusyCompute(lambda first, second: (time.sleep(0.02), first + second)[1])
    assert busy.spent_s == 0.0
    assert busy(2, 3) == 5
    assert 0.02 <= busy.spent_s < 2


def test_a_call_that_fails_took_time_too() -> None:
    def fail() -> None:
        time.sleep(0.02)
        raise RuntimeError("broken")

    busy = BusyCompute(fail)
    with pytest.raises(RuntimeError, match="broken"):
        busy()
    assert busy.spent_s >= 0.02
