"""A group that fails at rows of its own is broken; one that fails at a call alone is not."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from moeray.expert_group import self_test
from moeray.expert_group.self_test import SelfTest
from moeray.transport import ModelIdentity

IDENTITY = ModelIdentity(fingerprint="f", hidden_size=8, top_k=2, num_experts=4, num_layers=3, dtype="bfloat16")
HELD = {1: (0, 3)}


class Experts:
    """Records what it is asked; `fails` is raised."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.fails, self.held = fails, dict(HELD)
        self.asked: list[tuple[int, Tensor, Tensor]] = []
        self.may_go = threading.Event()
        self.may_go.set()
        self.broken: list[Exception] = []
        self.test = SelfTest(self.compute, lambda: self.held, IDENTITY, torch.device("cpu"), self.broken.append)

    def compute(self, layer: int, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
        self.asked.append((layer, x_TD, ids_TK))
        self.may_go.wait(60)
        if self.fails is not None:
            raise self.fails
        return x_TD

    def finish(self) -> None:
        self.may_go.set()
        for thread in threading.enumerate():
            if thread.name == "moeray-self-test":
                thread.join(60)


def test_each_expert_of_the_layer_computes_a_finite_row_of_its_own() -> None:
    experts = Experts()
    experts.test.after_failure(1)
    experts.finish()
    ((layer, x_TD, ids_TK),) = experts.asked
    assert (layer, x_TD.dtype, list(x_TD.shape), x_TD.isfinite().all().item()) == (1, torch.bfloat16, [2, 8], True)
    assert (ids_TK.dtype, ids_TK.tolist()) == (torch.int32, [[0, -1], [3, -1]])
    assert experts.broken == []


def test_memory_that_is_short_for_a_while_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "OUT_OF_MEMORY_S", 0.0)
    passing, lasting = Experts(), Experts(torch.OutOfMemoryError("CUDA out of memory"))
    tries = iter([torch.OutOfMemoryError("CUDA out of memory"), None])

    def compute(layer: int, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
        if (error := next(tries)) is not None:
            raise error
        return x_TD

    passing.test = SelfTest(compute, lambda: HELD, IDENTITY, torch.device("cpu"), passing.broken.append)
    for experts in (passing, lasting):
        experts.test.after_failure(1)
        experts.finish()
    assert passing.broken == [] and next(tries, "used") == "used"
    assert len(lasting.asked) == self_test.OUT_OF_MEMORY_TRIES and lasting.broken == [lasting.fails]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), ValueError("NaN")])
def test_a_group_that_fails_at_that_is_broken(error: Exception) -> None:
    experts = Experts(error)
    experts.test.after_failure(1)
    experts.finish()
    assert experts.broken == [error]


def test_experts_that_were_released_meanwhile_say_nothing() -> None:
    experts = Experts(RuntimeError("expert 3 of layer 1 is not held here"))
    experts.may_go.clear()
    experts.test.after_failure(1)
    experts.held = {1: (0,)}
    experts.finish()
    assert experts.broken == []


def test_failures_during_a_test_start_no_other_and_later_ones_do() -> None:
    experts = Experts()
    experts.may_go.clear()
    for _ in range(5):
        experts.test.after_failure(1)
    experts.finish()
    assert len(experts.asked) == 1
    experts.test.after_failure(1)
    experts.finish()
    assert len(experts.asked) == 2
