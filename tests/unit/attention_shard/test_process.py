"""The shard process before it has an engine: real processes, no model."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from moeray.attention_shard import engine as engine_module
from moeray.attention_shard import process as process_module
from moeray.attention_shard import service as service_module
from moeray.attention_shard.engine import EngineLost
from moeray.attention_shard.process import EXIT_FAILED, EXIT_LOST, EXIT_ORPHANED, Events, _serve
from moeray.attention_shard.service import ShardService
from moeray.attention_shard.spec import Event, ShardSpec, decode_event, decode_spec, encode_event, encode_spec
from moeray.membership import Charge

SPEC = ShardSpec(
    "s0", {"model": "/nowhere", "model_name": "m", "engine_args": {}, "moeray": {"backend": "local", "checkpoint": "/"}}
)


def start() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "moeray.attention_shard.process"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def test_spec_and_events_survive_the_pipe() -> None:
    spec = ShardSpec("s1", {"model": "m"}, cpus=[1], num_threads=2, wait_for_connect=False)
    event = Event("ready", "s1", host="127.0.0.1", port=5, pid=6, engine_pid=7)
    assert decode_spec(encode_spec(spec)) == spec
    assert decode_event(encode_event(event)) == event


def test_a_process_whose_parent_is_gone_ends_at_once() -> None:
    process = start()
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(encode_spec(SPEC))
    process.stdin.flush()
    assert decode_event(process.stdout.readline()).event == "progress"

    process.stdin.close()

    assert process.wait(10) == EXIT_ORPHANED


def test_a_spec_that_is_not_one_fails_with_the_field_named() -> None:
    process = start()
    out, _ = process.communicate(b'{"shard": "s0"}\n', timeout=20)

    event = decode_event(out)
    assert (process.returncode, event.event) == (EXIT_FAILED, "failed")
    assert "engine" in event.text


def test_what_libraries_print_does_not_reach_the_events() -> None:
    program = (
        "import moeray.attention_shard.process as p, sys\n"
        "async def serve(spec, events):\n"
        "    print('noise from a library', flush=True); events.send('progress', 'x'); return 0\n"
        "p._serve = serve; p.main()"
    )
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, stderr=pipe)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdin.write(encode_spec(SPEC))
    process.stdin.flush()  # and stays open: its end would end the process
    assert process.wait(30) == 0

    assert [decode_event(line).event for line in process.stdout.read().splitlines()] == ["progress"]
    assert b"noise" in process.stderr.read()


class Engine:
    """One that is lost at once, after its workers have been asked to guard themselves."""

    vllm = model = "x"
    kv_tokens = pid = num_workers = 0
    kv_events = None

    def __init__(self) -> None:
        self.asked = list[Any]()

    async def call_worker(self, *call: Any) -> None:
        self.asked.append(call)

    async def get_output_async(self) -> Any:
        raise EngineLost("engine_dead", "was killed by SIGKILL")


class Hearing(ShardService):
    """Hears from its workers all that they can say."""

    async def run(self) -> None:
        self._on_accused("group-a", "end of file", Charge.BAD)
        self._on_waiting(True)
        self._on_waiting(False)
        await super().run()


def test_what_workers_say_reaches_the_replica_and_they_are_told_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    monkeypatch.setattr(engine_module, "start_engine", lambda *_: engine)
    monkeypatch.setattr(service_module, "ShardService", Hearing)
    monkeypatch.setattr(process_module, "guard", lambda _: SimpleNamespace())
    spec = ShardSpec("s0", {}, host="127.0.0.1", hang_s=7.0, step_s=77.0)
    read, write = os.pipe()
    assert asyncio.run(asyncio.wait_for(_serve(spec, Events(write)), 60)) == EXIT_LOST
    os.close(write)
    with os.fdopen(read, "rb") as lines:
        events = [decode_event(line) for line in lines]
    assert [each.event for each in events] == ["progress"] * 2 + ["ready", "accused", "waiting", "resumed", "lost"]
    assert (events[3].group, events[3].text, events[3].charge) == ("group-a", "end of file", Charge.BAD)
    assert events[-1].text == "was killed by SIGKILL"
    assert engine.asked == [("moeray_warm_up",), ("moeray_guard", 7.0, 77.0)]
