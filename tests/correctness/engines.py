"""One engine of ours in this process, its experts behind the local transport, asked for teacher-forced logprobs."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from v4_reference import Logprobs

from moeray.deepseek_v4 import Checkpoint
from moeray.placement.expert_map import contiguous
from moeray.vllm_hooks.engine_args import shard_engine_args
from moeray.vllm_hooks.hop import hop
from moeray.vllm_hooks.settings import ShardSettings

MAX_MODEL_LEN = 6144


@dataclass
class InProcessEngine:
    engine: Any
    count: int = 0

    def teacher_forced(self, prompt: list[int]) -> Logprobs:
        """Log-probabilities of `prompt[1:]` as one request, computed in as many steps as the scheduler wants."""
        from vllm import SamplingParams

        self.count += 1
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        self.engine.add_request(f"p{self.count}", {"prompt_token_ids": prompt}, params)
        finished: list[Any] = []
        while self.engine.has_unfinished_requests():
            finished += [output for output in self.engine.step() if output.finished]
        (output,) = finished
        steps = output.prompt_logprobs[1:]
        chosen = [step[token].logprob for step, token in zip(steps, prompt[1:], strict=True)]
        best = [min(step, key=lambda token: step[token].rank) for step in steps]
        return Logprobs(torch.tensor(chosen), torch.tensor(best))


@contextmanager
def in_process_engine(
    checkpoint: Path, *, num_groups: int = 2, settings: Mapping[str, Any] | None = None, **engine_args: Any
) -> Iterator[InProcessEngine]:
    """Start an engine with every expert behind the local transport in `num_groups` slices; shut it down at the end.

    Args:
        settings: further ones of the shard.
    """
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor.abstract import Executor

    shape = Checkpoint.open(checkpoint).shape
    arguments = shard_engine_args(
        model=checkpoint,
        model_name="under-test",
        engine_args={
            "max_num_batched_tokens": 512,
            "kv_cache_memory_bytes": 256 << 20,
            "max_num_seqs": 8,
            "max_model_len": MAX_MODEL_LEN,
            **engine_args,
        },
        moeray=ShardSettings(shard="s0", backend="local", checkpoint=checkpoint, **(settings or {})),
    )
    config = arguments.create_engine_config(UsageContext.ENGINE_CONTEXT)
    engine = LLMEngine(config, Executor.get_class(config), log_stats=False, multiprocess_mode=False)
    found = InProcessEngine(engine)
    try:
        placement = contiguous(
            generation=1, num_layers=shape.num_layers, num_experts=shape.num_experts, num_groups=num_groups
        )
        engine.collective_rpc("moeray_connect", args=(placement.to_json(), []))
        yield found
    finally:
        hop.close()
        engine.engine_core.engine_core.shutdown()
        # A failed test's traceback keeps `found`. An engine that is collected only after the next one has started takes
        # down the process groups that vLLM keeps per process, the next engine's.
        del engine, found.engine
        gc.collect()
