"""The shard process: vLLM's EngineCore (forked from here) and the relay, alive and dead together.

    python -m moeray.attention_shard.process --spec-fd 0 --events-fd 1

One JSON line (`ShardSpec`) comes in on the spec descriptor, which then stays open: its end-of-file means that the
parent is gone, and so is this process at once. JSON lines (`Event`) go out on the events descriptor; everything vLLM
prints goes to stderr. EngineCore is killed by the kernel when this process ends in whatever way.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time

from moeray.attention_shard.spec import Event, ShardSpec, decode_spec, encode_event
from moeray.health import guard
from moeray.membership import Charge
from moeray.placement.machine import pin_process

EXIT_FAILED, EXIT_LOST, EXIT_ORPHANED = 2, 3, 4
LAST_WORDS_S = 1.0
"""How long the links get to carry the reason of a death."""

_STARTED = time.monotonic()
logger = logging.getLogger(__name__)


class Events:
    """The line to the parent; a parent that is gone is noticed elsewhere."""

    def __init__(self, fd: int) -> None:
        self.shard = ""
        self._fd = fd

    def send(self, event: str, text: str = "", **fields: object) -> None:
        line = Event(event=event, shard=self.shard, text=text, seconds=time.monotonic() - _STARTED, **fields)  # type: ignore[arg-type]
        with contextlib.suppress(BrokenPipeError):
            os.write(self._fd, encode_event(line))

    def accuse(self, group: str, reason: str, charge: Charge) -> None:
        """The hop found this expert group bad."""
        self.send("accused", reason, group=group, charge=charge)

    def waiting(self, waits: bool) -> None:
        """A layer call begins or ends to wait for experts that nobody has."""
        self.send("waiting" if waits else "resumed")


def main() -> None:
    parser = argparse.ArgumentParser(prog="moeray.attention_shard.process", description=__doc__)
    parser.add_argument("--spec-fd", type=int, default=0)
    parser.add_argument("--events-fd", type=int, default=1)
    arguments = parser.parse_args()
    spec_file = os.fdopen(os.dup(arguments.spec_fd), "rb", buffering=0)
    events_fd = os.dup(arguments.events_fd)
    os.dup2(2, 1)  # vLLM and its children print on stdout
    events = Events(events_fd)
    try:
        spec = decode_spec(spec_file.readline())
        events.shard = spec.shard
        _take_cores(spec)
        threading.Thread(target=_die_with_parent, args=(spec_file.fileno(),), daemon=True, name="lifeline").start()
        code = asyncio.run(_serve(spec, events))
    except Exception as error:
        logging.basicConfig()
        logger.exception("the shard process could not start")
        events.send("failed", str(error) or type(error).__name__)
        code = EXIT_FAILED
    sys.stderr.flush()
    os._exit(code)  # vLLM's exit hooks wait for an engine that may be gone


def _die_with_parent(fd: int) -> None:
    while os.read(fd, 4096):
        pass
    os._exit(EXIT_ORPHANED)


def _take_cores(spec: ShardSpec) -> None:
    """Pin and bound the threads; must run before torch is imported, which reads the variables once."""
    if spec.cpus:
        pin_process(spec.cpus)
    if (threads := spec.num_threads or len(spec.cpus or ())) > 0:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        # vLLM's own binding leaves the main thread on every core; the affinity above is inherited by all of them.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


async def _serve(spec: ShardSpec, events: Events) -> int:
    events.send("progress", "importing vLLM")
    from moeray.attention_shard.engine import EngineLost, start_engine
    from moeray.attention_shard.service import ShardService

    engine = start_engine(spec, lambda stage: events.send("progress", stage))
    if spec.relay_cpu is not None:
        pin_process([spec.relay_cpu])  # the engine, forked by now, keeps the others
    service = ShardService(spec, engine, events.accuse, events.waiting)
    port = await service.start()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    events.send("progress", "warming up")
    await engine.call_worker("moeray_warm_up")
    watched = guard(spec.hang_s)  # from now on: importing and loading hold the interpreter for seconds
    await engine.call_worker("moeray_guard", spec.hang_s, spec.step_s)
    events.send("ready", host=spec.host, port=port, pid=os.getpid(), engine_pid=engine.pid)
    running = asyncio.create_task(service.run())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not running.done():
        stop.clear()
        await service.drain(f"attention shard {spec.shard} is shutting down", spec.drain_s, stop)
        engine.shutdown()
        watched.close()
        events.send("stopped")
        return 0
    try:
        running.result()
    except EngineLost as lost:
        await service.fail(lost.code, str(lost), LAST_WORDS_S)
        events.send("lost", str(lost))
    return EXIT_LOST


if __name__ == "__main__":
    main()
