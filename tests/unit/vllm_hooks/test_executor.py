"""Whatever EngineCore's main thread does in the worker, or waits for from it, is a step with a longest time."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput

from moeray.vllm_hooks.executor import ShardExecutor, step_counts, step_limit


def is_in_step() -> bool:
    return step_limit._step is not None


class OnDevice(AsyncModelRunnerOutput):
    """What a step with asynchronous scheduling gives: it waits for the device when it is asked."""

    def get_output(self) -> Any:
        return is_in_step()


def scheduled(tokens: int) -> SchedulerOutput:
    """vLLM's own type: what a step is to compute."""
    return replace(SchedulerOutput.make_empty(), total_num_scheduled_tokens=tokens)


class Worker:
    def execute_model(self, _: Any) -> bool:
        return is_in_step()

    def sample_tokens(self, _: Any) -> OnDevice:
        return OnDevice()

    def moeray_tensors(self) -> None:
        assert is_in_step()
        raise ValueError("no such file")


@pytest.fixture
def executor() -> Any:
    executor = ShardExecutor.__new__(ShardExecutor)
    executor.driver_worker = Worker()
    return executor


def test_a_call_of_the_worker_is_a_step_until_it_returns(executor: Any) -> None:
    assert executor.execute_model(scheduled(1)) is True
    assert executor.execute_model(scheduled(1), non_block=True).result() is True
    assert not is_in_step()


def test_steps_that_compute_something_are_counted_with_their_tokens(executor: Any) -> None:
    before = replace(step_counts)
    for tokens in (0, 3, 5, 0):
        executor.execute_model(scheduled(tokens))
    assert (step_counts.steps - before.steps, step_counts.tokens - before.tokens) == (2, 8)


def test_waiting_for_the_device_is_a_step_too(executor: Any) -> None:
    waited: Future[Any] = executor.sample_tokens(None, non_block=True)
    assert not is_in_step(), "EngineCore schedules the next one meanwhile"
    assert waited.result() is True
    assert not is_in_step()


def test_a_step_that_was_waited_for_is_free_at_once(executor: Any) -> None:
    gc.disable()
    try:
        waited = executor.sample_tokens(None, non_block=True)
        assert waited.result() is waited.result() is True
        step = weakref.ref(waited)
        del waited
        assert step() is None
    finally:
        gc.enable()


def test_a_step_that_is_given_to_nobody_is_waited_for_too(executor: Any) -> None:
    assert executor.sample_tokens(None, non_block=True).result() is True


def test_a_call_that_fails_has_ended(executor: Any) -> None:
    with pytest.raises(ValueError, match="no such file"):
        executor.collective_rpc("moeray_tensors")
    assert not is_in_step()
