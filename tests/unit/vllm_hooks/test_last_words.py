"""EngineCore's reason is there when its client hears of the death, not seconds later."""

from __future__ import annotations

import asyncio
import logging
import logging.config
import multiprocessing
import os
import time

import pytest

from moeray.transport import PeerLost
from moeray.vllm_hooks.engine_child import ENGINE_CORE_LOGGER, LastWords, _guarded, describe

fork = multiprocessing.get_context("fork")
VLLM_LIKE = {"version": 1, "disable_existing_loggers": False, "loggers": {"vllm": {"level": "ERROR"}}}


def run_engine_core() -> None:
    """As vLLM's: logging is configured anew, the error is logged, the shutdown takes long."""
    logging.config.dictConfig(VLLM_LIKE)
    try:
        raise PeerLost(1, "no answer within 10 s")
    except PeerLost:
        logging.getLogger(ENGINE_CORE_LOGGER).exception("EngineCore encountered a fatal error.")
    time.sleep(30)


def run_failing_call() -> None:
    """A call of the worker extension that failed: logged by the same logger, and EngineCore lives on."""
    try:
        raise ValueError("one address for two groups")
    except ValueError:
        logging.getLogger(ENGINE_CORE_LOGGER).exception("Invocation of moeray_connect method failed")


def test_the_reason_is_told_before_the_shutdown() -> None:
    read_fd, write_fd = os.pipe()
    child = fork.Process(target=_guarded(run_engine_core, os.getpid(), write_fd))
    child.start()
    fault = asyncio.run(LastWords(read_fd).read(lambda: not child.is_alive(), timeout_s=10))
    assert child.is_alive()
    child.kill()
    child.join()
    assert fault is not None
    assert (fault.reason, fault.experts_lost) == ("PeerLost: expert group 1 lost: no answer within 10 s", True)


def test_a_child_that_was_killed_is_not_waited_for() -> None:
    read_fd, _ = os.pipe()
    assert asyncio.run(LastWords(read_fd).read(lambda: True, timeout_s=1000)) is None


def test_an_error_that_ends_one_call_only_is_no_last_word() -> None:
    read_fd, write_fd = os.pipe()
    child = fork.Process(target=_guarded(run_failing_call, os.getpid(), write_fd))
    child.start()
    child.join()
    assert LastWords(read_fd).read_now() is None


def translate() -> None:
    try:
        raise FileNotFoundError("model.safetensors")
    except FileNotFoundError:
        raise ValueError("/models/x/model.safetensors: the weight file is missing") from None


def test_an_error_that_speaks_for_itself_is_told_and_not_what_it_was_translated_from() -> None:
    with pytest.raises(ValueError, match="weight file") as error:
        translate()
    assert describe(error.value)["reason"] == "ValueError: /models/x/model.safetensors: the weight file is missing"
