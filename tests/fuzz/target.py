"""What is attacked: a real shard, a real ingress with tenants in its own process, and those who watch it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from front_process import ShardProcess, chat
from judge import ANSWER_S, End, Judge
from tenants import Tenants

HERE = Path(__file__).resolve().parent
SECRET = "zebra-quarantine-7731"
"""In the texts of the other tenant; nothing that the attacker gets may hold it, his name or his key."""

ATTACKER, OTHER = "attacker", "victim-of-fuzz"
IDLE_S = 60.0
"""Requests that nobody waits for must be gone by then."""


@dataclass(frozen=True, slots=True)
class Target:
    """An ingress as an attacker sees it, and who judges its answers."""

    http_port: int
    grpc_port: int
    headers: Mapping[str, str]
    judge: Judge

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def key(self) -> str:
        return self.headers["authorization"].removeprefix("Bearer ")

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=ANSWER_S)


class Attacked:
    """Starts everything; ends it on exit."""

    def __init__(self, model: Path, folder: Path) -> None:
        tenants = Tenants(folder)
        headers = tenants.create(ATTACKER, max_context=512)
        self.other_headers = tenants.create(OTHER)
        self.judge = Judge([SECRET.encode(), OTHER.encode(), tenants.keys[OTHER].encode()])
        self.slowest_health_s = 0.0
        self.shard = ShardProcess("s0", model)
        assert self.shard.wait_ready().event == "ready"
        self.shard.connect(model)
        command = [sys.executable, str(HERE / "attacked_ingress.py"), str(model), str(folder)]
        roots = [str(HERE.parent / "integration"), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [*command, f"s0={self.shard.address}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(roots)},
        )
        assert self.process.stdout is not None
        self.target = Target(*map(int, self.process.stdout.readline().split()), headers, self.judge)
        self._end = threading.Event()
        self._watchers = [threading.Thread(target=each, daemon=True) for each in (self._watch_health, self._be_other)]

    def __enter__(self) -> Self:
        for watcher in self._watchers:
            watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop_watching()
        self.process.terminate()
        self.process.wait(60)
        self.shard.stop()

    @property
    def rss_bytes(self) -> int:
        """Of the ingress; 0 once it is gone."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return int(psutil.Process(self.process.pid).memory_info().rss)
        return 0

    def end(self, before_bytes: int) -> End:
        """How it stands when nobody asks any more, after at most IDLE_S."""
        self._stop_watching()
        processes = {"ingress": self.process, "shard": self.shard.process}
        ended = tuple(f"the {name} ended with {p.returncode}" for name, p in processes.items() if p.poll() is not None)
        left: dict[str, int] = {}
        deadline = time.monotonic() + IDLE_S
        while not ended and any((left := self._left()).values()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return End(self.rss_bytes - before_bytes, self.slowest_health_s, tuple(left.items()), ended)

    def _left(self) -> dict[str, int]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        counted: dict[str, int] = json.loads(self.process.stdout.readline())
        return {**counted, "the shard": self.shard.info().num_requests}

    def _stop_watching(self) -> None:
        self._end.set()
        for watcher in self._watchers:
            watcher.join(ANSWER_S)

    def _watch_health(self) -> None:
        while not self._end.wait(0.2):
            began = time.monotonic()
            try:
                connection = self.target.connection()
                connection.request("GET", "/health")
                if (status := connection.getresponse().status) != 200:
                    self.judge.lost.append(f"/health: {status}")
                connection.close()
            except OSError as error:
                self.judge.lost.append(f"/health: {error}")
            self.slowest_health_s = max(self.slowest_health_s, time.monotonic() - began)

    def _be_other(self) -> None:
        """Another tenant, who must notice nothing."""
        body = json.dumps(chat(messages=[{"role": "user", "content": SECRET}], user=SECRET))
        headers = self.other_headers | {"content-type": "application/json"}
        while not self._end.wait(0.5):
            try:
                connection = self.target.connection()
                connection.request("POST", "/v1/chat/completions", body, headers)
                answer = connection.getresponse()
                text = answer.read()
                connection.close()
                if answer.status != 200:
                    self.judge.lost.append(f"the other tenant got {answer.status}: {text[:300]!r}")
            except OSError as error:
                self.judge.lost.append(f"the other tenant got {error}")
