"""Calls of several shards, computed as one: continuous batching of expert work.

Whoever finds the experts idle computes at once. Calls that come meanwhile wait, and the oldest of them then takes all
that ask for its layer along: every expert's matrices are read once for all of them. Nobody waits in the hope of
company, so a single shard pays a lock (about 1 us); shards that queue up at a busy group fall into step by themselves.

Only for computations whose rows do not depend on the other rows of a call (`RoutedExperts.batch_invariant`). A call
that is computed alone is written where its reply lies.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

InPlaceCompute = Callable[[int, Tensor, Tensor, Tensor | None], Tensor]
"""An `ExpertCompute` with a fourth argument: where its rows [P, D] are to lie, or None for new memory."""


@dataclass(slots=True, eq=False)
class _Call:
    """One shard's call.

    Attributes:
        woken: set when it is done, or when it is its turn to compute.
        error: this call's alone.
    """

    layer: int
    x_TD: Tensor
    ids_TK: Tensor
    room_PD: Tensor
    woken: threading.Event = field(default_factory=threading.Event)
    is_done: bool = False
    error: Exception | None = None


class MergedCompute:
    """A `session.ComputeInto` for any number of threads, over a computation that is called by one thread at a time."""

    def __init__(self, compute: InPlaceCompute) -> None:
        self._compute = compute
        self._lock = threading.Lock()
        self._waiting: list[_Call] = []
        self._busy = False
        self._num_calls = self._num_batches = 0

    @property
    def calls_per_batch(self) -> float:
        """Mean since the start; 1 where nothing was merged."""
        return self._num_calls / max(1, self._num_batches)

    def __call__(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, room_PD: Tensor) -> None:
        call = _Call(layer, x_TD, expert_ids_TK, room_PD)
        with self._lock:
            idle, self._busy = not self._busy, True
            if not idle:
                self._waiting.append(call)
        if not idle:
            call.woken.wait()
        if not call.is_done:
            self._lead(call)
        if call.error is not None:
            raise call.error

    def _lead(self, call: _Call) -> None:
        """Compute this call and those that wait for its layer, then wake them and the next one to lead."""
        with self._lock:
            batch = [call, *(each for each in self._waiting if each.layer == call.layer)]
            self._waiting = [each for each in self._waiting if each.layer != call.layer]
            self._num_calls += len(batch)
            self._num_batches += 1
        try:
            self._run(batch)
        finally:
            with self._lock:
                successor = self._waiting.pop(0) if self._waiting else None
                self._busy = successor is not None
            for each in (*batch[1:], *((successor,) if successor else ())):
                each.woken.set()

    def _run(self, batch: Sequence[_Call]) -> None:
        if len(batch) == 1:
            self._run_alone(batch[0])
            return
        try:
            x_TD, ids_TK = torch.cat([call.x_TD for call in batch]), torch.cat([call.ids_TK for call in batch])
            rows_PD = self._compute(batch[0].layer, x_TD, ids_TK, None)
            for call, rows in zip(batch, rows_PD.split([len(call.room_PD) for call in batch]), strict=True):
                call.room_PD.copy_(rows)
                call.is_done = True
        except Exception:  # noqa: BLE001 whose error it is shows when each is computed by itself
            for call in batch:
                self._run_alone(call)

    def _run_alone(self, call: _Call) -> None:
        try:
            rows_PD = self._compute(call.layer, call.x_TD, call.ids_TK, call.room_PD)
            if len(rows_PD) != len(call.room_PD):
                raise ValueError(f"{len(rows_PD)} rows for a call of {len(call.room_PD)} pairs")
        except Exception as error:  # noqa: BLE001 raised in the call's own thread
            call.error = error
        call.is_done = True
