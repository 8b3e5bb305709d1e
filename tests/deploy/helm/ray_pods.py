"""The pods of a rendered RayService as Ray nodes of this machine: what KubeRay would start, each on an address of
loopback's own, with the labels, options and environment that the chart gives its pod.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from moeray.ingress.ports import free_ports

RAY, SERVE = (str(Path(sys.executable).with_name(name)) for name in ("ray", "serve"))
START_S = 180.0


@dataclass
class RayPods:
    """What runs. Attributes: folder: stands for the pods' volumes. groups: worker group -> addresses of its pods."""

    service: dict[str, Any]
    folder: Path
    secret_values: Mapping[tuple[str, str], str]
    head: str = "127.0.0.2"
    port: int = 0
    dashboard: int = 0
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    groups: dict[str, list[str]] = field(default_factory=dict)
    agents: dict[str, int] = field(default_factory=dict)

    @property
    def cluster(self) -> dict[str, Any]:
        config: dict[str, Any] = self.service["spec"]["rayClusterConfig"]
        return config

    def environment(self, template: dict[str, Any], address: str) -> dict[str, str]:
        """Of a pod's container: what the chart says (Secrets looked up, volumes in `folder`), and KubeRay's token."""
        said = {each["name"]: self._value(each, address) for each in template["spec"]["containers"][0]["env"]}
        kuberay = {"RAY_AUTH_MODE": self.cluster["authOptions"]["mode"], "RAY_AUTH_TOKEN": self.token}
        return {**os.environ, **said, **kuberay}

    def _value(self, variable: dict[str, Any], address: str) -> str:
        if "value" in variable:
            return self.placed(str(variable["value"]))
        source = variable["valueFrom"]
        if "fieldRef" in source:
            assert source["fieldRef"]["fieldPath"] == "status.podIP"
            return address
        return self.secret_values[source["secretKeyRef"]["name"], source["secretKeyRef"]["key"]]

    def placed(self, text: str) -> str:
        """With a pod's paths where this test has its volumes."""
        return text.replace("/home/moeray", f"{self.folder}/home").replace("/etc/moeray", f"{self.folder}/etc")

    def mount_secrets(self, template: dict[str, Any]) -> None:
        """What the kubelet does: each key of a Secret is a file where its volume is mounted."""
        mounts = {each["name"]: each["mountPath"] for each in template["spec"]["containers"][0]["volumeMounts"]}
        for volume in template["spec"]["volumes"]:
            for (secret, key), value in self.secret_values.items():
                if volume.get("secret", {}).get("secretName") == secret:
                    file = Path(self.placed(mounts[volume["name"]])) / key
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(value)

    def start_head(self) -> None:
        """As KubeRay does: Ray's state in the Redis of gcsFaultToleranceOptions."""
        self.port, self.dashboard = free_ports("127.0.0.1", 2)
        state = self.cluster["gcsFaultToleranceOptions"]
        secret = state["redisPassword"]["valueFrom"]["secretKeyRef"]
        self._start(
            self.cluster["headGroupSpec"], self.head,
            "--head", f"--port={self.port}", f"--dashboard-host={self.head}", f"--dashboard-port={self.dashboard}",
            f"--redis-password={self.secret_values[secret['name'], secret['key']]}", f"--temp-dir={self.folder}/ray",
            RAY_REDIS_ADDRESS=state["redisAddress"].removeprefix("redis://"),
            RAY_external_storage_namespace=self.folder.name,
        )  # fmt: skip

    def start_worker(self, group: str) -> str:
        """One pod of a worker group; its address."""
        (spec,) = (each for each in self.cluster["workerGroupSpecs"] if each["groupName"] == group)
        address = f"127.0.0.{3 + sum(map(len, self.groups.values()))}"
        self._start(spec, address, f"--address={self.head}:{self.port}")
        self.groups.setdefault(group, []).append(address)
        return address

    def _start(self, spec: dict[str, Any], address: str, *options: str, **environment: str) -> None:
        (self.agents[address],) = free_ports("127.0.0.1", 1)
        self.mount_secrets(spec["template"])
        command = [
            RAY,
            "start",
            "--disable-usage-stats",
            f"--node-ip-address={address}",
            "--object-store-memory=100000000",
        ]
        command += [f"--{key}={value}" for key, value in spec["rayStartParams"].items()]
        command += [f"--dashboard-agent-listen-port={self.agents[address]}", *options]
        if labels := spec.get("labels"):
            command.append("--labels=" + ",".join(f"{key}={value}" for key, value in labels.items()))
        done = subprocess.run(
            command, env=self.environment(spec["template"], address) | environment,
            capture_output=True, text=True, timeout=START_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def deploy(self) -> None:
        """serveConfigV2, as it stands in the RayService."""
        file = self.folder / "serve.yaml"
        file.write_text(self.placed(self.service["spec"]["serveConfigV2"]))
        environment = self.environment(self.cluster["headGroupSpec"]["template"], self.head)
        done = subprocess.run(
            [SERVE, "deploy", str(file), "-a", f"http://{self.head}:{self.dashboard}"],
            env=environment, capture_output=True, text=True, timeout=START_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


@contextlib.contextmanager
def ray_pods(service: dict[str, Any], secret_values: Mapping[tuple[str, str], str]) -> Iterator[RayPods]:
    """All pods of a RayService, and its application deployed; killed afterwards.

    Args:
        secret_values: (Secret, key) -> value.
    """
    # Ray's socket paths must stay below 108 characters.
    pods = RayPods(service, Path(tempfile.mkdtemp(prefix="moeray-pods-", dir="/tmp")), secret_values)
    (pods.folder / "home").mkdir()
    before = {process.pid for process in psutil.process_iter()}
    try:
        pods.start_head()
        for group in pods.cluster["workerGroupSpecs"]:
            for _ in range(group["replicas"]):
                pods.start_worker(group["groupName"])
        pods.deploy()
        yield pods
    finally:
        ours = [each for each in psutil.process_iter() if each.pid not in before and _is_of(each, pods.folder)]
        for process in ours:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(ours, timeout=20)
        shutil.rmtree(pods.folder, ignore_errors=True)


def _is_of(process: psutil.Process, folder: Path) -> bool:
    """By the environment that every process of a pod has."""
    try:
        return process.environ().get("HOME") == str(folder / "home")
    except psutil.Error:
        return False
