"""A short run of the fuzzer; `make fuzz` is the long one, with tenants and the ingress in a process of its own."""

from __future__ import annotations

from attack import SHARES, attack
from front_process import Ingress, ShardProcess, until
from judge import End, Judge
from target import Target

NUM_CASES = 200


def test_hostile_requests_are_answered_and_leave_nothing_behind(ingress: Ingress, shared_shard: ShardProcess) -> None:
    judge = Judge([])
    target = Target(ingress.server.http_port, ingress.server.grpc_port, {"authorization": "Bearer none"}, judge)

    attack(target, NUM_CASES, seed_=6)

    assert judge.num_cases >= 0.8 * NUM_CASES
    assert {kind.split(" /")[0] for kind, _ in judge.counts} == set(SHARES)
    assert any(status in ("200", "OK") for _, status in judge.counts), judge.counts
    until(lambda: ingress.server.num_requests == shared_shard.info().num_requests == 0, 60)
    assert judge.faults(End()) == []
