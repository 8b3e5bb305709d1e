"""What computing and fetching cost, learned from observations."""

from __future__ import annotations

import random

import pytest

from moeray.kv_cache import PrefillCost, TransferCost
from moeray.kv_cache.cost import Line


def test_nothing_is_predicted_before_something_was_observed() -> None:
    assert PrefillCost().predict(0, 100, 512) is None
    assert TransferCost().predict(100) is None


def test_one_observation_predicts_itself() -> None:
    cost = TransferCost()
    cost.observe(1 << 20, 0.1)
    assert cost.predict(1 << 20) == pytest.approx(0.1, rel=1e-3)


def test_a_transfer_is_a_latency_and_a_bandwidth() -> None:
    cost = TransferCost()
    for num_bytes in (1 << 16, 1 << 20, 1 << 24):
        cost.observe(num_bytes, 0.002 + num_bytes / 500e6)
    assert cost.predict(1 << 22) == pytest.approx(0.002 + (1 << 22) / 500e6, rel=0.01)


@pytest.mark.parametrize("step_tokens", [128, 512])
def test_prefill_is_predicted_at_lengths_that_were_never_seen(step_tokens: int) -> None:
    """Steps of 0.01 s, 0.4 ms a token, 50 ns a token and token before it, measured with 5 % noise."""

    def seconds(start: int, end: int) -> float:
        return 0.01 + (end - start) * 4e-4 + (end - start) * (start + end - 1) / 2 * 5e-8

    random_, cost = random.Random(0), PrefillCost()
    for length in (300, 700, 2000):
        for start in range(0, length, step_tokens):
            end = min(length, start + step_tokens)
            cost.observe([(start, end)], seconds(start, end) * random_.uniform(0.95, 1.05))
    real = sum(seconds(start, min(6000, start + step_tokens)) for start in range(0, 6000, step_tokens))
    assert cost.predict(0, 6000, step_tokens) == pytest.approx(real, rel=0.2)
    later = sum(seconds(start, min(6000, start + step_tokens)) for start in range(4096, 6000, step_tokens))
    assert cost.predict(4096, 6000, step_tokens) == pytest.approx(later, rel=0.2)


def test_requests_of_one_step_add_up() -> None:
    cost = PrefillCost()
    for _ in range(20):
        cost.observe([(0, 256), (1000, 1001), (300, 301)], 0.258)
        cost.observe([(0, 512)], 0.512)
    assert cost.predict(0, 512, 512) == pytest.approx(0.512, rel=0.1)


@pytest.mark.parametrize("later", [0.0001, 0.005, 0.02, 1.0])
def test_another_machine_is_noticed_within_a_few_observations(later: float) -> None:
    cost = TransferCost()
    for _ in range(300):
        cost.observe(1 << 20, 0.01)
    for _ in range(5):
        cost.observe(1 << 20, later)
    assert cost.predict(1 << 20) == pytest.approx(later, rel=0.35)


def test_one_odd_observation_changes_little() -> None:
    cost = TransferCost()
    for _ in range(50):
        cost.observe(1 << 20, 0.01)
    cost.observe(1 << 20, 0.1)
    for _ in range(3):
        cost.observe(1 << 20, 0.01)
    assert cost.predict(1 << 20) == pytest.approx(0.01, rel=0.5)


def test_more_never_costs_less() -> None:
    """Noise alone would give some of the weights the wrong sign."""
    random_ = random.Random(3)
    for _ in range(200):
        line = Line(3)
        for _ in range(random_.randint(1, 8)):
            line.observe([1.0, random_.uniform(0, 1e3), random_.uniform(0, 1e6)], random_.uniform(1e-4, 10.0))
        costs = [line.predict((1.0, tokens, pairs)) for tokens, pairs in ((1, 1), (10, 1), (10, 100), (1e3, 1e6))]
        assert all(cost is not None and cost >= 0 for cost in costs)
        assert costs == sorted(costs)  # type: ignore[type-var]
