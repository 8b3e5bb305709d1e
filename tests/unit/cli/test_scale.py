"""`moeray scale`: what may be typed, and when the numbers are reached."""

from __future__ import annotations

from typing import Any

import pytest

from moeray.cli import scale as command
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


class Cluster:
    """A controller that is told, and a Serve that takes the deployments it is told to.

    Attributes:
        wanted: role -> what the controller wants.
        replicas: deployment -> what Serve was told.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *takes: str) -> None:
        self.wanted = {"expert_group": 2}
        self.replicas: dict[str, int] = {}
        self.is_deaf = False
        self._takes = takes
        monkeypatch.setattr(command, "_tell_controller", self._tell_controller)
        monkeypatch.setattr(command, "_tell_serve", self._tell_serve)

    def _tell_controller(self, role: str, count: int) -> None:
        if self.is_deaf:
            raise CommandError("the controller does not answer")
        self.wanted[role] = count

    def _tell_serve(self, deployment: str, count: int) -> None:
        if deployment not in self._takes:
            self.is_deaf = "deaf" in self._takes
            raise CommandError("Ray Serve refused: no")
        self.replicas[deployment] = count


def change(wanted: dict[str, int]) -> str:
    """How it failed."""
    with pytest.raises(CommandError) as error:
        command._change(wanted, 2)
    return str(error.value)


def test_who_waits_for_numbers_that_somebody_else_has_changed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted_now = {"experts": 2}
    monkeypatch.setattr(command, "Targets", lambda: wanted_now)

    def watch(done: Any, timeout_s: float, before: dict[str, Any]) -> dict[str, Any]:
        seen = state(["ready", "ready"], ["ready"])
        assert not done(seen)
        wanted_now["experts"] = 3
        assert done(seen)
        return seen

    monkeypatch.setattr(command, "watch", watch)
    wanted_now["experts"] = 4
    with pytest.raises(CommandError, match="other numbers meanwhile: experts 3"):
        command._wait({"experts": 4}, 60.0, {})


def test_what_serve_refuses_the_controller_does_not_go_on_wanting(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch)
    assert change({"experts": 4, "attention": 3}) == "Ray Serve refused: no; experts stay at 2"
    assert cluster.wanted["expert_group"] == 2


def test_what_serve_has_taken_before_stays_and_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, "ExpertGroup")
    assert change({"experts": 4, "attention": 3}) == "Ray Serve refused: no; experts=4 is under way"
    assert cluster.wanted["expert_group"] == cluster.replicas["ExpertGroup"] == 4

    cluster = Cluster(monkeypatch, "AttentionShard")
    said = change({"attention": 3, "experts": 4})
    assert said == "Ray Serve refused: no; attention=3 is under way; experts stay at 2"
    assert cluster.wanted["expert_group"] == 2 and cluster.replicas == {"AttentionShard": 3}


def test_what_could_not_be_undone_is_said_with_the_command_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, "deaf")
    said = change({"experts": 4})
    assert "goes on waiting for experts=4" in said and "`moeray scale experts=2`" in said
    assert cluster.wanted["expert_group"] == 4
