"""A minute of faults: no request fails, no answer is wrong, and the cluster heals each time."""

from __future__ import annotations

import pytest

from chaos.faults import FAULTS, Schedule
from chaos.harness import Plan, run
from chaos.report import as_text, rows

SEED = 20
FIRST = ("kill group", "kill engine", "stop group", "cut link", "garbage from group")
"""One of each way to lose something; `make chaos` runs them all."""


@pytest.mark.full
@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_minute_of_faults_costs_no_request_and_changes_no_answer() -> None:
    assert set(FIRST) <= set(FAULTS)
    findings = run(Plan(60, SEED, Schedule(SEED, list(FIRST)), every=3))
    table = as_text(rows(findings))
    assert findings.failures == [], f"{table}\n{findings.failures[:3]}"
    assert findings.is_good, table
    assert findings.num_requests > 0 and any(not event.skipped for event in findings.events), table
