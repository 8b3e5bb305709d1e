"""Merged calls: everybody gets the rows of a call of their own, errors are nobody else's, and nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moeray.transport.merging import MergedCompute

IDS = torch.tensor([[0, -1], [2, 1]], dtype=torch.int32)


class Gate:
    """A computation that stops inside its first call until it is told to go on, and notes what it was asked."""

    def __init__(self) -> None:
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.calls: list[tuple[int, int]] = []
        self.running = 0

    def __call__(self, layer: int, x_TD: Tensor, ids_TK: Tensor, out_PD: Tensor | None = None) -> Tensor:
        self.running += 1
        assert self.running == 1, "one thread at a time"
        self.calls.append((layer, len(x_TD)))
        self.entered.set()
        assert self.go_on.wait(60)
        self.running -= 1
        if (x_TD < 0).any():
            raise ValueError(f"negative in a call of {len(x_TD)}")
        tokens, ks = (ids_TK >= 0).nonzero(as_tuple=True)
        rows_PD = x_TD[tokens] * 100 + ids_TK[tokens, ks].unsqueeze(1) + 10_000 * layer
        return rows_PD if out_PD is None else out_PD.copy_(rows_PD)


def rows_of(merged: MergedCompute, layer: int, x_TD: Tensor) -> Tensor:
    ids_TK = IDS[: len(x_TD)]
    room_PD = torch.full((int((ids_TK >= 0).sum()), x_TD.shape[1]), -1.0)
    merged(layer, x_TD, ids_TK, room_PD)
    return room_PD


def in_threads(calls: list[Callable[[], Tensor]]) -> tuple[list[threading.Thread], dict[int, object]]:
    results: dict[int, object] = {}

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except Exception as error:  # noqa: BLE001
            results[index] = error

    return [threading.Thread(target=run, args=(index,)) for index in range(len(calls))], results


def x_of(value: float, num_tokens: int = 2) -> Tensor:
    return torch.full((num_tokens, 3), float(value))


def run_behind_a_busy_call(gate: Gate, merged: MergedCompute, calls: list[tuple[int, Tensor]]) -> dict[int, object]:
    """The first call is inside the computation when all others arrive, in order."""
    threads, results = in_threads([lambda call=call: rows_of(merged, *call) for call in calls])
    threads[0].start()
    assert gate.entered.wait(60)
    for count, thread in enumerate(threads[1:], start=1):
        thread.start()
        while len(merged._waiting) < count:
            thread.join(0.001)
    gate.go_on.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def test_calls_of_one_layer_that_waited_are_one_call_and_others_are_not_starved() -> None:
    gate = Gate()
    merged = MergedCompute(gate)
    calls = [(0, x_of(1)), (1, x_of(2)), (3, x_of(7)), (2, x_of(3)), (1, x_of(4, 1)), (2, x_of(5)), (1, x_of(6, 0))]
    results = run_behind_a_busy_call(gate, merged, calls)
    assert gate.calls == [(0, 2), (1, 3), (3, 2), (2, 4)], "whoever waited longest leads"
    for index, (layer, x_TD) in enumerate(calls):
        alone = Gate()
        alone.go_on.set()
        assert torch.equal(results[index], alone(layer, x_TD, IDS[: len(x_TD)])), index  # type: ignore[arg-type]
    assert merged.calls_per_batch == 7 / 4


def test_an_error_is_its_own_calls_alone() -> None:
    gate = Gate()
    results = run_behind_a_busy_call(
        gate, MergedCompute(gate), [(0, x_of(1)), (1, x_of(2)), (1, x_of(-1)), (1, x_of(3))]
    )
    assert isinstance(results[2], ValueError) and str(results[2]) == "negative in a call of 2"
    for index, value in ((1, 2), (3, 3)):
        rows = results[index]
        assert isinstance(rows, Tensor) and rows[0, 0] == 10_000 + 100 * value


def test_a_call_alone_passes_its_error_on_and_the_next_one_is_served() -> None:
    gate = Gate()
    gate.go_on.set()
    merged = MergedCompute(gate)
    with pytest.raises(ValueError, match="negative"):
        rows_of(merged, 0, x_of(-1))
    assert rows_of(merged, 3, x_of(1))[0, 0] == 30_100
    assert merged.calls_per_batch == 1


def test_a_call_that_counts_its_pairs_wrongly_is_told_so() -> None:
    gate = Gate()
    gate.go_on.set()
    with pytest.raises(ValueError, match="3 rows for a call of 4 pairs"):
        MergedCompute(lambda layer, x_TD, ids_TK, out_PD: gate(layer, x_TD, ids_TK))(0, x_of(1), IDS, torch.zeros(4, 3))


def test_many_threads_for_a_while_all_get_their_rows() -> None:
    gate = Gate()
    gate.go_on.set()
    merged, wrong = MergedCompute(gate), []

    def shard(number: int) -> None:
        for call in range(200):
            layer, num_tokens = (number + call) % 3, call % 3
            rows = rows_of(merged, layer, x_of(number, num_tokens))
            if rows.shape[0] != (0, 1, 3)[num_tokens] or (num_tokens and rows[0, 0] != 10_000 * layer + 100 * number):
                wrong.append((number, call))

    threads = [threading.Thread(target=shard, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong
    assert sum(num_tokens for _, num_tokens in gate.calls) == 6 * sum(call % 3 for call in range(200))
