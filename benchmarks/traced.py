"""Runs one process of a door with the times of a chat's way through it: `python traced.py FILE MODULE ARGUMENTS...`.

Each of POINTS is a function of vLLM's, uvicorn's or moeray's; when it is called (`>`) or has returned (`<`) is noted,
on the clock that all processes of a machine share. FILE is written whenever nothing has happened for a while. Only for
a single client: a point is told by its time, not by its request.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import runpy
import sys
import threading
import time
from pathlib import Path
from typing import Any

POINTS = (
    ("HTTP in", "uvicorn.protocols.http.httptools_impl", "RequestResponseCycle.run_asgi", ">"),
    (
        "route, validate",
        "vllm.entrypoints.openai.chat_completion.serving",
        "OpenAIServingChat.create_chat_completion",
        ">",
    ),
    ("render, tokenise", "moeray.vllm_hooks.engine_core", "FrontLLM.generate", ">"),
    ("check, admit", "vllm.v1.engine.async_llm", "AsyncLLM.generate", ">"),
    ("begin", "vllm.v1.engine.input_processor", "InputProcessor.process_inputs", ">"),
    ("make request", "moeray.vllm_hooks.engine_core", "PooledEngineCore.add_request_async", ">"),
    ("place, encode", "moeray.ingress.shard_link", "ShardLink.send", "<"),
    ("link in", "moeray.attention_shard.relay", "Relay._add", ">"),
    ("to the engine", "vllm.v1.engine.core_client", "AsyncMPClient.add_request_async", ">"),
    ("engine and its IPC", "vllm.v1.engine.core_client", "AsyncMPClient.get_output_async", "<"),
    ("split, encode", "moeray.attention_shard.relay", "Relay._spread", "<"),
    ("link out", "moeray.ingress.shard_pool", "ShardPool._take", ">"),
    ("decode, hand over", "vllm.v1.engine.output_processor", "OutputProcessor.process_outputs", ">"),
    ("detokenise", "vllm.v1.engine.output_processor", "OutputProcessor.process_outputs", "<"),
    ("SSE", "uvicorn.protocols.http.httptools_impl", "RequestResponseCycle.send", "<"),
)
"""(what ends there, module, function, when), in the order of a chat's way."""

QUIET_S = 0.3
_marks: list[tuple[str, float]] = []


def main() -> None:
    file, module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    for name, where, function, when in POINTS:
        with contextlib.suppress(ImportError):
            _watch(name, importlib.import_module(where), function, when)
    threading.Thread(target=_write, args=(Path(file),), daemon=True, name="marks").start()
    run = runpy.run_path if module.endswith(".py") else functools.partial(runpy.run_module, alter_sys=True)
    run(module, run_name="__main__")


def _write(file: Path) -> None:
    written, seen = 0, 0
    while True:
        time.sleep(QUIET_S)
        if written < (seen := len(_marks)) and time.monotonic() - _marks[-1][1] > QUIET_S:
            part = file.with_suffix(".part")
            part.write_text(json.dumps(_marks[:seen]))
            part.rename(file)
            written = seen


def _watch(name: str, module: Any, function: str, when: str) -> None:
    owner, _, attribute = function.rpartition(".")
    target = getattr(module, owner)
    original = getattr(target, attribute)
    if inspect.iscoroutinefunction(original):

        @functools.wraps(original)
        async def watched_async(*args: Any, **kwargs: Any) -> Any:
            if when == ">":
                _mark(name, args)
            try:
                return await original(*args, **kwargs)
            finally:
                if when == "<":
                    _mark(name, args)

        setattr(target, attribute, watched_async)
        return

    @functools.wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        if when == ">":
            _mark(name, args)
        try:
            return original(*args, **kwargs)
        finally:
            if when == "<":
                _mark(name, args)

    setattr(target, attribute, watched)


def _mark(name: str, args: tuple[Any, ...]) -> None:
    if name == "SSE" and args[1]["type"] != "http.response.body":
        return
    if name == "link out" and type(args[2]).__name__ != "Outputs":
        return
    _marks.append((name, time.monotonic()))


if __name__ == "__main__":
    main()
