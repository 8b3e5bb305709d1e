"""`moeray scale`: what may be typed, and when the numbers are reached."""

from __future__ import annotations

from typing import Any

import pytest

from moeray.cli.errors import CommandError
from moeray.cli.scale import parse_counts, reached


def test_pools_and_numbers_are_read() -> None:
    assert parse_counts(["experts=4", "attention=3"]) == {"experts": 4, "attention": 3}


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (["experts"], "'experts' is not experts=N or attention=N"),
        (["experts="], "'experts=' is not"),
        (["experts=two"], "'experts=two' is not"),
        (["experts=-1"], "'experts=-1' is not"),
        (["experts=1.5"], "'experts=1.5' is not"),
        (["ingress=2"], "'ingress=2' is not"),
        (["experts=0"], "experts=0: at least 1"),
        (["attention=2", "attention=2"], "attention is given twice"),
    ],
)
def test_what_cannot_be_is_refused_with_status_two(counts: list[str], message: str) -> None:
    with pytest.raises(CommandError, match=message) as error:
        parse_counts(counts)
    assert error.value.status == 2


def state(of_groups: list[str], of_shards: list[str], **more: Any) -> dict[str, Any]:
    processes = [{"role": "expert_group", "state": each} for each in of_groups]
    processes += [{"role": "attention_shard", "state": each} for each in of_shards]
    there = [str(number) for number, each in enumerate(of_groups) if each == "ready"]
    settled = {"generation": 3, "oldest_generation": 3, "proposed": None, "is_complete": True, "groups": there}
    return {"processes": processes} | settled | more


WANTED = {"experts": 2, "attention": 1}


def test_reached_is_when_so_many_serve_and_all_use_the_newest_generation() -> None:
    assert reached(WANTED, state(["ready", "ready", "lost"], ["ready", "lost"]))
    assert reached({"attention": 2}, state(["ready"], ["ready", "ready"]))


@pytest.mark.parametrize(
    "not_yet",
    [
        state(["ready"], ["ready"]),
        state(["ready", "starting"], ["ready"]),
        state(["ready", "ready", "draining"], ["ready"]),
        state(["ready", "ready"], ["ready", "draining"]),
        state(["ready", "ready"], ["ready", "ready"]),
        state(["ready", "ready"], ["ready"], groups=["0", "1", "2"]),
        state(["ready", "ready"], ["ready"], proposed={"generation": 4}),
        state(["ready", "ready"], ["ready"], oldest_generation=2),
        state(["ready", "ready"], ["ready"], is_complete=False),
    ],
)
def test_it_is_not_reached_while_anything_is_on_its_way(not_yet: dict[str, Any]) -> None:
    assert not reached(WANTED, not_yet)
