"""When halves are measured, and what a shard does with the answer. The times are an engine's (tests/integration)."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from moeray.placement import contiguous
from moeray.transport import LocalTransport, Transport
from moeray.vllm_hooks import micro_batch_choice
from moeray.vllm_hooks.hop import HopCosts, hop
from moeray.vllm_hooks.micro_batches import MIN_TOKENS, Plan, State, second_hop, state
from moeray.vllm_hooks.route import Route

GAINED, LOST = Plan(64), Plan(None)


PLACEMENT = contiguous(generation=1, num_layers=1, num_experts=2, num_groups=1)
ROUTE = Route(PLACEMENT, (), ())


def connect(route: Route, absent: frozenset[int], in_a_hurry: bool) -> Transport:
    return LocalTransport(route.placement, lambda layer, x_TD, ids_TK: x_TD)


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fresh = State()
    for name in ("plan", "chosen", "running"):
        monkeypatch.setattr(state, name, getattr(fresh, name))
    costs = hop.costs, second_hop.costs
    second_hop.set_up(connect)
    yield
    second_hop.close()
    hop.costs, second_hop.costs = costs


class Runner(SimpleNamespace):
    """vLLM's runner, built for halves, and how often it was measured."""

    def __init__(self, **requests: Any) -> None:
        super().__init__(attn_groups=[], requests=requests)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """One entry for each time that was measured; the first stands for what it gives."""
    plans = [GAINED]

    def choose(_: Any) -> Plan:
        plans.append(plans[0])
        hop.costs.calls = second_hop.costs.calls = 99
        return plans[0]

    monkeypatch.setattr(micro_batch_choice, "choose", choose)
    return plans


def test_nothing_is_measured_while_requests_have_keys_and_values_that_a_dummy_run_would_read(
    measured: list[Plan],
) -> None:
    micro_batch_choice.prepare(Runner(r1="running"), "measured", ROUTE)
    assert len(measured) == 1
    assert (state.plan, state.chosen, second_hop.generation) == (Plan(), None, None)
    micro_batch_choice.prepare(Runner(), "measured", ROUTE)
    assert (state.plan, state.chosen, len(measured)) == (GAINED, GAINED, 2)


def test_calls_that_measured_are_not_counted_as_requests(measured: list[Plan]) -> None:
    hop.costs, second_hop.costs = HopCosts(calls=1), HopCosts(calls=1)
    micro_batch_choice.prepare(Runner(), "measured", ROUTE)
    assert len(measured) == 2
    assert (hop.costs.calls, second_hop.costs.calls) == (0, 0)


@pytest.mark.parametrize("plan", [GAINED, LOST])
def test_it_is_measured_once_and_the_second_hop_stays_only_where_halves_gained(
    measured: list[Plan], plan: Plan
) -> None:
    measured[0] = plan
    for _ in range(2):
        micro_batch_choice.prepare(Runner(), "measured", ROUTE)
        assert len(measured) == 2
        assert state.plan == plan
        assert (second_hop.generation is None) == (plan is LOST)


def test_always_and_never_do_not_measure(measured: list[Plan]) -> None:
    micro_batch_choice.prepare(Runner(), "always", ROUTE)
    assert (state.plan, second_hop.generation) == (Plan(MIN_TOKENS), 1)
    micro_batch_choice.prepare(Runner(), "never", ROUTE)
    assert (state.plan, second_hop.generation) == (Plan(), None)
    assert len(measured) == 1
