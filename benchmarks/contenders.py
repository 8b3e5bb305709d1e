"""What the hop benchmark times, all under one shape: the transports here, the floors beside them (floors.py).

Suffixes: T tokens, D hidden, K experts per token, P pairs.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter_ns
from typing import Any, Protocol

import torch
from stages import STAGES, per_call, stage_sums
from torch import Tensor

from moeray.placement import Placement, contiguous
from moeray.transport import LocalTransport, ModelIdentity, Transport, TransportSpec, connect

TOP_K, NUM_EXPERTS = 6, 64
MAX_TOKENS = 512
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Case:
    """One layer call: `batch` tokens of width `hidden`, bf16, top-6 of 64 experts in one group."""

    batch: int
    hidden: int

    @property
    def identity(self) -> ModelIdentity:
        return ModelIdentity(
            fingerprint="rows that are ready", hidden_size=self.hidden, top_k=TOP_K, num_experts=NUM_EXPERTS,
            num_layers=1, dtype="bfloat16",
        )  # fmt: skip

    @property
    def sent_bytes(self) -> int:
        """Rows and ids: what any transport must send."""
        return self.batch * (2 * self.hidden + 4 * TOP_K)

    @property
    def received_bytes(self) -> int:
        return self.batch * TOP_K * 2 * self.hidden

    def call(self) -> tuple[Tensor, Tensor, Tensor]:
        """(x_TD, ids_TK, weights_TK)."""
        generator = torch.Generator().manual_seed(self.batch)
        ids = [torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K] for _ in range(self.batch)]
        x_TD = torch.randn(self.batch, self.hidden, generator=generator).bfloat16()
        return x_TD, torch.stack(ids).int(), torch.rand(self.batch, TOP_K, generator=generator)


def one_group() -> Placement:
    return contiguous(generation=1, num_layers=1, num_experts=NUM_EXPERTS, num_groups=1)


class ReadyRows:
    """Experts whose answer lies there already: the hop is what is measured."""

    def __init__(self, hidden: int) -> None:
        self._rows_PD = torch.randn(MAX_TOKENS * TOP_K, hidden).bfloat16()

    def __call__(self, layer: int, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
        """All ids are of this group, so every pair has a row."""
        return self._rows_PD[: ids_TK.numel()]


class Contender(Protocol):
    """One way to answer a layer call."""

    @property
    def name(self) -> str: ...

    def begin(self, case: Case, calls: int) -> None:
        """Exactly `calls` calls of `call` follow."""
        ...

    def call(self) -> int:
        """One call.

        Returns:
            Nanoseconds that the bytes were on their way; the caller measures the whole call itself.
        """
        ...

    def end(self) -> None: ...

    def stages(self) -> dict[str, float]:
        """Median microseconds of each stage, of the calls since `begin`; empty where there are no stages."""
        ...

    def close(self) -> None: ...


class LayerCalls:
    """A transport, from dispatch to the reduced rows."""

    def __init__(self, name: str, transport: Transport) -> None:
        self.name = name
        self._transport = transport
        self._sums: list[dict[str, int]] = []

    @classmethod
    def to_group(cls, name: str, hidden: int, address: str, host: str = "127.0.0.1", **spec: Any) -> LayerCalls:
        """Connect to an expert group with ready rows.

        Args:
            spec: fields of `TransportSpec` that make this transport what it is.
        """
        wanted = TransportSpec(
            shard="bench", identity=Case(1, hidden).identity, max_tokens=MAX_TOKENS, timeout_s=TIMEOUT_S, host=host,
            **spec,
        )  # fmt: skip
        return cls(name, connect(wanted, one_group(), [address]))

    @classmethod
    def local(cls, hidden: int) -> LayerCalls:
        return cls("local", LocalTransport(one_group(), ReadyRows(hidden)))

    def begin(self, case: Case, calls: int) -> None:
        self._call = case.call()
        self._sums = [stage_sums(self._transport)]

    def call(self) -> int:
        """From dispatch to the reduced rows; on their way the bytes are between packing and reduction."""
        started = perf_counter_ns()
        self._transport.combine(self._transport.dispatch(0, *self._call))
        whole_ns = perf_counter_ns() - started
        sums = stage_sums(self._transport)
        if not sums:
            return whole_ns
        before = self._sums[-1]
        self._sums.append(sums)
        return sums["post"] + sums["wait"] - before["post"] - before["wait"]

    def end(self) -> None:
        """Nothing is left in flight."""

    def stages(self) -> dict[str, float]:
        if len(self._sums) < 2:
            return {}
        each = [per_call(*pair) for pair in pairwise(self._sums)]
        return {stage: statistics.median(one[stage] for one in each) for stage in STAGES}

    def close(self) -> None:
        self._transport.close()
