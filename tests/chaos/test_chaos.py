"""A minute of faults: no request fails, no answer is wrong, and the cluster heals each time."""

from __future__ import annotations

import pytest

from chaos.criteria import Criteria
from chaos.faults import FAULTS, Schedule
from chaos.harness import Plan, run
from chaos.report import as_text, rows

SEED = 20
FIRST = ("kill group", "kill engine", "stop group", "cut link", "garbage from group")
"""One of each way to lose something; `make chaos` runs them all."""
CRITERIA = Criteria(frozenset(FIRST), min_requests=20, min_faults=len(FIRST))
"""A minute has two or three times as many requests on two cores. Too short for each fault, it gets longer."""


@pytest.mark.full
@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_minute_of_faults_costs_no_request_and_changes_no_answer() -> None:
    assert set(FIRST) <= set(FAULTS)
    findings = run(Plan(60, SEED, Schedule(SEED, list(FIRST)), every=3, every_kind=True))
    table = as_text(rows(findings))
    assert CRITERIA.missed(findings) == [], f"{table}\n{findings.failures[:3]}"
