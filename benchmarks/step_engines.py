"""The processes of the step benchmark: whole engines, and an expert group that counts its own time.

`Engine` is vLLM in one process, as an attention shard has it, or plain. Its steps are timed from inside: no HTTP, no
relay, no detokenisation; what remains is scheduling, the model, and sampling.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pinned import pin
from stages import per_call, stage_sums
from torch import Tensor

from moeray.deepseek_v4 import Checkpoint, RoutedExperts
from moeray.placement import Placement, contiguous
from moeray.transport import GroupServer, MergedCompute, ModelIdentity

PROMPT_TOKENS, MAX_REQUESTS, KV_BYTES = 16, 64, 1 << 30
TIMEOUT_S = 120.0
FAR_AWAY = 1000  # tokens; every request outlives its measurement


def one_group(checkpoint: Checkpoint) -> Placement:
    shape = checkpoint.shape
    return contiguous(generation=1, num_layers=shape.num_layers, num_experts=shape.num_experts, num_groups=1)


@dataclass(frozen=True)
class Decoded:
    """One run of decode steps. `began`, `ended`: on the clock that all processes of a machine share, in seconds."""

    began: float
    ended: float
    tokens: int
    stages: dict[str, float]


@dataclass
class Engine:
    """Commands of an engine's process."""

    engine: Any = None
    settings: Any = None
    runs: int = 0

    def start(self, checkpoint: Path, split: bool) -> dict[str, Any]:
        """Load; an engine that is not split is plain vLLM with vLLM's own expert kernel."""
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        import torch
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.executor.abstract import Executor

        from moeray.vllm_hooks.engine_args import shard_engine_args
        from moeray.vllm_hooks.settings import ShardSettings

        self.settings = ShardSettings(backend="gloo", checkpoint=checkpoint, timeout_s=TIMEOUT_S) if split else None
        limits = {"max_num_seqs": MAX_REQUESTS, "kv_cache_memory_bytes": KV_BYTES}
        arguments = shard_engine_args(
            model=checkpoint, model_name=checkpoint.name, engine_args=limits, moeray=self.settings
        )
        config = arguments.create_engine_config(UsageContext.ENGINE_CONTEXT)
        self.engine = LLMEngine(config, Executor.get_class(config), log_stats=False, multiprocess_mode=False)
        return {"threads": torch.get_num_threads(), "cores": sorted(os.sched_getaffinity(0))}

    def connect(self, address: str, number: int, backend: str, spin_s: float) -> None:
        """Let the experts be those behind `address`, or in this process (`local`)."""
        from moeray.vllm_hooks.settings import ADDITIONAL_CONFIG_KEY

        settings = replace(self.settings, shard=f"s{number}", number=number, backend=backend, spin_s=spin_s)
        self.engine.vllm_config.additional_config[ADDITIONAL_CONFIG_KEY] = settings.to_json()
        placement = one_group(Checkpoint.open(self.settings.checkpoint))
        self.engine.collective_rpc("moeray_connect", args=(placement.to_json(), [address]))

    def disconnect(self) -> None:
        """The group must not think that it has a shard whose call could come."""
        from moeray.vllm_hooks.hop import hop

        hop.close()

    def move(self, cores: Sequence[int]) -> None:
        pin(cores)

    def prefill(self, batch: int) -> None:
        """Bring `batch` new requests to where each step decodes one token of every request."""
        from vllm import SamplingParams

        self.runs += 1
        sampling = SamplingParams(temperature=0, max_tokens=FAR_AWAY, ignore_eos=True, detokenize=False)
        random = np.random.default_rng(self.runs)
        self._names = [f"{self.runs}-{number}" for number in range(batch)]
        for name in self._names:
            prompt = random.integers(10, 1500, PROMPT_TOKENS).tolist()
            self.engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        begun: set[str] = set()
        while len(begun) < batch:
            begun |= {output.request_id for output in self.engine.step() if output.outputs[0].token_ids}
        self.engine.step()

    def decode(self, steps: int) -> Decoded:
        """That many steps, after which the requests are forgotten."""
        before = self._stage_sums()
        began, tokens = time.monotonic(), 0
        for _ in range(steps):
            tokens += len(self.engine.step())
        ended = time.monotonic()
        stages = per_call(before, self._stage_sums())
        self.engine.abort_request(self._names)
        return Decoded(began, ended, tokens, stages)

    def _stage_sums(self) -> dict[str, int]:
        from moeray.vllm_hooks.hop import hop

        return stage_sums(hop._transport)


@dataclass
class Group:
    """Commands of an expert group's process."""

    servers: list[GroupServer] = field(default_factory=list)
    spent_ns: int = 0

    def serve(self, checkpoint: Path, num_threads: int, may_poll: bool) -> str:
        """Load all experts; returns the address."""
        opened = Checkpoint.open(checkpoint)
        shape = opened.shape
        held = dict.fromkeys(shape.moe_layers, tuple(range(shape.num_experts)))
        experts = RoutedExperts.load(opened, held, num_threads=num_threads)

        def timed(layer: int, x_TD: Tensor, ids_TK: Tensor, out_PD: Tensor | None) -> Tensor:
            began = time.perf_counter_ns()
            rows_PD = experts(layer, x_TD, ids_TK, out_PD)
            self.spent_ns += time.perf_counter_ns() - began
            return rows_PD

        identity = ModelIdentity(
            fingerprint=opened.fingerprint(), hidden_size=shape.hidden_size, top_k=shape.top_k,
            num_experts=shape.num_experts, num_layers=shape.num_layers, dtype=shape.dtype,
        )  # fmt: skip
        server = GroupServer(MergedCompute(timed), identity, positions={1: 0}, may_poll=may_poll)
        self.servers.append(server)
        return self.servers[0].start()

    def move(self, cores: Sequence[int]) -> None:
        pin(cores)

    def take_spent_us(self) -> float:
        """Microseconds in the experts' computation since the last time."""
        spent, self.spent_ns = self.spent_ns, 0
        return spent / 1e3
