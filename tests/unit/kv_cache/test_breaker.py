"""When a store is left alone and when it is tried again, on a clock of the test's own."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from moeray.kv_cache import Breaker
from moeray.kv_cache.breaker import FAILURES, FIRST_REST_S, LONGEST_REST_S

EVENTS = st.one_of(st.sampled_from(["asks", "succeeds", "fails"]), st.floats(0.0, 2 * LONGEST_REST_S, allow_nan=False))


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def broken(clock: Clock) -> Breaker:
    breaker = Breaker(clock)
    assert [breaker.failed("no answer") for _ in range(FAILURES)] == [False] * (FAILURES - 1) + [True]
    return breaker


@given(st.lists(EVENTS))
def test_it_is_open_only_after_failures_in_a_row_and_never_for_longer_than_the_longest_rest(
    events: list[str | float],
) -> None:
    clock = Clock()
    breaker, in_a_row, asked_at = Breaker(clock), 0, 0.0
    for event in events:
        if isinstance(event, float):
            clock.now += event
        elif event == "succeeds":
            breaker.succeeded()
            in_a_row = 0
            assert breaker.is_closed
        elif event == "fails":
            was_closed, in_a_row = breaker.is_closed, in_a_row + 1
            assert breaker.failed("why") == (was_closed and not breaker.is_closed)
        elif breaker.allows() and not breaker.is_closed:
            assert clock.now - asked_at >= FIRST_REST_S  # one call per rest
            asked_at = clock.now
        assert breaker.is_closed == (in_a_row < FAILURES)
        assert breaker.reason == ("" if breaker.is_closed else "why")
    clock.now += LONGEST_REST_S
    assert breaker.allows()


@given(st.integers(1, 20))
def test_each_failed_try_doubles_the_rest_up_to_the_longest(num_tries: int) -> None:
    clock = Clock()
    breaker, rest_s = broken(clock), FIRST_REST_S
    for _ in range(num_tries):
        clock.now += rest_s * 0.99
        assert not breaker.allows()
        clock.now += rest_s * 0.02
        assert breaker.allows() and not breaker.allows()
        assert not breaker.failed("still none")
        rest_s = min(LONGEST_REST_S, 2 * rest_s)


@given(st.integers(0, 50))
def test_calls_that_began_before_it_opened_do_not_lengthen_the_rest(num_late: int) -> None:
    clock = Clock()
    breaker = broken(clock)
    clock.now += FIRST_REST_S / 2
    assert not any(breaker.failed("late") for _ in range(num_late))
    clock.now += FIRST_REST_S / 2
    assert breaker.allows()


def test_a_try_without_a_verdict_is_followed_by_another() -> None:
    clock = Clock()
    breaker = broken(clock)
    for _ in range(5):
        clock.now += FIRST_REST_S
        assert breaker.allows()


def test_one_success_forgets_everything() -> None:
    clock = Clock()
    breaker = broken(clock)
    for _ in range(5):
        clock.now += LONGEST_REST_S
        assert breaker.allows()
        breaker.failed("again")
    breaker.succeeded()
    assert breaker.allows() and breaker.reason == ""
    assert [breaker.failed("new") for _ in range(FAILURES)] == [False] * (FAILURES - 1) + [True]
    clock.now += FIRST_REST_S
    assert breaker.allows()


def test_of_many_threads_one_tries() -> None:
    clock = Clock()
    breaker, allowed = broken(clock), []
    clock.now += FIRST_REST_S
    gate = threading.Barrier(16)

    def ask() -> None:
        gate.wait()
        allowed.append(breaker.allows())

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(allowed) == 1


def test_a_store_that_answers_questions_but_never_hands_over_is_left_alone() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(FAILURES):
        assert breaker.is_closed
        breaker.succeeded("ask")
        breaker.failed("nothing came", "load")
    assert not breaker.is_closed


@given(st.integers(1, 20))
def test_calls_of_another_kind_let_it_back_for_one_failure_and_each_rest_is_twice_as_long(num_returns: int) -> None:
    clock = Clock()
    breaker, rest_s = Breaker(clock), FIRST_REST_S
    for _ in range(FAILURES):
        breaker.failed("nothing came", "load")
    for _ in range(num_returns):
        clock.now += rest_s * 0.99
        assert not breaker.allows()
        clock.now += rest_s * 0.02
        assert breaker.allows()
        breaker.succeeded("ask")
        assert breaker.is_closed
        assert breaker.failed("nothing came", "load")
        rest_s = min(LONGEST_REST_S, 2 * rest_s)
    clock.now += rest_s
    assert breaker.allows()
    breaker.succeeded("load")
    assert [breaker.failed("new", "load") for _ in range(FAILURES)] == [False] * (FAILURES - 1) + [True]
    clock.now += FIRST_REST_S
    assert breaker.allows()
