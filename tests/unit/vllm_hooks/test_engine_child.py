"""EngineCore's process dies with its parent and leaves its reason."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time

import psutil

from moeray.engram import RowsUnavailable
from moeray.transport.errors import PeerLost
from moeray.vllm_hooks.engine_child import LastWords, _guarded, describe, die_with_parent

fork = multiprocessing.get_context("fork")


def test_the_innermost_cause_is_told() -> None:
    error = RuntimeError("engine failed")
    error.__cause__ = ValueError("the checkpoint is cut off")

    assert describe(error) == {"reason": "ValueError: the checkpoint is cut off", "experts_lost": False}


def test_a_lost_group_is_told_even_when_it_is_not_the_innermost_cause() -> None:
    error = RuntimeError("step failed")
    error.__cause__ = PeerLost(1, "end of file")
    error.__cause__.__context__ = ConnectionResetError("reset")

    assert describe(error) == {"reason": "PeerLost: expert group 1 lost: end of file", "experts_lost": True}


def test_engram_rows_that_nobody_brought_are_no_fault_of_the_shard() -> None:
    error = RuntimeError("step failed")
    error.__cause__ = RowsUnavailable("row server 1 is not there")

    assert describe(error) == {"reason": "RowsUnavailable: row server 1 is not there", "experts_lost": True}


def test_the_last_words_of_a_forked_child_reach_the_parent() -> None:
    read_fd, write_fd = os.pipe()

    def run() -> None:
        raise PeerLost(0, "end of file é " + "x" * 5000)

    child = fork.Process(target=_guarded(run, os.getpid(), write_fd))
    child.start()
    fault = asyncio.run(LastWords(read_fd).read(lambda: False, timeout_s=10))
    child.join()

    assert (
        fault is not None
        and fault.experts_lost
        and fault.reason.startswith("PeerLost: expert group 0 lost: end of file é xx")
    )
    assert child.exitcode == 1


def test_silence_is_no_reason() -> None:
    read_fd, _ = os.pipe()
    assert asyncio.run(LastWords(read_fd).read(lambda: False, timeout_s=0.05)) is None


def test_a_child_dies_with_its_parent() -> None:
    """Parent and child in processes of their own, because the parent is killed."""
    pids = fork.SimpleQueue()

    def child(parent: int) -> None:
        die_with_parent(parent)
        pids.put(os.getpid())
        time.sleep(60)

    def parent() -> None:
        fork.Process(target=child, args=(os.getpid(),)).start()
        time.sleep(60)

    process = fork.Process(target=parent)
    process.start()
    orphan = psutil.Process(pids.get())
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()

    deadline = time.monotonic() + 5
    while orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_child_whose_parent_is_gone_already_does_not_start() -> None:
    child = fork.Process(target=die_with_parent, args=(1 << 22,))
    child.start()
    child.join(5)
    assert child.exitcode == 1


def test_workers_of_a_forked_engine_are_spawned() -> None:
    """Workers of vLLM's own parallelism: EngineCore has threads by then, and a process with threads is not forked."""
    told = fork.SimpleQueue()

    def run() -> None:
        told.put(os.environ["VLLM_WORKER_MULTIPROC_METHOD"])

    _, write_fd = os.pipe()
    child = fork.Process(target=_guarded(run, os.getpid(), write_fd))
    child.start()
    assert told.get() == "spawn"
    child.join(10)
