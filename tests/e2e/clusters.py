"""Real clusters for end-to-end tests: `moeray up --detach` in a state folder and on ports of its own."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moeray.ingress.ports import free_ports

UP_S = 240.0


@dataclass
class Cluster:
    """A running cluster and the environment that commands need to find it."""

    env: dict[str, str]
    up_output: str = ""
    up_seconds: float = 0.0
    endpoints: dict[str, str] = field(default_factory=dict)

    @property
    def http(self) -> str:
        return self.endpoints["http"]

    @property
    def grpc(self) -> str:
        return self.endpoints["grpc"]

    def moeray(
        self, *arguments: str, timeout_s: float = 120, prefix: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run one command as a user would, started by `prefix` if there is one."""
        return subprocess.run(
            [*prefix, sys.executable, "-m", "moeray.cli", *arguments],
            env=self.env, capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip

    def status(self) -> dict[str, Any]:
        done = self.moeray("status", "--json")
        assert done.returncode == 0, done.stderr
        state: dict[str, Any] = json.loads(done.stdout)
        return state

    def processes(self, role: str) -> list[dict[str, Any]]:
        """Living processes of one role, by index."""
        found = [p for p in self.status()["processes"] if p["role"] == role and p["state"] != "lost"]
        return sorted(found, key=lambda p: p.get("index", 0))

    def post(self, path: str, body: dict[str, Any] | bytes, timeout_s: float = 60) -> tuple[int, Any]:
        """(status, parsed JSON answer)."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.http}{path}", data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def chat(self, prompt: dict[str, Any], **more: Any) -> str:
        """The exact text of one greedy answer; `prompt` as in golden.json."""
        status, answer = self.post("/v1/chat/completions", golden_request(prompt) | more)
        assert status == 200, answer
        return answer_text(answer["choices"][0]["message"])


def golden_request(prompt: dict[str, Any], model: str = "moeray-tiny") -> dict[str, Any]:
    """The OpenAI request of one golden prompt."""
    request = {"model": model, "messages": prompt["messages"], "temperature": 0, "max_tokens": 128}
    request["chat_template_kwargs"] = prompt.get("chat_template_kwargs", {})
    if prompt.get("tools"):
        request["tools"] = prompt["tools"]
    return request


def answer_text(message: dict[str, Any]) -> str:
    """Everything that the model wrote, as one comparable string."""
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or []]
    return json.dumps([message.get("reasoning") or "", message.get("content") or "", calls], ensure_ascii=False)


def expected_text(prompt: dict[str, Any]) -> str:
    """What `answer_text` gives for the right answer."""
    calls = [(call["name"], json.dumps(call["arguments"])) for call in prompt.get("expected_tool_calls") or []]
    return json.dumps(
        [prompt.get("expected_reasoning") or "", prompt["expected_content"] or "", calls], ensure_ascii=False
    )


def wrong_answers(running: Cluster, golden: list[dict[str, Any]], model: str = "moeray-tiny") -> list[tuple[str, str]]:
    """Ask all golden prompts, eight at a time; (expected, answered) of those that were not answered exactly."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda prompt: running.post("/v1/chat/completions", golden_request(prompt, model)), golden)
        )
    wrong = []
    for prompt, (status, answer) in zip(golden, answers, strict=True):
        assert status == 200, answer
        text, expected = answer_text(answer["choices"][0]["message"]), expected_text(prompt)
        if text != expected:
            wrong.append((expected, text))
    return wrong


@contextlib.contextmanager
def cluster(
    config: dict[str, Any] | None = None, *, env: dict[str, str] | None = None, up_prefix: Sequence[str] = ()
) -> Iterator[Cluster]:
    """A cluster of this configuration, ready; stopped afterwards whatever happened. `up_prefix` starts `moeray up`."""
    http, grpc = free_ports("127.0.0.1", 2)
    config = dict(config or {})
    config["ingress"] = {"http_port": http, "grpc_port": grpc} | config.get("ingress", {})
    with tempfile.TemporaryDirectory(prefix="moeray-e2e-") as folder:
        # The default is one directory for all clusters of a user: this one begins with nothing and leaves nothing.
        config["kv_cache"] = {"host_directory": f"{folder}/kv"} | config.get("kv_cache", {})
        file = Path(folder) / "cluster.yaml"
        file.write_text(yaml.safe_dump(config))
        running = Cluster(env={**os.environ, "MOERAY_STATE_DIR": folder, **(env or {})})
        started = time.monotonic()
        up = running.moeray(
            "up", "-f", str(file), "--detach", "--timeout", str(UP_S), timeout_s=UP_S + 30, prefix=up_prefix
        )
        running.up_seconds, running.up_output = time.monotonic() - started, up.stdout
        try:
            assert up.returncode == 0, f"{up.stdout}\n{up.stderr}"
            running.endpoints = running.status()["endpoints"]
            yield running
        finally:
            down = running.moeray("down")
            if up.returncode == 0:
                assert down.returncode == 0, down.stderr


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Seconds until `condition` held."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.05)
    return time.monotonic() - started


def is_running(pid: int) -> bool:
    """Whether a process exists and is not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
