"""Ray nodes on this machine, each with an address of loopback's own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from moeray.ingress.ports import free_ports

RAY = str(Path(sys.executable).with_name("ray"))
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


@contextlib.contextmanager
def ray_nodes(*pools: str) -> Iterator[str]:
    """A head (attention, ingress) and a worker for each of these pools, by `ray start`; yields the head's address.

    The head alone has the label `at=head`.
    """
    (port,) = free_ports("127.0.0.1", 1)
    folder = tempfile.mkdtemp(prefix="moeray-ray-", dir="/tmp")  # Ray's socket paths must stay below 108 characters
    start = [RAY, "start", "--disable-usage-stats", "--num-cpus=4", "--object-store-memory=100000000"]
    before = {process.pid for process in psutil.process_iter()}
    try:
        head = ["--head", "--node-ip-address=127.0.0.2", f"--port={port}", "--include-dashboard=false",
                "--labels=pool=attention,at=head", f"--temp-dir={folder}"]  # fmt: skip
        workers = [
            [f"--address=127.0.0.2:{port}", f"--node-ip-address=127.0.0.{3 + number}", f"--labels=pool={pool}"]
            for number, pool in enumerate(pools)
        ]
        for node in (head, *workers):
            subprocess.run([*start, *node], env=os.environ | ENVIRONMENT, check=True, capture_output=True, timeout=180)
        yield f"127.0.0.2:{port}"
    finally:
        ours = [p for p in psutil.process_iter() if p.pid not in before and folder in " ".join(command_of(p))]
        for process in ours:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(ours, timeout=20)
        shutil.rmtree(folder, ignore_errors=True)


def lose_node_of(worker: int) -> None:
    """The node that runs the process with this pid is gone: every process of it at once."""
    raylet = next(each for each in psutil.Process(worker).parents() if "raylet" in each.name())
    for process in (raylet, *raylet.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended with the one before it
            process.kill()


def drain(address: str, node_id: str) -> None:
    """Tell Ray that a node will go; Serve moves what runs there."""
    subprocess.run(
        [RAY, "drain-node", f"--address={address}", f"--node-id={node_id}",
         "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test", "--deadline-remaining-seconds=600"],
        env=os.environ | ENVIRONMENT, check=True, capture_output=True, timeout=180,
    )  # fmt: skip


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
