"""The fast simulation agrees with one of single requests, counts everybody once, and pays for what it rents."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moeray.autoscaling import Observation
from moeray.autoscaling.simulator import TRACES, Service, Trace, simulate
from moeray.autoscaling.simulator.traces import Floats

SERVICE = Service(places=8, own_s=0.01, own_token_s=0.001, expert_s=0.005, expert_token_s=0.0005, prompt_token_s=0.0002)


def stay(seen: Observation) -> tuple[int, int]:
    return len(seen.shards) + seen.joining_shards, len(seen.groups) + seen.joining_groups


def poisson(rate: float, length_s: float, seed: int = 1) -> Trace:
    rng = np.random.default_rng(seed)
    arrival = np.sort(rng.random(rng.poisson(rate * length_s)) * length_s)
    return Trace(
        "poisson",
        arrival,
        np.round(rng.uniform(50, 300, len(arrival))),
        np.round(rng.uniform(10, 80, len(arrival))),
        length_s,
    )


def one_by_one(trace: Trace, service: Service) -> tuple[Floats, Floats]:
    """One shard and one group, step after step, request after request: (TTFT, end), seconds."""
    now, waiting, running = 0.0, list(range(len(trace.arrival_s))), dict[int, float]()
    ttft, end = np.full(len(waiting), np.inf), np.full(len(waiting), np.inf)
    while now < trace.length_s and (waiting or running):
        prompts = 0.0
        step = service.step_s(len(running), 1, 1)[0]
        budget = step * service.prompt_share / (1 - service.prompt_share)
        while waiting and trace.arrival_s[waiting[0]] <= now and len(running) < service.places and prompts < budget:
            number = waiting.pop(0)
            prompts += trace.prompt[number] * service.prompt_token_s
            running[number] = trace.answer[number]
            ttft[number] = now + prompts + step - trace.arrival_s[number]
        if not running:
            now = max(now, trace.arrival_s[waiting[0]]) if waiting else trace.length_s
            continue
        now += step + prompts
        for number in list(running):
            running[number] -= 1
            if running[number] <= 0:
                end[number] = now
                del running[number]
    return ttft, end


@pytest.mark.parametrize("rate", [1.0, 3.0, 4.0])
def test_it_agrees_with_a_simulation_of_single_requests(rate: float) -> None:
    trace = poisson(rate, 600.0)
    fast = simulate(trace, SERVICE, stay, shards=1, groups=1)
    ttft, end = one_by_one(trace, SERVICE)
    both = np.isfinite(ttft) & np.isfinite(end) & np.isfinite(fast.ttft_s) & np.isfinite(fast.tpot_s)
    assert both.mean() > 0.95
    assert np.mean(fast.tpot_s[both]) == pytest.approx(
        np.mean((end[both] - trace.arrival_s[both] - ttft[both]) / trace.answer[both]), rel=0.15
    )
    assert np.percentile(fast.ttft_s[both], 90) == pytest.approx(np.percentile(ttft[both], 90), rel=0.3, abs=0.15)


def test_a_shard_that_is_asked_for_more_than_it_can_serves_as_many_as_single_requests_would() -> None:
    trace = poisson(6.0, 600.0)
    served = np.isfinite(simulate(trace, SERVICE, stay, shards=1, groups=1).ttft_s).mean()
    assert served == pytest.approx(np.isfinite(one_by_one(trace, SERVICE)[0]).mean(), rel=0.07) and served < 0.96


def test_nobody_is_lost_and_who_is_not_served_is_late() -> None:
    trace = poisson(100.0, 60.0)
    outcome = simulate(trace, SERVICE, stay, shards=1, groups=1)
    assert len(outcome.ttft_s) == len(trace.arrival_s) and outcome.met(5.0, 1.0) < 0.2
    assert np.isinf(outcome.ttft_s).sum() > 0 and outcome.running.max() <= SERVICE.places + 1


def test_processes_are_paid_for_from_the_decision_on_and_serve_when_they_have_joined() -> None:
    wanted = [(1, 1)]
    service = replace(SERVICE, join_s=100.0)

    def grow(seen: Observation) -> tuple[int, int]:
        if seen.now_s > 300:
            wanted[0] = (3, 1)
        joined = [seen.now_s for _ in range(1) if len(seen.shards) == 3]
        at.extend(joined)
        return wanted[0]

    at: list[float] = []
    outcome = simulate(poisson(1.0, 600.0), service, grow, shards=1, groups=1)
    assert 395 < at[0] < 410
    assert outcome.shard_hours == pytest.approx((600 + 2 * 300) / 3600, rel=0.03)
    assert outcome.group_hours == pytest.approx(600 / 3600, rel=0.01) and outcome.changes == 1


@pytest.mark.parametrize("name", TRACES)
def test_traces_are_the_same_for_the_same_seed(name: str) -> None:
    first, again = (TRACES[name](0.5, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(first.arrival_s, again.arrival_s) and np.array_equal(first.answer, again.answer)
    assert np.all(np.diff(first.arrival_s) >= 0) and first.prompt.min() >= 1 and first.arrival_s[-1] <= first.length_s


def test_more_processes_serve_no_worse() -> None:
    trace = TRACES["steady"](4.0, np.random.default_rng(5))
    met = [simulate(trace, SERVICE, stay, shards=count, groups=count).met(2.0, 0.05) for count in (1, 2, 4, 8)]
    assert met == sorted(met) and met[-1] > 0.95
