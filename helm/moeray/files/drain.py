"""drain.py SECONDS: preStop of a worker pod. Tells Ray that this node goes, comes back when no replica is left on it.

Serve starts the replicas elsewhere and lets these finish. Without it a pod's end would be a lost node: its requests go
on elsewhere then, too, but are computed again. Where Ray does not answer (the whole cluster is being removed) the pod
ends without, and where there is no room elsewhere after SECONDS.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

TELL_S = 30.0
LOOK_S = 0.5


def main() -> int:
    limit_s = float(sys.argv[1])
    started = time.monotonic()
    raylet = raylet_of(os.environ["POD_IP"])
    if raylet is None:
        print("drain: no raylet runs here", flush=True)
        return 0
    pid, options = raylet
    if not tell(options["--gcs-address"], options["--node_id"], limit_s):
        return 0
    while replicas_of(pid) and time.monotonic() - started < limit_s:
        time.sleep(LOOK_S)
    print(f"drain: {len(replicas_of(pid))} replicas are left after {time.monotonic() - started:.0f} s", flush=True)
    return 0


def tell(address: str, node_id: str, limit_s: float) -> bool:
    """Whether Ray has taken it."""
    command = [
        "ray",
        "drain-node",
        f"--address={address}",
        f"--node-id={node_id}",
        "--reason=DRAIN_NODE_REASON_PREEMPTION",
    ]
    command += ["--reason-message=the pod ends", f"--deadline-remaining-seconds={limit_s:.0f}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TELL_S, check=False)
    except subprocess.TimeoutExpired:
        print(f"drain: Ray did not answer within {TELL_S:g} s", flush=True)
        return False
    if done.returncode:
        print(f"drain: Ray refused: {done.stderr.strip()}", flush=True)
    return done.returncode == 0


def raylet_of(address: str) -> tuple[int, dict[str, str]] | None:
    """Process id and options of the raylet with this IP address."""
    for pid, command in processes():
        options = dict(word.split("=", 1) for word in command if word.startswith("--") and "=" in word)
        if Path(command[0]).name == "raylet" and options.get("--node_ip_address") == address:
            return pid, options
    return None


def replicas_of(raylet: int) -> list[int]:
    """Serve's replicas that this raylet has started and that still run. Ray names its processes for what they do."""
    return [pid for pid, command in processes() if command[0].startswith("ray::ServeReplica") and parent(pid) == raylet]


def processes() -> list[tuple[int, list[str]]]:
    """Process id and command line of each."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = folder.joinpath("cmdline").read_text().split("\0")
        except OSError:
            continue  # it has ended
        if command[0]:
            found.append((int(folder.name), command))
    return found


def parent(pid: int) -> int:
    """0: it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
