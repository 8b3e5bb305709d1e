"""Two halves of one engine step: one half's attention runs while the other half's experts are computed elsewhere.

vLLM's runner can cut a step's tokens in two and make attention metadata for each half; on GPUs it then runs both over
streams. Here two threads take turns: exactly one runs at any time, and they change over where a half would begin to
wait for its expert groups. The first half is ahead in every layer, so a request may be cut, too: its later tokens find
the keys and values of the earlier ones, as after a chunk of their own. (A request that reuses blocks which a later one
of the same step still has to write is noticed by vLLM, and that step stays whole.)

Each half has its own hop, because a transport has one call in flight. Which steps are cut is `plan`'s to say; it is
made by measurement (micro_batch_choice.py). On CPU only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from vllm import forward_context
from vllm.platforms import current_platform

from moeray.vllm_hooks.hop import Hop, hop
from moeray.vllm_hooks.settings import shard_settings

MIN_TOKENS = 2
CUT_ARCHITECTURE = "DeepseekV4ForCausalLM"
"""Whose `forward` computes halves (model.py)."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Both ways of one step of `tokens` tokens, in milliseconds: the fastest whole one, the slowest in halves."""

    tokens: int
    whole_ms: float
    halves_ms: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Which steps are cut.

    Attributes:
        from_tokens: those of at least so many tokens; None is none.
        measured: what that was decided by, largest step first.
    """

    from_tokens: int | None = None
    measured: tuple[Measured, ...] = ()

    def cuts(self, num_tokens: int) -> bool:
        return self.from_tokens is not None and num_tokens >= max(self.from_tokens, MIN_TOKENS)

    def report(self) -> dict[str, Any]:
        return {"from_tokens": self.from_tokens, "measured": [asdict(each) for each in self.measured]}


@dataclass(slots=True)
class State:
    """Of this process' engine.

    Attributes:
        plan: in force.
        chosen: what measuring gave; it is done once.
        running: the step that is being computed in halves.
    """

    plan: Plan = Plan()
    chosen: Plan | None = None
    running: Halves | None = None


second_hop = Hop()
"""The second half's; connected only where steps are cut."""


class Halves:
    """One step in two halves. `hand_over` is called by the half that would wait next."""

    def __init__(self, whole: Any, on_turn: Callable[[int], None]) -> None:
        """Nothing runs yet.

        Args:
            whole: vLLM's ForwardContext of the step, cut in two (`ubatch_slices`).
            on_turn: called with 0 or 1 whenever that half goes on.
        """
        self._whole = whole
        self._contexts = [_half_of(whole, index) for index in range(2)]
        self._on_turn = on_turn
        self._may_run = (Lock(), Lock())
        self._ended = [False, False]
        self._error: BaseException | None = None
        self._turn = 0
        for lock in self._may_run:
            lock.acquire()

    @property
    def hop(self) -> Hop:
        """Of the half that runs."""
        return second_hop if self._turn else hop

    def run(self, compute: Callable[[Any], Tensor]) -> Tensor:
        """Both halves' results, one after the other along the tokens.

        Args:
            compute: one half's forward pass, given its slice of the step (vLLM's UBatchSlice).
        Raises:
            Exception: what the first half to fail raised; the other one has ended by then.
        """
        second = _second_thread().submit(self._compute, 1, compute)
        state.running = self
        try:
            first = self._compute(0, compute)
            rest = second.result()
        finally:
            state.running = None
            forward_context._forward_context = self._whole
        if self._error is not None:
            raise self._error
        assert first is not None and rest is not None
        return torch.cat((first, rest))

    def hand_over(self) -> None:
        """Let the other half run until it would wait, too.

        Raises:
            Exception: the other half failed; there is no point in going on.
        """
        me, other = self._turn, 1 - self._turn
        if self._ended[other]:
            return
        self._may_run[other].release()
        self._go_on(me)

    def _go_on(self, me: int) -> None:
        """Wait for the turn, and take what belongs to this half."""
        self._may_run[me].acquire()
        if self._error is not None:
            raise self._error
        self._take_turn(me)

    def _take_turn(self, me: int) -> None:
        self._turn = me
        forward_context._forward_context = self._contexts[me]
        self._on_turn(me)

    def _compute(self, me: int, compute: Callable[[Any], Tensor]) -> Tensor | None:
        """One half from its first turn to its end; None after an error, which is kept for `run`."""
        try:
            if me == 0:
                self._take_turn(me)
            else:
                self._go_on(me)
            with torch.inference_mode():
                return compute(self._whole.ubatch_slices[me])
        except BaseException as error:  # noqa: BLE001 raised again by `run`, in the engine's thread
            self._error = self._error or error
            return None
        finally:
            self._ended[me] = True
            if not self._ended[1 - me]:
                self._may_run[1 - me].release()


def _half_of(whole: Any, index: int) -> Any:
    half = copy.copy(whole)
    half.attn_metadata, half.slot_mapping = whole.attn_metadata[index], whole.slot_mapping[index]
    half.ubatch_slices = None
    return half


@cache
def _second_thread() -> ThreadPoolExecutor:
    """One for all steps: a new one for each would start its OpenMP threads anew, and count them by itself."""
    return ThreadPoolExecutor(1, "moeray-half", initializer=torch.get_num_threads)


def hop_report() -> dict[str, Any]:
    """Of both hops together (see `Hop.report`), and the plan."""
    reports = [each.report() for each in (hop, second_hop) if each.generation is not None] or [hop.report()]
    total = dict(reports[0])
    calls = [report["calls"] for report in reports]
    for key, value in total.items():
        if isinstance(value, int | float) and key != "generation":
            total[key] = sum(report[key] for report in reports)
    total["stages"] = {
        stage: sum(report["stages"][stage] * count for report, count in zip(reports, calls, strict=True))
        / max(1, sum(calls))
        for stage in reports[0]["stages"]
    }
    return {**total, "micro_batches": state.plan.report()}


def is_cut(context: Any) -> bool:
    """Whether vLLM's ForwardContext is of a step in two halves, with something to attend to."""
    return context.ubatch_slices is not None and context.attn_metadata is not None


def whole_starts(slices: Sequence[Any], starts: Sequence[Tensor]) -> Tensor:
    """Where requests begin in the whole step [R + 1], from where they begin in each half.

    Args:
        slices: vLLM's UBatchSlices; a request that is cut is in both.
        starts: `query_start_loc` of each half.
    """
    first, second = starts
    is_inside_request = slices[0].request_slice.stop > slices[1].request_slice.start
    return torch.cat((first[:-1] if is_inside_request else first, second[1:] + slices[0].num_tokens))


def may_cut(vllm_config: Any) -> bool:
    """Whether this shard's settings may ask for halves. Where its experts are its own there is nothing to gain."""
    settings = shard_settings(vllm_config)
    if settings is None or not current_platform.is_cpu():
        return False
    if CUT_ARCHITECTURE not in vllm_config.model_config.hf_config.architectures:
        return False
    return settings.micro_batches == "always" or (settings.micro_batches == "measured" and settings.backend != "local")


def makes_metadata_for_halves(runner: Any) -> bool:
    """Whether vLLM's runner was built with `may_cut`."""
    return all(len(group.metadata_builders) > 1 for groups in runner.attn_groups for group in groups)


@contextmanager
def _two_halves(parallel_config: Any, wanted: bool) -> Iterator[None]:
    """vLLM's own setting, for the length of one call.

    Not for good: vLLM checks its configuration more than once, and wants the all-to-all kernels for it that its own
    halves need on a GPU.
    """
    before = parallel_config.ubatch_size
    parallel_config.ubatch_size = 2 if wanted else before
    try:
        yield
    finally:
        parallel_config.ubatch_size = before


def install() -> None:
    """Let vLLM's CPU runner cut steps as `state.plan` says; idempotent."""
    from vllm.v1.worker import gpu_model_runner
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    runner_module: Any = gpu_model_runner
    decide = CPUModelRunner._determine_batch_execution_and_padding
    build, allow = CPUModelRunner.initialize_metadata_builders, CPUModelRunner._allow_microbatching
    if getattr(decide, "cuts_steps", False):
        return

    def _determine_batch_execution_and_padding(runner: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        mode, batch, is_cut, *rest = decide(runner, *args, **kwargs)
        if kwargs.get("allow_microbatching", True) and state.plan.cuts(kwargs["num_tokens"]):
            is_cut = True
        return (mode, batch, is_cut, *rest)

    def initialize_metadata_builders(runner: Any, *args: Any, **kwargs: Any) -> None:
        """With builders for both halves."""
        with _two_halves(runner.parallel_config, may_cut(runner.vllm_config)):
            build(runner, *args, **kwargs)

    def _allow_microbatching(runner: Any, *args: Any) -> bool:
        with _two_halves(runner.parallel_config, state.plan.from_tokens is not None):
            return bool(allow(runner, *args))

    _determine_batch_execution_and_padding.cuts_steps = True  # type: ignore[attr-defined, unused-ignore]
    for hook in (_determine_batch_execution_and_padding, initialize_metadata_builders, _allow_microbatching):
        setattr(CPUModelRunner, hook.__name__, hook)
    split, slices_of = runner_module.split_attn_metadata, runner_module.maybe_create_ubatch_slices

    def maybe_create_ubatch_slices(is_cut: bool, tokens: Any, num_tokens: int, num_reqs: int, count: int) -> Any:
        """vLLM's own, for two halves, whatever its configuration says."""
        return slices_of(is_cut, tokens, num_tokens, num_reqs, max(count, 2))

    def split_attn_metadata(slices: list[Any], common: Any) -> list[Any]:
        """vLLM's own leaves out two fields, one of which V4's builders read."""
        halves: list[Any] = split(slices, common)
        for each, half in zip(slices, halves, strict=True):
            if common.positions is not None:
                half.positions = common.positions[each.token_slice]
            if common.is_prefilling is not None:
                half.is_prefilling = common.is_prefilling[each.request_slice]
        return halves

    runner_module.split_attn_metadata = split_attn_metadata
    runner_module.maybe_create_ubatch_slices = maybe_create_ubatch_slices


state = State()
"""This process'."""
