"""Around vLLM's EngineCore in its own process: it dies with its parent and says why it dies.

vLLM tells the client of a dead EngineCore only that it is dead; the reason stays in a log. Touch points: the process
target `EngineCoreProc.run_engine_core`, which `CoreEngineProcManager` looks up when it forks, and the logger to which
EngineCore writes a fatal error before it announces its death (the exception itself leaves the target only after a
shutdown of seconds).
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import select
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ENGINE_CORE_LOGGER = "vllm.v1.engine.core"
_PR_SET_PDEATHSIG = 1
_MAX_REASON = 4000
"""One write to a pipe of at most PIPE_BUF bytes is not torn."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What ended EngineCore. `experts_lost`: experts, or Engram rows, did not come, so the shard itself is sound."""

    reason: str
    experts_lost: bool


class LastWords:
    """Reading end of the pipe on which EngineCore leaves its reason."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read_now(self) -> Fault | None:
        if not select.select([self._fd], [], [], 0)[0] or not (data := os.read(self._fd, 2 * _MAX_REASON)):
            return None
        fields = json.loads(data.splitlines()[-1])
        return Fault(fields["reason"], fields["experts_lost"])

    async def read(self, has_ended: Callable[[], bool], timeout_s: float = 1.0) -> Fault | None:
        """Wait a moment: the client hears of the death before the child has written. An ended one says no more."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while asyncio.get_running_loop().time() < deadline:
            had_ended = has_ended()
            if (fault := self.read_now()) is not None or had_ended:
                return fault
            await asyncio.sleep(0.01)
        return None


def watch_engine_child() -> LastWords:
    """Arrange that the EngineCore forked next dies with this process, leaves its last words and continues requests.

    Call it once, before `make_async_mp_client`, with the fork method.
    """
    from vllm.v1.engine.core import EngineCoreProc

    from moeray.vllm_hooks import continued_requests

    continued_requests.install_in_scheduler()
    read_fd, write_fd = os.pipe()
    EngineCoreProc.run_engine_core = staticmethod(_guarded(EngineCoreProc.run_engine_core, os.getpid(), write_fd))
    return LastWords(read_fd)


def _guarded(run: Callable[..., None], parent_pid: int, write_fd: int) -> Callable[..., None]:
    def run_engine_core(*args: Any, **kwargs: Any) -> None:
        die_with_parent(parent_pid)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # of its own workers, if any: it has threads by then
        words = _FatalErrors(write_fd)
        logging.getLogger(ENGINE_CORE_LOGGER).addFilter(words)
        try:
            run(*args, **kwargs)
        except Exception as error:
            words.say(error)
            raise

    return run_engine_core


class _FatalErrors(logging.Filter):
    """Says the exception that EngineCore's main function logs; lets every record through.

    A filter and not a handler: vLLM configures its logging again in the child, which removes handlers.
    """

    def __init__(self, write_fd: int) -> None:
        super().__init__()
        self._write_fd, self._said = write_fd, False

    def filter(self, record: logging.LogRecord) -> bool:
        # Other functions log errors that end a single call, such as one of the worker extension.
        if record.funcName == "run_engine_core" and record.exc_info and record.exc_info[1] is not None:
            self.say(record.exc_info[1])
        return True

    def say(self, error: BaseException) -> None:
        if not self._said:
            self._said = True
            os.write(self._write_fd, json.dumps(describe(error), ensure_ascii=False).encode() + b"\n")


def die_with_parent(parent_pid: int) -> None:
    """SIGKILL this process when its parent ends; at once if it has already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def describe(error: BaseException) -> dict[str, Any]:
    """The innermost cause in one line, and whether it lies beyond the hop, or beyond the row servers' links."""
    from moeray.engram import RowsUnavailable
    from moeray.transport.errors import TransportError

    chain = [error]
    while (cause := _cause(chain[-1])) is not None and cause not in chain:
        chain.append(cause)
    elsewhere = next((link for link in chain if isinstance(link, TransportError | RowsUnavailable)), None)
    cause = elsewhere or chain[-1]
    return {"reason": f"{type(cause).__name__}: {cause}"[: _MAX_REASON // 4], "experts_lost": elsewhere is not None}


def _cause(error: BaseException) -> BaseException | None:
    """What Python itself would print above: nothing where the error was raised `from None`, because it says it all."""
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)
