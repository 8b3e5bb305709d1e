from __future__ import annotations

from itertools import count

import pytest

from moeray.transport.communicator import NOBODY, Last, WaitOrder
from moeray.transport.patience import Answered, Patience

PATIENCE_S, TIMEOUT_S = 1.0, 10.0
ROWS = (6, 6)


def patience(*, replaceable: bool = True) -> Patience:
    return Patience(PATIENCE_S, TIMEOUT_S, replaceable=replaceable)


def call(others_s: float, alone_s: float, rows: tuple[int, ...] = ROWS, last: int = 1) -> Answered:
    return Answered(rows, others_s + alone_s, last if alone_s else -1, alone_s)


def seconds_until_over(known: Patience, answered: Answered, *, between_s: float = 0.0) -> float:
    """How long calls like this one may go on, one after the other."""
    now = 0.0
    while now < 60.0:
        now += answered.seconds
        if known.is_over(answered, now):
            return now
        now += between_s
    return float("inf")


def test_a_first_call_may_take_the_timeout() -> None:
    assert patience().limit_s(12) == TIMEOUT_S


def test_a_call_may_take_what_such_a_call_took_and_the_patience() -> None:
    known = patience()
    known.is_over(call(0.5, 0.0), now=0.5)
    expected_s = 0.5 * (120 + 64) / (12 + 64)
    assert PATIENCE_S + 2 * expected_s < known.limit_s(120) < PATIENCE_S + 8 * expected_s


def test_what_the_last_group_took_is_not_expected_of_any() -> None:
    known, other = patience(), patience()
    known.is_over(call(0.01, 0.9), now=0.91)
    other.is_over(call(0.01, 0.0), now=0.01)
    assert known.limit_s(12) == other.limit_s(12)


def test_what_is_expected_is_forgotten_slowly() -> None:
    known = patience()
    known.is_over(call(1.0, 0.0), now=1.0)
    limits = [known.limit_s(12)]
    for number in range(1000):
        known.is_over(call(0.001, 0.0), now=1.0 + number)
        limits.append(known.limit_s(12))
    assert limits[10] > (limits[0] + PATIENCE_S) / 2
    assert limits[-1] < PATIENCE_S + 0.1


def test_no_call_waits_longer_than_the_timeout() -> None:
    known = patience()
    known.is_over(call(60.0, 0.0), now=60.0)
    assert known.limit_s(1000) == TIMEOUT_S


@pytest.mark.parametrize("others_s", [50e-6, 1e-3, 20e-3])
def test_a_group_that_is_a_hundred_times_slower_is_too_slow_after_about_twice_the_patience(others_s: float) -> None:
    waited_s = seconds_until_over(patience(), call(others_s, 99 * others_s))
    assert PATIENCE_S < waited_s <= 2.5 * PATIENCE_S + 100 * others_s


def test_what_a_too_slow_group_costs_is_bounded_whatever_runs_between_the_calls() -> None:
    answered = call(100e-6, 10e-3)
    waited_s = seconds_until_over(patience(), answered, between_s=5e-3)
    assert waited_s < 8 * PATIENCE_S
    assert seconds_until_over(patience(), answered, between_s=20e-3) == float("inf")


def test_a_group_that_is_as_slow_as_the_others_and_a_little_more_is_never_too_slow() -> None:
    assert seconds_until_over(patience(), call(1e-3, 3e-3)) == float("inf")


def test_a_group_with_more_rows_may_take_longer() -> None:
    uneven = (10_000, 100)
    assert seconds_until_over(patience(), call(1e-3, 60e-3, uneven, last=0)) == float("inf")
    assert seconds_until_over(patience(), call(1e-3, 60e-3, uneven, last=1)) < 5 * PATIENCE_S


def test_each_groups_time_is_its_own() -> None:
    known, now = patience(), count(1)
    for _ in range(100):
        for last in (0, 1, 2):
            assert not known.is_over(call(1e-3, 0.4, (6, 6, 6), last), 1.0 * next(now))


def test_a_group_that_nobody_can_replace_is_waited_for() -> None:
    known = patience(replaceable=False)
    assert seconds_until_over(known, call(1e-3, 0.1)) == float("inf")
    assert known.limit_s(12) == TIMEOUT_S


def test_only_the_last_one_waited_for_has_a_time_of_its_own_and_the_slowest_goes_last() -> None:
    order = WaitOrder()
    assert order.finished([Last(1, 0.5), Last(2, 0.001)]) == NOBODY
    assert order.last == 1
    assert order.finished([Last(2, 0.001), Last(1, 0.5)]) == Last(1, 0.5)
    assert order.finished([Last(1, 0.5)]) == NOBODY
    assert order.finished([]) == NOBODY
