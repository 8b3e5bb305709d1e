"""A release that serves: its pods as Ray nodes of this machine, its Redis beside them."""

from __future__ import annotations

import contextlib
import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from deploy.helm.chart import Manifest, one, overlaid, render
from deploy.helm.ray_pods import RayPods, ray_pods
from redis_server import RedisServer

from moeray.ingress.ports import free_ports

READY_S = 300.0
PASSWORD = "for-this-test"


@dataclass(frozen=True)
class Served:
    """A release that serves. Attributes: url: of its ingress. context: whom TLS trusts; None without TLS."""

    manifests: list[Manifest]
    pods: RayPods
    url: str
    context: ssl.SSLContext | None = None


@contextlib.contextmanager
def served(
    values: dict[str, Any], secret_values: dict[tuple[str, str], str], folder: Path, authority: Path | None = None
) -> Iterator[Served]:
    """The pods of a release as Ray nodes, its Redis beside them; back when its ingress is ready."""
    http, grpc = free_ports("127.0.0.1", 2)
    server = RedisServer(folder, maxmemory_policy="noeviction")
    # What a pod has for itself and one machine has once: addresses, ports, memory. The rest is as in the values.
    here = {
        "redis": {"url": server.url},
        "networkPolicy": {"redis": [{"ipBlock": {"cidr": "127.0.0.0/8"}}]},
        "config": {
            "ingress": {"host": "127.0.0.1", "http_port": http, "grpc_port": grpc},
            "kv_cache": {"host_directory": str(folder / "kv")},
        },
    }
    manifests = render(overlaid(values, here))
    context = ssl.create_default_context(cafile=authority) if authority else None
    server.start()
    try:
        with redis.Redis.from_url(server.url) as client:
            client.config_set("requirepass", PASSWORD)
        with ray_pods(
            one(manifests, "RayService"), {**secret_values, ("moeray-redis", "redis-password"): PASSWORD}
        ) as pods:
            url = f"{'https' if authority else 'http'}://127.0.0.1:{http}"
            wait_until(lambda: status_of(f"{url}/ready", context) == 200, READY_S, "an ingress that serves")
            yield Served(manifests, pods, url, context)
    finally:
        server.kill()


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.5)


def status_of(url: str, context: ssl.SSLContext | None = None) -> int:
    """HTTP status; 0: nobody answers, or not so."""
    try:
        with urllib.request.urlopen(url, timeout=5, context=context) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def ask(served: Served, key: str = "") -> str:
    """The answer to one question, greedily."""
    body = {
        "model": "moeray-tiny", "temperature": 0, "max_tokens": 32,
        "messages": [{"role": "user", "content": "What is an expert group?"}],
    }  # fmt: skip
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(f"{served.url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60, context=served.context) as answer:
        message = json.loads(answer.read())["choices"][0]["message"]
    return f"{message.get('reasoning') or ''}{message.get('content') or ''}"


def replicas_at(pods: RayPods, address: str) -> list[str]:
    """Serve's account of who runs on a pod."""
    request = urllib.request.Request(
        f"http://{pods.head}:{pods.dashboard}/api/serve/applications/",
        headers={"Authorization": f"Bearer {pods.token}"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        deployments = json.loads(answer.read())["applications"]["moeray"]["deployments"]
    return [
        name
        for name, deployment in deployments.items()
        for replica in deployment["replicas"]
        if replica.get("node_ip") == address and replica["state"] == "RUNNING"
    ]
