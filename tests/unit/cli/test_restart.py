"""`moeray restart`: when the next process may go."""

from __future__ import annotations

from typing import Any

import pytest

from moeray.cli.restart import is_replaced

SETTLED = {"generation": 4, "oldest_generation": 4, "proposed": None, "is_complete": True, "groups": ["b", "c"]}


def state(members: dict[str, str], **more: Any) -> dict[str, Any]:
    processes = [{"role": "expert_group", "id": id, "state": each} for id, each in members.items()]
    return {"processes": processes} | SETTLED | more


def test_a_process_is_replaced_when_it_is_gone_and_as_many_serve_as_before() -> None:
    assert is_replaced(state({"b": "ready", "c": "ready"}), "expert_group", "a", 2)
    assert is_replaced(state({"a": "lost", "b": "ready", "c": "ready"}), "expert_group", "a", 2)


@pytest.mark.parametrize(
    "not_yet",
    [
        state({"a": "ready", "b": "ready"}),
        state({"a": "draining", "b": "ready", "c": "ready"}),
        state({"b": "ready"}),
        state({"b": "ready", "c": "starting"}),
        state({"b": "ready", "c": "ready"}, groups=["b"]),
        state({"b": "ready", "c": "ready"}, proposed={"generation": 5}),
        state({"b": "ready", "c": "ready"}, oldest_generation=3),
        state({"b": "ready", "c": "ready"}, is_complete=False),
    ],
)
def test_it_is_not_before_everybody_uses_what_has_taken_its_place(not_yet: dict[str, Any]) -> None:
    assert not is_replaced(not_yet, "expert_group", "a", 2)
