"""The servers of the ingress benchmark, each as a person would start it, around engines with the same arguments."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from callers import Caller, GrpcCaller, HttpCaller
from pinned import pin, two_cores

from moeray.attention_shard.spec import ShardSpec, decode_event, encode_spec
from moeray.ingress.ports import free_ports

HOST = "127.0.0.1"
HERE = Path(__file__).parent
START_S, RAY_START_S = 300.0, 180.0
STOP_S = 20.0
ENGINE = "VLLM::"
"""How vLLM names the processes of an engine."""
EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""Of every engine. vLLM's default on CPU is a process more for the worker; it has nothing to do with any door."""

ENGINE_ARGS: dict[str, Any] = {
    "enforce_eager": True,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 512,
    "max_model_len": 2048,
    "kv_cache_memory_bytes": 256 << 20,
    "scheduling_policy": "priority",
    "async_scheduling": False,
    "seed": 0,
}
_OF_FRONTS = {"disable_log_stats": True}


class NotServed(Exception):
    """A server did not come up; the text says what is known of it."""


@dataclass(frozen=True, eq=False)
class Door:
    """One way in.

    Attributes:
        name: in the results.
        protocol: http or grpc.
        headers: that every request carries.
        roots: role -> process; its children count to it, engines apart.
    """

    name: str
    port: int
    roots: dict[str, int]
    protocol: str = "http"
    headers: dict[str, str] = field(default_factory=dict)

    async def caller(self) -> Caller:
        if self.protocol == "grpc":
            return await GrpcCaller.connect(f"{HOST}:{self.port}", self.headers)
        return await HttpCaller.connect(HOST, self.port, self.headers)

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Role -> its processes now; those of vLLM's engine are `engine`."""
        found: dict[str, list[psutil.Process]] = {role: [] for role in [*self.roots, "engine"]}
        for role, pid in self.roots.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                for each in [(root := psutil.Process(pid)), *root.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        is_engine = "".join(each.cmdline()[:1]).startswith(ENGINE)
                        found["engine" if is_engine else role].append(each)
        return found

    def cpu_s(self) -> dict[str, float]:
        """Seconds of CPU by role, since the processes began."""
        return {role: sum(map(_cpu_s, processes)) for role, processes in self.processes().items()}

    def pin(self, fronts: Sequence[int], engine: Sequence[int]) -> None:
        """Every thread that there is; later ones inherit it."""
        for role, processes in self.processes().items():
            for process in processes:
                for task in Path(f"/proc/{process.pid}/task").iterdir():
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.sched_setaffinity(int(task.name), engine if role == "engine" else fronts)


def _cpu_s(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


@contextlib.contextmanager
def bare(model: Path, name: str, log: Path, *, trace: Path | None = None) -> Iterator[Door]:
    """What `vllm serve` runs, with what costs it time and is off here switched off there, too.

    Args:
        trace: a folder for what `traced.py` writes; None: nothing is traced.
    """
    from moeray.vllm_hooks.served_model import describe_model

    dialect = describe_model(model).dialect
    (port,) = free_ports(HOST, 1)
    line = ["--model", str(model), "--host", HOST, "--port", str(port)]
    line += ["--served-model-name", name, "--disable-uvicorn-access-log", "--distributed-executor-backend", EXECUTOR]
    line += ["--tokenizer-mode", dialect.tokenizer_mode]
    if dialect.reasoning_parser:
        line += ["--reasoning-parser", dialect.reasoning_parser]
    if dialect.tool_parser:
        line += ["--enable-auto-tool-choice", "--tool-call-parser", dialect.tool_parser]
    for argument, value in {**ENGINE_ARGS, **_OF_FRONTS}.items():
        flag = argument.replace("_", "-")
        line += [f"--{flag}"] if value is True else [f"--no-{flag}"] if value is False else [f"--{flag}", str(value)]
    with _process(_python("vllm.entrypoints.launchers.api_server.entry", line, trace, "bare"), log) as process:
        yield Door("vllm serve", port, {"front": process.pid})


@contextlib.contextmanager
def ours(model: Path, name: str, folder: Path, log: Path, *, trace: Path | None = None) -> Iterator[list[Door]]:
    """One shard process behind two ingresses, one of which serves tenants only; each by HTTP and by gRPC.

    Args:
        folder: for the tenants.
        trace: as in `bare`.
    """
    with contextlib.ExitStack() as stack:
        asked = {"moeray": [""], "moeray, tenants": [str(folder)]}
        shards, ingresses = _started(stack, model, name, ["s0"], asked, log, trace)
        addresses = {shard: _shard_address(shard, process) for shard, process in shards.items()}
        doors = []
        for title, process in ingresses.items():
            said = _joined(process, addresses, title, log)
            roots = {"front": process.pid, "relay": shards["s0"].pid}
            doors.append(Door(title, said["http"], roots, headers=said["headers"]))
            doors.append(Door(f"{title}, gRPC", said["grpc"], roots, "grpc", said["headers"]))
        yield doors


@contextlib.contextmanager
def routed(model: Path, name: str, routings: Sequence[str], log: Path) -> Iterator[list[Door]]:
    """Two shard processes behind an ingress for each of these ways to choose between them (see door_process.py)."""
    with contextlib.ExitStack() as stack:
        asked = {routing: ["", routing] for routing in routings}
        shards, ingresses = _started(stack, model, name, ["s0", "s1"], asked, log)
        addresses = {shard: _shard_address(shard, process) for shard, process in shards.items()}
        roots = {shard: process.pid for shard, process in shards.items()}
        yield [
            Door(title, _joined(process, addresses, title, log)["http"], {"front": process.pid, **roots})
            for title, process in ingresses.items()
        ]


_Processes = dict[str, "subprocess.Popen[bytes]"]


def _started(
    stack: contextlib.ExitStack, model: Path, name: str, shards: Sequence[str], ingresses: Mapping[str, list[str]],
    log: Path, trace: Path | None = None,
) -> tuple[_Processes, _Processes]:  # fmt: skip
    """(shard processes, ingresses), by name; they load at the same time.

    Args:
        ingresses: name -> arguments of door_process.py after the model and its name.
    """
    engine = {
        "model": str(model),
        "model_name": name,
        "engine_args": {**ENGINE_ARGS, "distributed_executor_backend": EXECUTOR},
        "moeray": None,
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    line = _python("moeray.attention_shard.process", [], trace, "shard")
    running = {shard: stack.enter_context(_process(line, log, **pipes)) for shard in shards}
    for shard, process in running.items():
        assert process.stdin is not None
        process.stdin.write(encode_spec(ShardSpec(shard, engine, wait_for_connect=False, num_threads=1)))
        process.stdin.flush()
    doors = {}
    for title, arguments in ingresses.items():
        command = _python(str(HERE / "door_process.py"), [str(model), name, *arguments], trace, title)
        doors[title] = stack.enter_context(_process(command, log, **pipes))
    return running, doors


def _joined(ingress: subprocess.Popen[bytes], addresses: dict[str, str], title: str, log: Path) -> dict[str, Any]:
    """What an ingress says once it serves these shards."""
    assert ingress.stdin is not None and ingress.stdout is not None
    ingress.stdin.write(json.dumps(addresses).encode() + b"\n")
    ingress.stdin.flush()
    said = ingress.stdout.readline()
    if not said:
        raise NotServed(f"{title}: its ingress ended; see {log}")
    found: dict[str, Any] = json.loads(said)
    return found


def _shard_address(name: str, shard: subprocess.Popen[bytes]) -> str:
    """It says so once."""
    assert shard.stdout is not None
    for line in shard.stdout:
        event = decode_event(line)
        if event.event == "ready":
            return f"{event.host}:{event.port}"
        if event.event == "failed":
            raise NotServed(f"shard process {name}: {event.text}")
    raise NotServed(f"shard process {name} ended")


@contextlib.contextmanager
def ray_serve_llm(model: Path, name: str, log: Path) -> Iterator[Door]:
    """`ray.serve.llm.build_openai_app` with its defaults.

    Raises:
        NotServed: this installation cannot.
    """
    (port,) = free_ports(HOST, 1)
    line = [sys.executable, str(HERE / "ray_door.py"), str(model), name, str(port)]
    with _process(line, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], RAY_START_S)[0]:
            raise NotServed(f"not served after {RAY_START_S:g} s: {_last_line(log)}")
        said = process.stdout.readline()
        if not said:
            raise NotServed(f"it ended with {process.wait(STOP_S)}: {_last_line(log)}")
        yield Door("Ray Serve LLM", port, {"front": process.pid})


def _python(module: str, arguments: list[str], trace: Path | None, title: str) -> list[str]:
    """The command of a module, or a file, perhaps traced."""
    if trace is not None:
        return [sys.executable, str(HERE / "traced.py"), str(trace / f"{title}.json"), module, *arguments]
    return [sys.executable, *([] if module.endswith(".py") else ["-m"]), module, *arguments]


def settle(asked: Sequence[Door]) -> None:
    """Once all serve, everything to its core: fronts and clients on the first, engines on the last."""
    wait_served(asked)
    first, last = two_cores()
    pin([first])
    for door in asked:
        door.pin([first], [last])


def wait_served(doors: Sequence[Door]) -> None:
    """Until each answers on HTTP (or its process' HTTP does)."""
    for door in doors:
        if door.protocol == "http":
            _wait(door)


def _wait(door: Door) -> None:
    listing = urllib.request.Request(f"http://{HOST}:{door.port}/v1/models", headers=door.headers)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(listing, timeout=5) as answer:  # noqa: S310
            if answer.status == 200:
                return
        if not all(map(_lives, door.roots.values())):
            raise NotServed(f"{door.name}: its process ended")
        time.sleep(0.2)
    raise NotServed(f"{door.name}: not served after {START_S:g} s")


def _lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


@contextlib.contextmanager
def _process(line: list[str], log: Path, **pipes: Any) -> Iterator[subprocess.Popen[bytes]]:
    """With everything that it starts ended at the end; what it prints goes to `log` unless `pipes` says otherwise."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with log.open("ab") as file:
        process = subprocess.Popen(line, **{"stdout": file, "stderr": file, "env": environment, **pipes})
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    known = [process.pid]
    with contextlib.suppress(psutil.NoSuchProcess):
        known += [each.pid for each in psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    for pid in known:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).create_time() < time.time() and pid != process.pid:
                psutil.Process(pid).kill()
    if process.poll() is None:
        process.kill()
    process.wait()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
