"""Weights that change in memory are found, by name, and nothing else is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moeray.deepseek_v4 import Checkpoint, ExpertError, RoutedExperts
from moeray.deepseek_v4.packed_experts import PackedExperts
from moeray.deepseek_v4.scrubber import Scrubber

ALL = dict.fromkeys(range(3), range(6))


@pytest.fixture
def experts(write: Callable[..., Path]) -> RoutedExperts:
    return RoutedExperts.load(Checkpoint.open(write()), ALL)


def matrix(experts: RoutedExperts, layer: int, expert: int, part: str) -> np.ndarray:
    store = experts._store
    assert isinstance(store, PackedExperts)
    array = getattr(store._layers[layer].experts[expert], part)
    assert isinstance(array, np.ndarray)
    return array


@pytest.mark.parametrize("part", ["w13", "w2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_flipped_bit_is_found_and_names_its_expert(
    write: Callable[..., Path], part: str, dtype: torch.dtype
) -> None:
    experts = RoutedExperts.load(Checkpoint.open(write()), ALL, dtype=dtype)
    assert sum(experts.scrub()) == experts.weight_bytes
    matrix(experts, 1, 4, part)[-1, 17] ^= 1
    with pytest.raises(ExpertError, match="expert 4 of layer 1 has changed in memory"):
        list(experts.scrub())
    experts.release({0: range(6), 1: (0, 1, 2, 3, 5)})
    assert sum(experts.scrub()) == experts.weight_bytes
    experts.hold(ALL)
    assert sum(experts.scrub()) == experts.weight_bytes, "read anew it is right again"


def test_matrices_larger_than_a_piece_are_compared_whole(
    experts: RoutedExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeray.deepseek_v4.packed_experts.SCRUB_BYTES", 1000)
    pieces = list(experts.scrub())
    assert max(pieces) == 1000 and sum(pieces) == experts.weight_bytes
    matrix(experts, 2, 5, "w2")[1, -1] ^= 1 << 14
    with pytest.raises(ExpertError, match="expert 5 of layer 2"):
        list(experts.scrub())


def test_damage_is_told_once_while_weights_come_and_go(experts: RoutedExperts) -> None:
    found: list[str] = []
    told = threading.Event()

    def on_damage(error: ExpertError) -> None:
        found.append(str(error))
        told.set()

    scrubber = Scrubber(experts.scrub, on_damage, round_s=0.0)
    deadline = time.monotonic() + 60
    while scrubber.rounds < 5:
        assert time.monotonic() < deadline
        experts.release({0: (1,)})
        experts.hold(ALL)
    assert not found
    matrix(experts, 0, 1, "w13")[0, 0] ^= 1
    assert told.wait(60)
    scrubber.close()
    assert found == ["expert 1 of layer 0 has changed in memory since it was loaded"]


def test_it_compares_no_faster_than_it_should() -> None:
    times: list[float] = []

    def scrub() -> object:
        for _ in range(10):
            times.append(time.monotonic())
            yield 1000

    scrubber = Scrubber(scrub, lambda _: None, bytes_per_s=20_000.0)  # type: ignore[arg-type]
    deadline = time.monotonic() + 60
    while len(times) < 10:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    scrubber.close()
    assert times[-1] - times[0] >= 9 * 0.05 - 0.02
    assert len(times) == 10, "the next round is a minute away"
