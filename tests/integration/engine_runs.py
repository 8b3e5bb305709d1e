"""One engine in this process, its experts behind any transport, and the runs whose outcomes must be equal to the bit.

A run is a fixed story (which requests come when, how the scheduler cuts) that ends in an `Outcome`: tokens and
logprobs of every request, and what each engine step was made of. Outcomes of two topologies are compared whole, so an
equal outcome means equal bits for an equal composition of batches.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transport_peers import Peer

from moeray.config import KvCacheConfig, MicroBatches
from moeray.deepseek_v4 import Checkpoint, RoutedExperts
from moeray.placement import Placement, contiguous
from moeray.transport import GroupServer, ModelIdentity
from moeray.vllm_hooks.engine_args import shard_engine_args
from moeray.vllm_hooks.hop import hop
from moeray.vllm_hooks.settings import ADDITIONAL_CONFIG_KEY, ShardSettings

STEP_TOKENS, MAX_REQUESTS = 512, 64
TIMEOUT_S = 120.0
MAX_STEPS = 5000


@dataclass(frozen=True)
class Answer:
    """Everything that one request got. `logprobs`: per generated token, the three best and the chosen one."""

    tokens: tuple[int, ...]
    logprobs: tuple[tuple[tuple[int, float], ...], ...]
    prompt_logprobs: tuple[float, ...]
    num_cached: int


@dataclass(frozen=True)
class Outcome:
    """What a run gave. `steps`: per engine step, tokens of each request; `preempted`: how often a request was."""

    answers: dict[str, Answer]
    steps: tuple[dict[str, int], ...]
    preempted: int


@dataclass(frozen=True)
class Topology:
    """How the experts are spread; `sizes` None is even."""

    name: str
    num_groups: int
    sizes: tuple[int, ...] | None = None
    num_redundant: int = 0

    def placement(self, checkpoint: Checkpoint, generation: int) -> Placement:
        """`sizes` are of the groups but the last, which gets the rest; uneven ones are shuffled in every layer."""
        num_experts, num_layers = checkpoint.shape.num_experts, checkpoint.shape.num_layers
        if self.sizes is None:
            return contiguous(
                generation=generation, num_layers=num_layers, num_experts=num_experts, num_groups=self.num_groups,
                num_redundant=self.num_redundant,
            )  # fmt: skip
        random_ = random.Random(self.name)
        copies = [random_.randrange(num_experts) for _ in range(self.num_redundant)]
        layers = [[*range(num_experts), *copies] for _ in range(num_layers)]
        for layer in layers:
            random_.shuffle(layer)
        slots = (*self.sizes, num_experts + self.num_redundant - sum(self.sizes))
        return Placement(generation, num_experts, slots, tuple(map(tuple, layers)))


@dataclass(frozen=True)
class CheckpointServer:
    """What a group process is told: `transport_peers.Group.serve` calls `start`.

    `lies_in_layer`: there one value of its answers is NaN, and it does not notice.
    """

    checkpoint: Path
    placement: Placement
    group: int
    lies_in_layer: int = -1

    def start(self) -> GroupServer:
        checkpoint = Checkpoint.open(self.checkpoint)
        shape = checkpoint.shape
        held = {layer: self.placement.experts_of_group(self.group, layer) for layer in shape.moe_layers}
        experts = RoutedExperts.load(checkpoint, held)

        def compute(layer: int, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
            rows_PD = experts(layer, x_TD, ids_TK)
            if layer == self.lies_in_layer:
                rows_PD[-1:, -1] = torch.nan
            return rows_PD

        return GroupServer(compute, identity_of(checkpoint), positions={self.placement.generation: self.group})


def identity_of(checkpoint: Checkpoint) -> ModelIdentity:
    shape = checkpoint.shape
    return ModelIdentity(
        fingerprint=checkpoint.fingerprint(), hidden_size=shape.hidden_size, top_k=shape.top_k,
        num_experts=shape.num_experts, num_layers=shape.num_layers, dtype=shape.dtype,
    )  # fmt: skip


@contextlib.contextmanager
def serving(peers: list[Peer], checkpoint: Path, placement: Placement, lies_in_layer: int = -1) -> Iterator[list[str]]:
    """Every group of a placement in a process of its own; yields their addresses. The last one may be a liar."""
    key = f"engine-{id(placement)}"
    for group in range(placement.num_groups):
        lies = lies_in_layer if group == placement.num_groups - 1 else -1
        peers[group].tell("serve", key, CheckpointServer(checkpoint, placement, group, lies))
    addresses = [peers[group].answer() for group in range(placement.num_groups)]
    try:
        yield addresses
    finally:
        for group in range(placement.num_groups):
            peers[group].ask("stop", key)


@dataclass
class Engine:
    """vLLM's engine; `steps` is what the scheduler decided since the run began."""

    engine: Any
    checkpoint: Checkpoint
    steps: list[dict[str, int]] = field(default_factory=list)
    preempted: int = 0
    count: int = 0

    @property
    def scheduler(self) -> Any:
        return self.engine.engine_core.engine_core.scheduler

    def connect(
        self, placement: Placement, addresses: list[str], shard: int = 0, micro_batches: MicroBatches = "never",
        wait_s: float = 60.0,
    ) -> None:  # fmt: skip
        """As the product does it; without addresses the experts are those of this process."""
        settings = ShardSettings(
            backend="gloo" if addresses else "local", checkpoint=self.checkpoint.path, shard=f"s{shard}", number=shard,
            timeout_s=TIMEOUT_S, micro_batches=micro_batches, wait_s=wait_s,
        )  # fmt: skip
        self.engine.vllm_config.additional_config[ADDITIONAL_CONFIG_KEY] = settings.to_json()
        self.engine.collective_rpc("moeray_connect", args=(placement.to_json(), addresses))

    def add(self, prompt: list[int], max_tokens: int, *, prompt_logprobs: bool = False) -> str:
        from vllm import SamplingParams

        self.count += 1
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=3,
            prompt_logprobs=0 if prompt_logprobs else None,
        )  # fmt: skip
        self.engine.add_request(f"r{self.count}", {"prompt_token_ids": prompt}, params)
        return f"r{self.count}"

    def finish(self, after_step: Callable[[int], None] = lambda _: None) -> dict[str, Answer]:
        answers, step = {}, 0
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    answers[output.request_id] = _answer(output)
            step += 1
            assert step < MAX_STEPS, "the scheduler makes no progress"
            after_step(step)
        return answers

    def run(self, story: Callable[[Engine], dict[str, Answer]]) -> Outcome:
        """Tell one story to an engine that remembers nothing of the ones before."""
        assert self.engine.reset_prefix_cache()
        self.steps, self.preempted, self.count = [], 0, 0
        answers = story(self)
        return Outcome(answers, tuple(self.steps), self.preempted)

    @contextlib.contextmanager
    def step_limit(self, num_tokens: int) -> Iterator[None]:
        """Cut prefills into chunks of at most `num_tokens` per step, all requests together."""
        before = self.scheduler.max_num_scheduled_tokens
        self.scheduler.max_num_scheduled_tokens = num_tokens
        try:
            yield
        finally:
            self.scheduler.max_num_scheduled_tokens = before

    def take_blocks(self) -> Callable[[], None]:
        """Take all free KV blocks: who needs one more must preempt somebody. Returns what gives them back."""
        pool = self.scheduler.kv_cache_manager.block_pool
        taken = pool.get_new_blocks(pool.get_num_free_blocks())
        return lambda: pool.free_blocks(taken)

    def _record(self) -> None:
        schedule = self.scheduler.schedule

        def recorded(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.steps.append({_name(request): size for request, size in output.num_scheduled_tokens.items()})
            self.preempted += len(output.preempted_req_ids or ())
            return output

        self.scheduler.schedule = recorded


def _name(request: str) -> str:
    """vLLM appends a random suffix to a request's id."""
    return request.split("-", maxsplit=1)[0]


def _answer(output: Any) -> Answer:
    completion = output.outputs[0]
    return Answer(
        tuple(completion.token_ids),
        tuple(tuple(sorted((token, each.logprob) for token, each in step.items())) for step in completion.logprobs),
        tuple(
            step[token].logprob
            for step, token in zip(output.prompt_logprobs or [], output.prompt_token_ids, strict=False)
            if step
        ),
        output.num_cached_tokens or 0,
    )


@contextlib.contextmanager
def running_engine(
    checkpoint: Path, micro_batches: MicroBatches = "never", kv_cache: KvCacheConfig | None = None
) -> Iterator[Engine]:
    """An engine in this process, with the threads that conftest.py has set.

    Only one that was started for micro-batches can be connected with them.
    """
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # vLLM would pin this whole process to a core
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor.abstract import Executor

    opened = Checkpoint.open(checkpoint)
    arguments = shard_engine_args(
        model=checkpoint,
        model_name="under-test",
        engine_args={
            "max_num_batched_tokens": STEP_TOKENS,
            "max_num_seqs": MAX_REQUESTS,
            "kv_cache_memory_bytes": 256 << 20,
        },
        moeray=ShardSettings(backend="local", checkpoint=checkpoint, micro_batches=micro_batches),
        kv_cache=kv_cache,
    )
    config = arguments.create_engine_config(UsageContext.ENGINE_CONTEXT)
    found = LLMEngine(config, Executor.get_class(config), log_stats=False, multiprocess_mode=False)
    engine = Engine(found, opened)
    engine._record()
    try:
        yield engine
    finally:
        hop.close()
        found.engine_core.engine_core.shutdown()


# ---- the stories


def prompt_of(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(10, 1500, length).tolist()


def batch_of(num_requests: int) -> Callable[[Engine], dict[str, Answer]]:
    """So many prompts of 1 to 41 tokens at once, prefilled and decoded together."""

    def story(engine: Engine) -> dict[str, Answer]:
        for index in range(num_requests):
            engine.add(prompt_of(1 + index * 7 % 41, seed=index), 4, prompt_logprobs=index == 0)
        return engine.finish()

    return story


def mixed(step_tokens: int) -> Callable[[Engine], dict[str, Answer]]:
    """Long and short prompts, one of which comes while others decode; `step_tokens` decides how they are cut."""

    def story(engine: Engine) -> dict[str, Answer]:
        def late(step: int) -> None:
            if step == 4:
                engine.add(prompt_of(150, seed=4), 5)

        with engine.step_limit(step_tokens):
            for index, length in enumerate((5, 260, 1, 90)):
                engine.add(prompt_of(length, seed=index), 8)
            return engine.finish(late)

    return story


def prefix_hits(engine: Engine) -> dict[str, Answer]:
    """A prompt again, alone and continued by its answer, next to one that nobody has seen."""
    prompt = prompt_of(540, seed=1)
    engine.add(prompt, 6)
    first = engine.finish()
    engine.add(prompt, 6)
    engine.add(prompt + list(first["r1"].tokens) + prompt_of(20, seed=2), 6)
    engine.add(prompt_of(70, seed=3), 6)
    return first | engine.finish()


def preemptions(engine: Engine) -> dict[str, Answer]:
    """The KV cache runs out while three requests decode: some are thrown out and computed again later."""
    give_back: list[Callable[[], None]] = []

    def shortage(step: int) -> None:
        if step == 5:
            give_back.append(engine.take_blocks())
        if step == 12:
            give_back.pop()()

    for index, length in enumerate((250, 40, 245)):
        engine.add(prompt_of(length, seed=10 + index), 16)
    return engine.finish(shortage)


def abort_in_flight(engine: Engine) -> dict[str, Answer]:
    """One request is aborted while it is prefilled, another one while it decodes; the others go on."""

    def abort(step: int) -> None:
        if step in (2, 5):
            engine.engine.abort_request(["r4" if step == 2 else "r2"])

    with engine.step_limit(64):
        for index, length in enumerate((20, 9, 33, 300)):
            engine.add(prompt_of(length, seed=20 + index), 10)
        return engine.finish(abort)


def zero_token_calls(engine: Engine) -> dict[str, Answer]:
    """Between any two steps the shard calls its experts with no token at all, in every layer."""
    shape = engine.checkpoint.shape
    nothing = torch.empty((0, shape.hidden_size), dtype=getattr(torch, shape.dtype))
    ids, weights = torch.empty((0, shape.top_k), dtype=torch.int32), torch.empty((0, shape.top_k))

    def call(_: int) -> None:
        for layer in shape.moe_layers:
            hop.dispatch(layer, nothing, ids, weights)
            assert hop.combine().shape == (0, shape.hidden_size)

    for index in range(3):
        engine.add(prompt_of(5 + index, seed=30 + index), 5)
    call(0)
    return engine.finish(call)


STORIES: dict[str, Callable[[Engine], dict[str, Answer]]] = {
    **{f"batch of {size}": batch_of(size) for size in (1, 2, 7, 16, 64)},
    "chunked prefill next to decodes": mixed(64),
    "whole prefill next to decodes": mixed(STEP_TOKENS),
    "prefix hits": prefix_hits,
    "preemptions": preemptions,
    "abort in flight": abort_in_flight,
    "zero-token calls": zero_token_calls,
}


def all_outcomes(engine: Engine) -> dict[str, Outcome]:
    return {name: engine.run(story) for name, story in STORIES.items()}


@dataclass
class EngineProcess:
    """Commands of a `transport_peers.Peer` that is a whole attention shard."""

    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    engine: Engine | None = None

    def start(self, checkpoint: Path) -> None:
        self.engine = self.stack.enter_context(running_engine(checkpoint))

    def connect(self, placement: Placement, addresses: list[str], shard: int) -> None:
        assert self.engine is not None
        self.engine.connect(placement, addresses, shard)

    def all_outcomes(self) -> dict[str, Outcome]:
        assert self.engine is not None
        return all_outcomes(self.engine)
