"""Calls of several shards, computed as one: continuous batching of expert work.

Whoever finds the experts idle computes at once. Calls that come meanwhile wait, and the oldest of them then takes all
that ask for its layer along: every expert's matrices are read once for all of them. Nobody waits in the hope of
company, so a single shard pays a lock (about 1 us); shards that queue up at a busy group fall into step by themselves.

Only for computations whose rows do not depend on the other rows of a call (`RoutedExperts.batch_invariant`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeray.transport.interface import ExpertCompute


@dataclass(slots=True, eq=False)
class _Call:
    """One shard's call.

    Attributes:
        woken: set when its result is there, or when it is its turn to compute.
        result: rows, or the error that is this call's alone.
    """

    layer: int
    x_TD: Tensor
    ids_TK: Tensor
    woken: threading.Event = field(default_factory=threading.Event)
    result: Tensor | Exception | None = None


class MergedCompute:
    """An `ExpertCompute` for any number of threads, over one that is called by one thread at a time."""

    def __init__(self, compute: ExpertCompute) -> None:
        self._compute = compute
        self._lock = threading.Lock()
        self._waiting: list[_Call] = []
        self._busy = False
        self._num_calls = self._num_batches = 0

    @property
    def calls_per_batch(self) -> float:
        """Mean since the start; 1 where nothing was merged."""
        return self._num_calls / max(1, self._num_batches)

    def __call__(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor) -> Tensor:
        call = _Call(layer, x_TD, expert_ids_TK)
        with self._lock:
            idle, self._busy = not self._busy, True
            if not idle:
                self._waiting.append(call)
        if not idle:
            call.woken.wait()
        if call.result is None:
            self._lead(call)
        if isinstance(call.result, Tensor):
            return call.result
        raise call.result or RuntimeError("a call without a result")

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
        num_pairs = [int((call.ids_TK >= 0).sum()) for call in batch]
        x_TD, ids_TK = torch.cat([call.x_TD for call in batch]), torch.cat([call.ids_TK for call in batch])
        try:
            rows_PD = self._compute(batch[0].layer, x_TD, ids_TK)
            for call, rows in zip(batch, rows_PD.split(num_pairs), strict=True):
                call.result = rows
        except Exception:  # noqa: BLE001 whose error it is shows when each is computed by itself
            for call in batch:
                self._run_alone(call)

    def _run_alone(self, call: _Call) -> None:
        try:
            call.result = self._compute(call.layer, call.x_TD, call.ids_TK)
        except Exception as error:  # noqa: BLE001 raised in the call's own thread
            call.result = error
