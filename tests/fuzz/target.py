"""What is attacked: a real shard, a real ingress with tenants in its own process, and those who watch it."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from front_process import ShardProcess, chat
from tenants import Tenants

HERE = Path(__file__).resolve().parent
SECRET = "zebra-quarantine-7731"
"""In the texts of the other tenant; nothing that the attacker gets may hold it, his name or his key."""

ATTACKER, OTHER = "attacker", "victim-of-fuzz"


class Target:
    """Starts everything; ends it on exit. Attributes: counts: (kind, status) -> cases."""

    def __init__(self, model: Path, folder: Path) -> None:
        tenants = Tenants(folder)
        self.headers = tenants.create(ATTACKER, max_context=512)
        self.other_headers = tenants.create(OTHER)
        self._secrets = [SECRET.encode(), OTHER.encode(), tenants.keys[OTHER].encode()]
        self.counts: Counter[tuple[str, str]] = Counter()
        self.slowest_health_s = 0.0
        self.lost: list[str] = []
        self.shard = ShardProcess("s0", model)
        assert self.shard.wait_ready().event == "ready"
        self.shard.connect(model)
        command = [
            sys.executable,
            str(HERE / "ingress_process.py"),
            str(model),
            str(folder),
            f"s0={self.shard.address}",
        ]
        roots = [str(HERE.parent / "integration"), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(roots)}
        )
        assert self.process.stdout is not None
        self.http_port, self.grpc_port = map(int, self.process.stdout.readline().split())
        self._end = threading.Event()
        self._watchers = [threading.Thread(target=each, daemon=True) for each in (self._watch_health, self._be_other)]

    def __enter__(self) -> Self:
        for watcher in self._watchers:
            watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end.set()
        for watcher in self._watchers:
            watcher.join(60)
        self.process.terminate()
        self.process.wait(60)
        self.shard.stop()

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def rss_bytes(self) -> int:
        """Of the ingress."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=120)

    def saw(self, kind: str, status: str, answer: bytes) -> None:
        """Count one case and check its answer.

        Raises:
            AssertionError: the server's fault, or another tenant's secret.
        """
        self.counts[kind, status] += 1
        assert not (status.startswith("5") and status != "501"), f"{kind}: {status}: {answer[:500]!r}"
        assert status not in ("INTERNAL", "UNKNOWN", "UNAVAILABLE", "DATA_LOSS"), f"{kind}: {status}: {answer[:500]!r}"
        for secret in self._secrets:
            assert secret not in answer, f"{kind}: another tenant's {secret!r} in {answer[:500]!r}"
        assert self.process.poll() is None, f"{kind}: the ingress ended with {self.process.returncode}"
        assert self.shard.process.poll() is None, f"{kind}: the shard ended with {self.shard.process.returncode}"

    def _watch_health(self) -> None:
        while not self._end.wait(0.2):
            began = time.monotonic()
            try:
                connection = self.connection()
                connection.request("GET", "/health")
                status = connection.getresponse().status
                connection.close()
            except OSError as error:
                status = 0
                self.lost.append(f"/health: {error}")
            if status not in (0, 200):
                self.lost.append(f"/health: {status}")
            self.slowest_health_s = max(self.slowest_health_s, time.monotonic() - began)

    def _be_other(self) -> None:
        """Another tenant, who must notice nothing."""
        import json

        body = json.dumps(chat(messages=[{"role": "user", "content": SECRET}], user=SECRET))
        while not self._end.wait(0.5):
            connection = self.connection()
            connection.request(
                "POST", "/v1/chat/completions", body, self.other_headers | {"content-type": "application/json"}
            )
            answer = connection.getresponse()
            text = answer.read()
            connection.close()
            if answer.status != 200:
                self.lost.append(f"the other tenant got {answer.status}: {text[:300]!r}")
