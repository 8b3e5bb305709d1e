"""Fetch or recompute, as pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeray.kv_cache import Option, choose
from moeray.kv_cache.choice import GAIN, REASONS

MIB = 1 << 20


def per_token(seconds: float) -> Callable[[int, int], float | None]:
    return lambda start, end: (end - start) * seconds


def at(latency_s: float, bytes_per_s: float) -> Callable[[int], float | None]:
    return lambda num_bytes: latency_s + num_bytes / bytes_per_s


FAST, SLOW = at(0.001, 1e9), at(0.001, 1e6)


def test_a_fetch_that_is_faster_than_computing_is_chosen() -> None:
    chosen = choose([Option(2048, {"redis": 8 * MIB})], 0, per_token(1e-3), {"redis": FAST})
    assert chosen.option is not None and chosen.option.tokens == 2048 and chosen.reason == "faster"


def test_a_fetch_that_is_slower_than_computing_is_not_and_says_what_both_would_take() -> None:
    chosen = choose([Option(2048, {"redis": 8 * MIB})], 0, per_token(1e-3), {"redis": SLOW})
    assert chosen.option is None and chosen.reason == "slower"
    assert chosen.compute_s == pytest.approx(2.048) and chosen.fetch_s == pytest.approx(8.389, rel=1e-3)


def test_what_the_device_has_is_not_computed_anyway() -> None:
    """1,792 of 2,048 tokens are there: the fetch must be worth the last 256."""
    chosen = choose([Option(2048, {"redis": 8 * MIB})], 1792, per_token(1e-5), {"redis": FAST})
    assert chosen.option is None and chosen.reason == "slower"


def test_a_near_store_with_less_is_chosen_where_the_far_one_is_too_slow() -> None:
    options = [Option(1024, {"node": 4 * MIB}), Option(2048, {"node": 4 * MIB, "redis": 4 * MIB})]
    chosen = choose(options, 0, per_token(1e-3), {"node": FAST, "redis": SLOW})
    assert chosen.option == options[0]


def test_the_far_store_is_chosen_where_it_saves_more() -> None:
    options = [Option(1024, {"node": 4 * MIB}), Option(2048, {"node": 4 * MIB, "redis": 4 * MIB})]
    assert choose(options, 0, per_token(1e-3), {"node": FAST, "redis": FAST}).option == options[1]


def test_without_options_there_is_nothing_to_choose() -> None:
    assert choose([], 0, per_token(1e-3), {}).reason == "nothing"


def test_what_is_not_measured_is_not_fetched() -> None:
    option = Option(2048, {"redis": MIB})
    assert choose([option], 0, lambda start, end: None, {"redis": FAST}).reason == "unmeasured"
    assert choose([option], 0, per_token(1e-3), {"redis": lambda num_bytes: None}).reason == "unmeasured"


def test_what_is_in_the_engines_own_memory_is_always_taken() -> None:
    chosen = choose([Option(512, {})], 0, lambda start, end: None, {})
    assert chosen.option is not None and chosen.reason == "resident"


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(0, 64 * MIB)), min_size=1, max_size=4),
    st.floats(1e-6, 1e-2),
    st.floats(0, 1),
    st.floats(1e4, 1e10),
)
def test_a_choice_never_loses_by_its_own_predictions(
    found: list[tuple[int, int]], token_s: float, latency_s: float, bytes_per_s: float
) -> None:
    options = [Option(256 * blocks, {"redis": num_bytes} if num_bytes else {}) for blocks, num_bytes in found]
    fetch, compute = at(latency_s, bytes_per_s), per_token(token_s)

    def total(option: Option | None) -> float:
        """Until all 16,384 tokens are there."""
        if option is None:
            return compute(0, 16_384) or 0.0
        bring = sum(fetch(each) or 0.0 for each in option.bytes_from.values())
        return bring + (compute(option.tokens, 16_384) or 0.0)

    chosen = choose(options, 0, compute, {"redis": fetch})
    assert chosen.reason in REASONS
    assert total(chosen.option) <= total(None)
    worth = [
        each
        for each in options
        if total(each) - (compute(each.tokens, 16_384) or 0) <= GAIN * (compute(0, each.tokens) or 0)
    ]
    assert total(chosen.option) <= min(map(total, worth), default=total(None)) + 1e-9
