"""Times and rates of the last minute: right to within a step, and forgotten in time."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeray.ingress.service_level import RATE_WINDOW_S, SILENT_S, STEP, WINDOW_S, RecentRate, RecentTimes, ServiceLevel


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.floats(1e-4, 1000), min_size=1, max_size=200), st.sampled_from([50, 95, 99, 100]))
def test_a_percentile_is_that_of_the_times_to_within_a_step(times: list[float], percent: int) -> None:
    recent = RecentTimes(clock=Clock())
    for each in times:
        recent.add(each)
    exact = sorted(times)[math.ceil(len(times) * percent / 100) - 1]
    found = recent.percentile(percent)
    assert found is not None and exact <= found * (1 + 1e-9) and found <= exact * STEP * (1 + 1e-9)


def test_times_of_many_tokens_weigh_as_many() -> None:
    recent = RecentTimes(clock=Clock())
    recent.add(1.0, 19)
    recent.add(2.0)
    assert recent.percentile(95) == pytest.approx(1.0, rel=0.05)
    recent.add(2.0)
    assert recent.percentile(95) == pytest.approx(2.0, rel=0.05)


def test_what_is_old_is_forgotten_and_what_is_new_is_not() -> None:
    clock = Clock()
    recent = RecentTimes(clock=clock)
    recent.add(5.0)
    for seconds in range(0, 300, 5):
        clock.now = float(seconds)
        recent.add(1.0)
        assert recent.percentile(100) == pytest.approx(5.0 if seconds < WINDOW_S else 1.0, rel=0.05)
    clock.now += SILENT_S + 1
    assert recent.percentile(95) is None
    recent.add(1.0)
    assert recent.percentile(95) is not None
    clock.now += 2 * WINDOW_S
    assert recent.percentile(95) is None
    recent.add(1.0)
    recent.clear()
    assert recent.percentile(95) is None


@given(st.floats(0.1, 1000), st.floats(0.2, 6))
def test_a_steady_rate_is_found_at_any_moment_and_a_silence_too(rate: float, every_s: float) -> None:
    clock = Clock()
    recent = RecentRate(clock=clock)
    assert recent.per_second() == 0.0
    while clock.now < 200:
        clock.now += every_s
        recent.add(rate * every_s)
        if clock.now > RATE_WINDOW_S:
            assert recent.per_second() == pytest.approx(rate, rel=2 * every_s / (RATE_WINDOW_S / 2))
    clock.now += 3 * RATE_WINDOW_S
    assert recent.per_second() == 0.0


def test_a_report_is_of_what_was_asked_for_and_of_how_long_was_waited() -> None:
    clock = Clock()
    level = ServiceLevel(clock)
    assert level.report() == {"tokens_per_s": 0.0}
    for _ in range(400):
        level.ended(100)
    clock.now = 8.0
    for _ in range(10):
        level.asked(300)
        level.answered(0.5, 1, 200)
        level.answered(0.2, 4, None)
    report = level.report()
    assert report["tokens_per_s"] == pytest.approx(10 * (300 - 200 + 100) / 8)
    assert report["ttft_p95_s"] == pytest.approx(0.5, rel=0.05) and report["tpot_p95_s"] == pytest.approx(
        0.05, rel=0.05
    )
    level.changed()
    assert level.report() == {"tokens_per_s": report["tokens_per_s"]}
