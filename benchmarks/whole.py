"""Whole clusters for benchmarks, as users start them: `moeray up`, and what they are asked while they run."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moeray.ingress.ports import free_ports


@dataclass(frozen=True)
class Running:
    """One of them: where it listens (`host:port`), and the environment in which `moeray` finds it."""

    http: str
    env: Mapping[str, str]

    def moeray(self, *arguments: str) -> str:
        """What a command printed; raises CalledProcessError."""
        return subprocess.run(
            _command(*arguments), env=dict(self.env), check=True, capture_output=True, text=True
        ).stdout

    def status(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self.moeray("status", "--json"))
        return state


@contextlib.contextmanager
def cluster(config: Mapping[str, Any]) -> Iterator[Running]:
    """Up on free ports with this cluster.yaml, and down again."""
    http, grpc = free_ports("127.0.0.1", 2)
    with tempfile.TemporaryDirectory(prefix="moeray-bench-") as folder:
        file = Path(folder) / "cluster.yaml"
        file.write_text(yaml.safe_dump({**config, "ingress": {"http_port": http, "grpc_port": grpc}}))
        running = Running(f"127.0.0.1:{http}", {**os.environ, "MOERAY_STATE_DIR": folder})
        running.moeray("up", "-f", str(file), "--detach")
        try:
            yield running
        finally:
            running.moeray("down")


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "moeray.cli", *arguments]
