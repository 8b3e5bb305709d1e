"""What the shard process asks of the engine's worker, as far as it needs no engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moeray.vllm_hooks import worker
from moeray.vllm_hooks.executor import step_limit
from moeray.vllm_hooks.hop import OnWaiting
from moeray.vllm_hooks.settings import ShardSettings

SETTINGS = ShardSettings(shard="shard-0", backend="gloo", checkpoint=Path("/"))


class Recorder:
    """In place of a hop, and of a feed."""

    def __init__(self) -> None:
        self.on_waiting: OnWaiting = lambda _: None
        self.told = list[bool]()

    def set_up(self, connect: Any, accuse: Any, wait_s: float, on_waiting: OnWaiting) -> None:
        self.on_waiting = on_waiting

    def accuse(self, *_: Any) -> None: ...

    def waiting(self, waits: bool) -> None:
        self.told.append(waits)


@pytest.mark.parametrize("has_feed", [True, False])
@pytest.mark.parametrize("name", ["hop", "second_hop"])
def test_a_step_that_waits_for_experts_is_excused_as_long_as_it_waits(
    monkeypatch: pytest.MonkeyPatch, name: str, has_feed: bool
) -> None:
    hops = {"hop": Recorder(), "second_hop": Recorder()}
    for each, recorder in hops.items():
        monkeypatch.setattr(worker, each, recorder)
    monkeypatch.setattr(worker, "_settings", lambda _: SETTINGS)
    monkeypatch.setattr(worker, "_connector", lambda *_: None)
    monkeypatch.setattr(step_limit, "is_excused", False)
    feed = Recorder()
    worker._set_up_hops(None, feed if has_feed else None)  # type: ignore[arg-type]
    hops[name].on_waiting(True)
    assert step_limit.is_excused
    hops[name].on_waiting(False)
    assert not step_limit.is_excused
    assert feed.told == ([True, False] if has_feed else [])
