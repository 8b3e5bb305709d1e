"""Start-time fair queueing: nobody starves, shares follow weights within a request's size, idling earns nothing."""

from __future__ import annotations

import heapq
from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from moeray.tenancy import FairClock, engine_priority

WEIGHTS = {"a": 1.0, "b": 2.0, "c": 5.0}
sizes = st.lists(st.integers(1, 500), min_size=60, max_size=60)


class Queue:
    """One server that takes the lowest tag first, as an engine with priorities does."""

    def __init__(self) -> None:
        self.clock, self.waiting, self.number = FairClock(), list[tuple[int, int, str, int]](), 0
        self.served: dict[str, int] = defaultdict(int)

    def put(self, tenant: str, tokens: int) -> int:
        tag = self.clock.tag(tenant, tokens, WEIGHTS[tenant])
        self.number += 1
        heapq.heappush(self.waiting, (tag, self.number, tenant, tokens))
        return tag

    def serve(self) -> str:
        tag, _, tenant, tokens = heapq.heappop(self.waiting)
        self.clock.started(tag)
        self.served[tenant] += tokens
        return tenant

    def waits(self, tenant: str) -> bool:
        return any(each[2] == tenant for each in self.waiting)


@settings(max_examples=40)
@given(st.fixed_dictionaries(dict.fromkeys(WEIGHTS, sizes)))
def test_while_two_wait_their_shares_differ_by_one_request_of_each_at_most(work: dict[str, list[int]]) -> None:
    """The theorem of the paper, at every moment: |W_a/w_a - W_b/w_b| <= max_a/w_a + max_b/w_b (and rounding)."""
    queue = Queue()
    for name, requests in work.items():
        for tokens in requests:
            queue.put(name, tokens)
    while all(queue.waits(name) for name in WEIGHTS):
        queue.serve()
        for one in WEIGHTS:
            for other in WEIGHTS:
                gap = queue.served[one] / WEIGHTS[one] - queue.served[other] / WEIGHTS[other]
                assert abs(gap) <= max(work[one]) / WEIGHTS[one] + max(work[other]) / WEIGHTS[other] + 60


def test_under_a_long_backlog_shares_are_the_weights_within_two_percent() -> None:
    queue = Queue()
    for _ in range(4000):
        for name in WEIGHTS:
            queue.put(name, 100)
    for _ in range(4000):
        queue.serve()
    total = sum(queue.served.values())
    for name, weight in WEIGHTS.items():
        assert abs(queue.served[name] / total / (weight / 8) - 1) < 0.02


@given(st.integers(1, 300), st.integers(1, 1000))
def test_a_newcomer_overtakes_a_backlog_of_any_length(backlog: int, tokens: int) -> None:
    queue = Queue()
    for _ in range(backlog):
        queue.put("a", tokens)
    queue.serve()
    queue.put("b", tokens)
    served = [queue.serve() for _ in range(min(2, len(queue.waiting)))]
    assert "b" in served


def test_who_was_idle_has_no_credit() -> None:
    queue = Queue()
    queue.put("b", 100)
    queue.serve()
    for _ in range(1000):
        queue.put("a", 100)
        queue.serve()
    for _ in range(50):
        queue.put("a", 100)
        queue.put("b", 100)
    queue.served.clear()
    for _ in range(30):
        queue.serve()
    assert queue.served["b"] <= 2.2 * queue.served["a"]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 1000), st.integers(0, 1000), st.booleans()), max_size=80)
)
def test_tags_of_a_tenant_never_go_back(steps: list[tuple[str, int, int, bool]]) -> None:
    clock, last, all_tags = FairClock(), defaultdict[str, int](int), [0]
    for tenant, tokens, used, begins in steps:
        tag = clock.tag(tenant, tokens, WEIGHTS[tenant])
        assert tag >= last[tenant]
        last[tenant] = tag
        all_tags.append(tag)
        clock.settle(tenant, tokens, used, WEIGHTS[tenant])
        if begins:
            clock.started(sorted(all_tags)[len(all_tags) // 2])


def test_what_was_not_used_is_no_reason_to_wait() -> None:
    clock = FairClock()
    clock.tag("a", 1000)
    clock.tag("b", 1000)
    clock.settle("a", 1000, 10)
    assert (clock.tag("a", 10), clock.tag("b", 10)) == (10, 1000)


def test_memory_is_that_of_the_tenants_that_wait() -> None:
    clock = FairClock()
    for number in range(1000):
        clock.started(clock.tag(f"t{number}", 10) + 10)
    assert len(clock._ends) <= 1
    assert len(clock._last) <= 1


def test_classes_go_before_tags() -> None:
    assert engine_priority(-1, 10**14) < engine_priority(0, 0) < engine_priority(0, 1) < engine_priority(1, 0)
    assert engine_priority(0, 2**60) < engine_priority(1, 0)
    assert abs(engine_priority(1000, 2**48)) < 2**63, "a number that msgpack and protobuf can carry"
