"""Whether cutting a step in halves pays on this shard, measured once after it has connected.

A cut step does everything twice on half as many tokens: it pays where the experts' time that the other half's attention
hides is more than that costs. Both are known only by trying, with this model, these groups and these cores. The steps
that are tried are vLLM's own dummy runs with attention, over random tokens and empty KV blocks; they do reach the
expert groups, and are counted there.
"""

from __future__ import annotations

import logging
from time import perf_counter
from typing import Any

import torch

from moeray.config import MicroBatches
from moeray.vllm_hooks.hop import hop
from moeray.vllm_hooks.hop_costs import HopCosts
from moeray.vllm_hooks.lookback import KEYWORD
from moeray.vllm_hooks.micro_batches import (
    MIN_TOKENS,
    Measured,
    Plan,
    makes_metadata_for_halves,
    second_hop,
    state,
)
from moeray.vllm_hooks.route import Route

MIN_MEASURED_TOKENS = 16
NUM_PAIRS = 3
MIN_GAIN = 0.05
BUDGET_S = 5.0
"""After which no more pairs are begun."""

logger = logging.getLogger(__name__)


def wants_halves() -> bool:
    """Whether the second hop is to follow the first."""
    return state.plan.from_tokens is not None


def prepare(runner: Any, how: MicroBatches, route: Route) -> None:
    """After the first hop has connected: decide which steps are cut, and connect the second hop if any are.

    Measured is once, before the first request: later the blocks that a dummy run reads are not empty.

    Raises:
        TransportError: a group was lost, or refused the second connection.
    """
    second_hop.close()
    state.plan = Plan()
    if how == "never" or not makes_metadata_for_halves(runner):
        return
    if how == "measured" and state.chosen is None and runner.requests:
        return
    second_hop.follow(route)
    if how == "always":
        state.plan = Plan(MIN_TOKENS)
        return
    if state.chosen is None:
        state.chosen = choose(runner)
        hop.costs, second_hop.costs = HopCosts(), HopCosts()
    state.plan = state.chosen
    if not wants_halves():
        second_hop.close()


def choose(runner: Any) -> Plan:
    """Cut from the smallest step on at which it gained, down from the largest.

    Call it between steps, with both hops connected. What the runs leave in the runner's buffers is written anew by the
    next step, as after any of vLLM's dummy runs.

    Raises:
        TransportError: a group was lost.
    """
    deadline = perf_counter() + BUDGET_S
    measured: list[Measured] = []
    from_tokens, num_tokens = None, int(runner.max_num_tokens)
    before = state.plan
    try:
        while num_tokens >= MIN_MEASURED_TOKENS and perf_counter() < deadline:
            measured.append(_measure(runner, num_tokens, deadline))
            if measured[-1].halves_ms > (1 - MIN_GAIN) * measured[-1].whole_ms:
                break
            from_tokens, num_tokens = num_tokens, num_tokens // 2
    finally:
        state.plan = before
    plan = Plan(from_tokens, tuple(measured))
    logger.info("micro-batches: %s", plan.report())
    return plan


def _measure(runner: Any, num_tokens: int, deadline: float) -> Measured:
    """Interleaved pairs after a first one; the worst of one way against the best of the other, or noise chooses."""
    pairs = [(_step_ms(runner, num_tokens, cut=False), _step_ms(runner, num_tokens, cut=True))]
    for number in range(NUM_PAIRS):
        if number and perf_counter() > deadline:
            break
        pairs.append((_step_ms(runner, num_tokens, cut=False), _step_ms(runner, num_tokens, cut=True)))
    whole, halves = zip(*pairs[1:], strict=True)
    return Measured(num_tokens, round(min(whole), 2), round(max(halves), 2))


def _step_ms(runner: Any, num_tokens: int, *, cut: bool) -> float:
    state.plan = Plan(num_tokens if cut else None)
    num_requests = min(num_tokens, runner.scheduler_config.max_num_seqs)
    generator = torch.Generator().manual_seed(num_tokens)
    vocabulary = runner.model_config.get_vocab_size()
    tokens = torch.randint(vocabulary, (num_tokens,), generator=generator, dtype=runner.input_ids.gpu.dtype)
    runner.input_ids.gpu[:num_tokens].copy_(tokens)
    per_request = num_tokens // num_requests
    runner.positions[:num_tokens].copy_(torch.arange(num_tokens) % per_request + num_tokens - per_request)
    depth = getattr(runner.model, "token_lookback_depth", 0)
    if depth:  # a dummy run has no requests whose tokens could be looked up
        nothing = {KEYWORD: torch.full((num_requests, depth), -1, dtype=torch.int64)}
        runner._init_model_kwargs = lambda num_reqs=None: nothing
    try:
        began = perf_counter()
        runner._dummy_run(num_tokens, force_attention=True)
        return (perf_counter() - began) * 1e3
    finally:
        if depth:
            del runner._init_model_kwargs
