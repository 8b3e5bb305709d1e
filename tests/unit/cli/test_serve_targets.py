"""What Ray Serve is to keep, asked seldom."""

from __future__ import annotations

from typing import Any

import pytest

from moeray.cli import serve_targets
from moeray.cli.errors import CommandError
from moeray.cli.serve_targets import Targets


def test_targets_are_those_of_now_and_serve_is_asked_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [100.0], [0]

    def deployments() -> dict[str, Any]:
        asked[0] += 1
        return {"ExpertGroup": {"target_num_replicas": 1 + asked[0]}}

    monkeypatch.setattr(serve_targets, "deployments", deployments)
    monkeypatch.setattr(serve_targets.time, "monotonic", lambda: now[0])
    targets = Targets()
    assert (targets["experts"], targets["experts"], asked[0]) == (2, 2, 1)
    now[0] += 2.1
    assert (targets["experts"], asked[0]) == (3, 2)
    with pytest.raises(CommandError, match="no deployment AttentionShard"):
        targets["attention"]
