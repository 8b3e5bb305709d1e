"""Processes on cores of their own that do what they are told.

Pinning is done here and by hand: a process has as many OpenMP threads as it is given cores, set before it imports
anything that reads the setting, and vLLM's own binding is off, which would leave the main thread free to wander.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ANSWER_TIMEOUT_S = 600.0


class PeerFailed(Exception):
    """A process answered with an error, or not at all."""


class Process:
    """Commands are the methods of `subject()`, which is made in the process. One command at a time."""

    def __init__(self, subject: Callable[[], Any], cores: Sequence[int]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_obey, args=(subject, theirs), daemon=True)
        with _environment(cores):
            self._process.start()
        theirs.close()

    def tell(self, name: str, *arguments: Any) -> None:
        self._pipe.send((name, arguments))

    def answer(self, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """Of the oldest command that has none yet.

        Raises:
            PeerFailed: the command raised, the process ended, or time is up.
        """
        if not self._pipe.poll(timeout_s):
            raise PeerFailed(f"no answer within {timeout_s:g} s")
        try:
            ok, value = self._pipe.recv()
        except EOFError:
            raise PeerFailed("the process has ended") from None
        if not ok:
            raise PeerFailed(value)
        return value

    def ask(self, name: str, *arguments: Any, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        self.tell(name, *arguments)
        return self.answer(timeout_s)

    def end(self) -> None:
        self._process.kill()
        self._process.join(10)
        self._pipe.close()


def pin(cores: Sequence[int]) -> None:
    """This process, all its threads, and what it starts from now on."""
    for task in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # a thread that has just ended
            os.sched_setaffinity(int(task.name), cores)


def two_cores() -> tuple[int, int]:
    """The cores for shard and group; the same one twice where there is no second."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[0], cores[-1]


@contextmanager
def _environment(cores: Sequence[int]) -> Iterator[None]:
    """What the next process finds at its start; its affinity is this process' own for the moment."""
    wanted = {"OMP_NUM_THREADS": str(len(set(cores))), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    before, cores_before = {name: os.environ.get(name) for name in wanted}, os.sched_getaffinity(0)
    os.environ.update(wanted)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores_before)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _obey(subject: Callable[[], Any], pipe: Connection) -> None:
    found = subject()
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, getattr(found, name)(*arguments)))
        except Exception as error:  # noqa: BLE001
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            pipe.send((False, f"{type(error).__name__}: {error}"))
